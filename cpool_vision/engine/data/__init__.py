"""From files to batches: datasets, order, randomness, loaders."""
