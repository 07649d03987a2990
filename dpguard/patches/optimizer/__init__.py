"""Patches of DP optimizers: one owner of each attribute, and a step in one walk."""
