"""The lists of the standard schedules are what Megatron's own schedules do."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

from megatron.early_exit.schedules.generators import Interleaved, OneFOneB


def num_warmup(rank: int, ranks: int, microbatches: int, chunks: int | None) -> int:
    """Megatron's own number."""
    group = SimpleNamespace(size=lambda: ranks, rank=lambda: rank)
    communicator = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=chunks)
    _, _, warmup, _ = get_pp_rank_microbatches(
        microbatches, chunks or 1, ranks, p2p_communicator=communicator
    )
    return warmup


def one_f_one_b(forwards: list[str], backwards: list[str], warmup: int) -> list[str]:
    """Both of Megatron's schedules: forwards, then one of each, then backwards."""
    steady = [step for pair in zip(forwards[warmup:], backwards, strict=False) for step in pair]
    return [*forwards[:warmup], *steady, *backwards[len(forwards) - warmup :]]


@settings(max_examples=30)
@given(st.integers(2, 16), st.integers(1, 64))
def test_1f1b_is_megatrons(ranks, microbatches):
    schedule = OneFOneB(num_ranks=ranks, num_microbatches=microbatches).build()
    for rank in range(ranks):
        forwards = [f"{rank}F{i}" for i in range(microbatches)]
        backwards = [f"{rank}B{i}" for i in range(microbatches)]
        expected = one_f_one_b(forwards, backwards, num_warmup(rank, ranks, microbatches, None))
        assert [str(action) for action in schedule.ranks[rank]] == expected


@settings(max_examples=20)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 4))
def test_interleaved_schedule_is_megatrons(ranks, groups, chunks):
    microbatches = groups * ranks
    schedule = Interleaved(num_ranks=ranks, num_microbatches=microbatches, num_chunks=chunks)
    table = get_schedule_table(microbatches, chunks, ranks)
    for rank in range(ranks):
        forwards = [f"{chunk * ranks + rank}F{i}" for i, chunk in table]
        backwards = [f"{(chunks - 1 - chunk) * ranks + rank}B{i}" for i, chunk in table]
        expected = one_f_one_b(forwards, backwards, num_warmup(rank, ranks, microbatches, chunks))
        assert [str(action) for action in schedule.build().ranks[rank]] == expected
