"""Measuring models: one pass, metrics, costs, results."""
