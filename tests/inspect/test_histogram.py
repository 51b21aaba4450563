import numpy as np
import pytest
import torch

from cpool_vision.inspect import ContextMaps, support_histogram


def maps_of(*supports: float, grid: tuple[int, int] = (2, 2)) -> ContextMaps:
    sigma = torch.tensor(supports).view(1, 1, *grid)
    return ContextMaps(torch.zeros(1, 1, *grid), sigma, grid, 1)


def test_shares_by_hand() -> None:
    # an image of 8 x 8: cells of 4 px and of 8 px
    maps = {'shallow': maps_of(0.1, 0.1, 0.3, 0.6), 'deep': maps_of(0.5, grid=(1, 1))}
    found = support_histogram(maps, (8, 8), bins=2)
    assert found.layers == ['shallow', 'deep']
    np.testing.assert_allclose(found.edges, [0, 2, 4])
    np.testing.assert_allclose(found.shares, [[0.75, 0.25], [0, 1]])
    finer = support_histogram(maps, (8, 8), bins=4)
    np.testing.assert_allclose(finer.shares, [[0.5, 0.25, 0.25, 0], [0, 0, 0, 1]])


@pytest.mark.parametrize('maps, bins, message', [
    ({}, 4, 'maps must contain at least one context pool'),
    ({'only': maps_of(1.0, 1.0, 1.0, 1.0)}, 0, 'bins must be >= 1, got 0'),
    ({'only': maps_of(1.0, float('nan'), 1.0, 1.0)}, 4, "supports of 'only' are empty, NaN or infinite"),
])
def test_bad_input(maps, bins, message) -> None:
    with pytest.raises(ValueError, match=message):
        support_histogram(maps, (8, 8), bins)
