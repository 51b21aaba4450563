"""Flags of divided models that timm's train.py does not have."""
from .args_common import SupportsAddArgument, switch


def add_sharding_args(group: SupportsAddArgument) -> None:
    """Models beyond the memory of one device."""
    switch(group, '--fsdp', help='divide parameters, gradients and optimizer state among the processes (FSDP2)')
    group.add_argument(
        '--checkpoint-format', default='full', choices=['full', 'sharded'],
        help='with --fsdp: a file of whole tensors, or a folder to which each process writes its part (default: full)')
