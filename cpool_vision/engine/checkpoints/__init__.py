"""Checkpoints: format, keeping, finding, and where a run stands."""
