"""Faster ways to the same numbers; nothing here knows a host."""
