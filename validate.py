#!/usr/bin/env python3
"""Measure the accuracy of a model: `python validate.py --help`."""
import sys

from cpool_vision.cli.validate import main

if __name__ == '__main__':
    sys.exit(main())
