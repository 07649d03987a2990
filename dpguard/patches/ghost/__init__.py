"""Patches of ghost clipping: norms, losses of any shape, clipped sums of several batches."""
