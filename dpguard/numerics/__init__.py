"""What is computed with tensors: arithmetic of rows, and code of others tried on made-up ones.

Patches and audits both use it; it knows of neither.
"""
