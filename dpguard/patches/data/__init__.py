"""Patches of data loaders and samplers: what is delivered, and how it was drawn."""
