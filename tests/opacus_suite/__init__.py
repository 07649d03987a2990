"""Opacus's own tests, run with and without dpguard."""
