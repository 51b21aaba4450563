"""Looking into trained models."""
from .maps import ContextMaps, context_maps
from .supports import SupportStatistics, support_statistics

__all__ = ['ContextMaps', 'SupportStatistics', 'context_maps', 'support_statistics']
