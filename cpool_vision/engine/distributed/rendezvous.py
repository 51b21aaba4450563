"""How processes that torchrun has restarted find each other."""
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = 'attempt'
_PERIOD = 0.02  # seconds between looks


def agree_on_attempt(store: Any, rank: int, world_size: int) -> str:
    """Name that these processes share, and no earlier ones that met in the same store.

    Each process leaves a token. The first one answers the tokens that it finds, also stale ones, which nobody waits
    for, until every other process has said that it got the answer.

    Args:
        store: a `torch.distributed.Store` that all processes reach; its timeout holds for each wait.
        rank, world_size: of this process.

    Raises:
        TimeoutError: a process did not come in time.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f'token {rank}', token)
        name = store.get(f'answer {token}').decode()
        store.set(f'{name} has {rank}', '')
        return name
    name, end = f'attempt {uuid.uuid4().hex}', time.monotonic() + store.timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for each in missing:
            if store.check([f'token {each}']):
                store.set(f'answer {store.get(f"token {each}").decode()}', name)
        missing = [each for each in missing if not store.check([f'{name} has {each}'])]
        if missing and time.monotonic() > end:
            raise TimeoutError(f'processes {missing[:9]} of {world_size} did not come within {store.timeout}')
        time.sleep(_PERIOD if missing else 0)
    return name


def _rendezvous_of_attempt(url: str, timeout: timedelta | None = None, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
    options: dict[str, Any] = {} if timeout is None else {'timeout': timeout}
    for store, rank, world_size in rendezvous('env://', **options):
        yield dist.PrefixStore(agree_on_attempt(store, rank, world_size), store), rank, world_size


def rendezvous_url() -> str:
    """URL for `init_process_group`: environment variables, under torchrun with a part of the store for each attempt.

    torchrun keeps the store of its own rendezvous over `--max-restarts`, so that processes of a second attempt would
    find the addresses of those of the first one, which are gone. Its count of restarts cannot tell attempts apart: each
    node counts for itself, and only where a process failed, not where it was stopped because another node restarts.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return 'env://'
    try:
        register_rendezvous_handler(_SCHEME, _rendezvous_of_attempt)
    except RuntimeError:  # it is registered already
        pass
    return f'{_SCHEME}://'
