"""Flags of fault tolerance that timm's train.py does not have."""
from .args_common import SupportsAddArgument, switch


def add_numerics_args(group: SupportsAddArgument) -> None:
    """What to do about losses and gradients that are NaN or infinite, and about last bits."""
    add = group.add_argument
    add('--nonfinite', default='raise', choices=['raise', 'skip'],
        help='stop at a loss or gradient that is not finite, or skip the update (default: raise)')
    add('--max-skipped', type=int, default=10, metavar='N',
        help='updates that --nonfinite skip may leave out before the run stops (default: 10)')
    switch(group, '--deterministic',
           help='kernels that give the same last bits each time; slower on CUDA, and an error where there is none')
