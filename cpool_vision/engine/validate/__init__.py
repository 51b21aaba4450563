"""Validation: evaluation loop, metrics, cost and results files."""
