#!/usr/bin/env python3
"""Train a model: `python train.py --help`."""
import sys

from cpool_vision.cli.train import main

if __name__ == '__main__':
    sys.exit(main())
