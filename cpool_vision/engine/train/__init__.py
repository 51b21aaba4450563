"""Training: building a run, the training loop, validation and checkpoints."""
