"""From files to batches: data sets, order, randomness, loaders."""
