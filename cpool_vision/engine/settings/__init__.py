"""Settings of train.py and validate.py: command line flags and YAML files."""
