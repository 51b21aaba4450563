"""Generated datasets, the dataset factory, and augmentation pipelines."""
from .factory import create_dataset, list_datasets
from .shapes import ShapesDataset
from .shapes_seg import ShapesSegDataset

__all__ = ['ShapesDataset', 'ShapesSegDataset', 'create_dataset', 'list_datasets']
