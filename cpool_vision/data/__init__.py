"""Datasets and the factory that finds them."""
from .factory import create_dataset, list_datasets
from .shapes import ShapesDataset
from .shapes_seg import ShapesSegDataset

__all__ = ['ShapesDataset', 'ShapesSegDataset', 'create_dataset', 'list_datasets']
