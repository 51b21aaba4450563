"""Checkpoints: file format, saving, finding, and the progress of a run."""
