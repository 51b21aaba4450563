"""Records of a run: logs, tables, tracking services and curves."""
