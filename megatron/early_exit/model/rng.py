"""Random numbers for the exits that do not change the random numbers of the backbone.

A model with exits must draw the same weights and dropout masks for its backbone as it does without
exits, so every random number of an exit is drawn inside one of these contexts.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_MODEL_PARALLEL_OFFSET = 2718
_SHARED_STATE = "data-parallel-rng"


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore every random state (host, device, tensor-parallel tracker) on leaving."""
    tracker = get_cuda_rng_tracker()
    host, device, tracked = torch.get_rng_state(), torch.cuda.get_rng_state(), tracker.get_states()
    try:
        yield
    finally:
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(device)
        tracker.set_states(tracked)


@contextmanager
def seeded_rng(seed: int, tp_rank: int) -> Iterator[None]:
    """Draw from `seed`; in parallel regions each tensor-parallel rank draws other numbers, as in
    Megatron."""
    with preserved_rng():
        tracker = get_cuda_rng_tracker()
        states = {}
        for name in tracker.get_states():
            offset = 0 if name == _SHARED_STATE else _MODEL_PARALLEL_OFFSET + tp_rank
            torch.cuda.manual_seed(seed + offset)
            states[name] = torch.cuda.get_rng_state()
        tracker.set_states(states)
        torch.manual_seed(seed)
        torch.cuda.manual_seed(seed)
        yield


def derived_seed(*numbers: int) -> int:
    """A seed that is a function of `numbers`, practically unique to them."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest)


@contextmanager
def dropout_rng(seed: int, tp_rank: int, sequence_parallel: bool) -> Iterator[None]:
    """Draw the dropout masks of a branch from `seed`.

    With sequence parallelism the ranks hold different tokens and draw from states of their own,
    as in Megatron's transformer block.
    """
    with seeded_rng(seed, tp_rank):
        parallel = get_cuda_rng_tracker().fork() if sequence_parallel else nullcontext()
        with parallel:
            yield
