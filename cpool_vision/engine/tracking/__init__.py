"""What a run tells: log, tables, services, curves."""
