"""How processes that torchrun has restarted find each other."""
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = 'attempt'


def _rendezvous_of_attempt(url: str, timeout: timedelta | None = None, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
    options: dict[str, Any] = {} if timeout is None else {'timeout': timeout}
    for store, rank, world_size in rendezvous('env://', **options):
        yield dist.PrefixStore(f'attempt {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store), rank, world_size


def rendezvous_url() -> str:
    """URL for `init_process_group`: environment variables, with a part of the store for each attempt of torchrun.

    torchrun keeps the store of its own rendezvous over `--max-restarts`, so that processes of a second attempt would
    find the addresses of those of the first one, which are gone.
    """
    if not int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')):
        return 'env://'
    try:
        register_rendezvous_handler(_SCHEME, _rendezvous_of_attempt)
    except RuntimeError:  # it is registered already
        pass
    return f'{_SCHEME}://'
