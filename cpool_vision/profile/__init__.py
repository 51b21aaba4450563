"""The profiler of the operator: `python -m cpool_vision.profile`."""
