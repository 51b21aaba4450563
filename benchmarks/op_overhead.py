"""What checking the operator's arguments costs beside the operator: `python -m benchmarks.op_overhead`.

A call checks twice, where it enters the dispatcher and where it enters the backend. Medians of many calls in turn on
one thread; gradients are not asked for, so that the share is the largest there is.
"""
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from cpool_vision.ops.checks import check_arguments
from cpool_vision.profile.cases import Case

from .turns import take_turns

SHAPES = ((1, 16, 4, 4), (1, 384, 14, 14), (8, 384, 14, 14))
CHECKS_OF_A_CALL = 2


def _microseconds(functions: dict[str, Callable[[], Any]], repeats: int = 300) -> dict[str, float]:
    rounds = take_turns(functions, repeats)
    return {name: statistics.median(times[name] for times in rounds) * 1e6 for name in functions}


def main() -> None:
    torch.set_num_threads(1)
    print('| B x C x H x W | checks of a call, us | native forward, us | share |\n|---|---|---|---|')
    run = torch.ops.cpool_vision.context_pool2d
    for shape in SHAPES:
        inputs, _ = Case(shape, (0.2, 1.0), backward=False).inputs()
        x, weight_logits, sigma = (t.detach() for t in inputs)
        found = _microseconds({
            'checks': functools.partial(check_arguments, x, weight_logits, sigma, 1),
            'call': functools.partial(run, x, weight_logits, sigma, 1, 'native')})
        checks = CHECKS_OF_A_CALL * found['checks']
        print(f'| {"x".join(map(str, shape))} | {checks:.0f} | {found["call"]:.0f} | {checks / found["call"]:.1%} |')


if __name__ == '__main__':
    main()
