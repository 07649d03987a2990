"""Patches of hooked models: each call meets its own backprop, and how its rows are computed."""
