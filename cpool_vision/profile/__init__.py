"""Profiler of the operator: `python -m cpool_vision.profile`."""
