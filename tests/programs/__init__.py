"""Random programs of forwards, cuts, backwards and steps, and what is true of them.

``models``      what is trained: a :class:`Design` says how the model is built and wrapped
``operations``  what is done with it: a program is a list of operations, a machine runs it
``guarded``     the machine with Opacus and dpguard, on whole batches
``plain``       the machine without either, on one sample: where ground truth comes from
``comparison``  what the plain runs say about rows, norms and steps, against what was seen
``found``       programs that failed once
``strategies``  how hypothesis draws designs and programs
"""
