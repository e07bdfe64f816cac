"""Processes killed at any moment, and what is left behind by them: see :mod:`tests.faults.kill`."""
