"""Data sets and the factory that finds them."""
from .factory import create_dataset, list_datasets
from .shapes import ShapesDataset

__all__ = ['ShapesDataset', 'create_dataset', 'list_datasets']
