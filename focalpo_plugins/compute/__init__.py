"""Faster computations of the same numbers; nothing here depends on a host."""
