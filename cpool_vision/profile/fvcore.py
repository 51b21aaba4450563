"""Multiply-adds of context pools for fvcore, which counts operators it does not know as zero."""
from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any


def _count_pool(inputs: list[Any], outputs: list[Any]) -> Counter:
    x, sigma = inputs[0].type().sizes(), inputs[2].type().sizes()
    return Counter({'context_pool2d': prod(x) * prod(sigma[2:])})


def _count_predictor(inputs: list[Any], outputs: list[Any]) -> Counter:
    x, reduce, predict = (inputs[i].type().sizes() for i in (0, 1, 3))
    batch, _, height, width = outputs[0].type().sizes()
    return Counter({'conv': reduce[0] * batch * (x[1] * reduce[1] + height * width * prod(predict[::2]) * predict[3])})


def _count_nothing(inputs: list[Any], outputs: list[Any]) -> Counter:
    return Counter()


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], Counter]]:
    """Handles for `FlopCountAnalysis(model, images).set_op_handle(**fvcore_handles())`.

    Every output cell counts as if it read the whole map, as for `torch.utils.flop_counter`: the upper bound. fvcore
    calls a multiply-add one operation.
    """
    return {'cpool_vision::context_pool2d': _count_pool, 'cpool_vision::supports_and_logits': _count_nothing,
            'cpool_vision::predict_maps': _count_predictor, 'cpool_vision::to_autocast': _count_nothing}
