"""Checks that stop a run before it goes wrong; nothing here depends on a host."""
