"""Lets processes that torchrun has restarted find each other."""
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

_SCHEME = 'attempt'
_PERIOD = 0.02  # seconds between checks


def agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta = default_pg_timeout) -> str:
    """Agrees on a new name with the other processes that are started now, but not with earlier ones.

    Each process puts a token into the store. The first process answers every token that it finds, until every other
    process has confirmed the answer. Tokens of earlier attempts may be answered, too, but nobody waits for those.

    Args:
        store: Store that all processes can reach. Its own timeout limits the wait of the other processes.
        rank: Rank of this process.
        world_size: Number of processes.
        timeout: How long the first process waits.

    Returns:
        The name, the same on all processes.

    Raises:
        TimeoutError: If a process does not arrive in time.
    """
    if rank:
        token = uuid.uuid4().hex
        store.set(f'token {rank}', token)
        name = store.get(f'answer {token}').decode()
        store.set(f'{name} has {rank}', '')
        return name
    name, end = f'attempt {uuid.uuid4().hex}', time.monotonic() + timeout.total_seconds()
    missing = list(range(1, world_size))
    while missing:
        for each in missing:
            if store.check([f'token {each}']):
                store.set(f'answer {store.get(f"token {each}").decode()}', name)
        missing = [each for each in missing if not store.check([f'{name} has {each}'])]
        if missing and time.monotonic() > end:
            raise TimeoutError(f'processes {missing[:9]} of {world_size} did not arrive within {timeout}')
        time.sleep(_PERIOD if missing else 0)
    return name


def _rendezvous_of_attempt(url: str, timeout: timedelta = default_pg_timeout, **_: object,
                           ) -> Iterator[tuple[dist.Store, int, int]]:
    for store, rank, world_size in rendezvous('env://', timeout=timeout):
        yield dist.PrefixStore(agree_on_attempt(store, rank, world_size, timeout), store), rank, world_size


def rendezvous_url() -> str:
    """Returns the URL for `init_process_group`. Under torchrun, each attempt has its own prefix in the store.

    torchrun keeps its store over `--max-restarts`. Without the prefix, processes of a second attempt would find the
    addresses of the first one, whose processes are gone. The restart count of torchrun cannot tell attempts apart: each
    node counts for itself, and does not count restarts that another node causes.
    """
    if 'TORCHELASTIC_RUN_ID' not in os.environ:
        return 'env://'
    try:
        register_rendezvous_handler(_SCHEME, _rendezvous_of_attempt)
    except RuntimeError:  # already registered
        pass
    return f'{_SCHEME}://'
