"""Inspecting trained models: supports, pooling weights, footprints and receptive fields."""
from .footprints import Footprints, gaussian_footprints, grid_points
from .maps import ContextMaps, context_maps
from .receptive_field import ReceptiveField, effective_receptive_field, without_pools
from .supports import SupportHistogram, SupportStatistics, support_histogram, support_statistics

__all__ = [
    'ContextMaps', 'Footprints', 'ReceptiveField', 'SupportHistogram', 'SupportStatistics', 'context_maps',
    'effective_receptive_field', 'gaussian_footprints', 'grid_points', 'support_histogram', 'support_statistics',
    'without_pools']
