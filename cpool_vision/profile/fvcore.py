"""Multiply-adds of context pools for fvcore, which counts operators it does not know as zero."""
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
    """Handles for `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())`.

    Every output cell counts as if it read the whole map, as for `torch.utils.flop_counter`: the upper bound. fvcore
    calls a multiply-add one operation.
    """
    # It hooks every module: the layer then leaves its predictor to torch's convolutions, which fvcore knows.
    return {'cpool_vision::context_pool2d': _count_pool, 'cpool_vision::context_pool_tokens': _count_pool,
            'cpool_vision::supports_and_logits': _count_nothing, 'cpool_vision::to_autocast': _count_nothing}
