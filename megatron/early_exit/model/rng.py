"""Random numbers for the exits that do not change the random numbers of the backbone.

A model with exits must draw the same weights and dropout masks for its backbone as it does without
exits, so every random number of an exit is drawn inside one of these contexts.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

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
        for name, state in tracker.get_states().items():
            offset = 0 if name == _SHARED_STATE else _MODEL_PARALLEL_OFFSET + tp_rank
            states[name] = _seeded_state(seed + offset, state)
        tracker.set_states(states)
        torch.manual_seed(seed)
        torch.cuda.manual_seed(seed)
        yield


def _seeded_state(seed: int, like: Tensor | torch.Generator) -> Tensor | torch.Generator:
    """A state of the tracker, in the form of the one that it replaces: Transformer Engine's tracker
    (`--te-rng-tracker`) has generators, and Megatron's own their contents."""
    if isinstance(like, torch.Generator):
        # A copy: the tracker's own goes on where it is after the block.
        return like.clone_state().manual_seed(seed)
    torch.cuda.manual_seed(seed)
    return torch.cuda.get_rng_state()


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
