"""Looking into trained models."""
from .maps import ContextMaps, context_maps

__all__ = ['ContextMaps', 'context_maps']
