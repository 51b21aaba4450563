"""Datasets, sample order, seeding and data loaders."""
