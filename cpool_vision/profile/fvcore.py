"""Multiply-adds of context pools for fvcore, which counts unknown operators as zero."""
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any


def _count_pool(inputs: list[Any], outputs: list[Any]) -> Counter:
    x, logits, sigma = (value.type().sizes() for value in inputs[:3])
    channels = x[1] if len(x) == 4 else x[2]
    return Counter({'context_pool2d': x[0] * channels * prod(logits[2:]) * prod(sigma[2:])})


def _count_nothing(inputs: list[Any], outputs: list[Any]) -> Counter:
    return Counter()


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], Counter]]:
    """Returns handles for `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())`.

    Every output cell counts as if it read the whole map, an upper bound, as with `torch.utils.flop_counter`. fvcore
    counts a multiply-add as one operation.
    """
    # fvcore hooks every module; the layer then runs its predictor as torch convolutions, which fvcore counts
    return {'cpool_vision::context_pool2d': _count_pool, 'cpool_vision::context_pool_tokens': _count_pool,
            'cpool_vision::supports_and_logits': _count_nothing, 'cpool_vision::to_autocast': _count_nothing}
