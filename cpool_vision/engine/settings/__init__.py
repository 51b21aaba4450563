"""Flags of train.py and validate.py, and the YAML over them."""
