"""Generators of pipeline schedules for property tests, and the files of small ones."""

from pathlib import Path

from hypothesis import strategies as st

from megatron.early_exit.schedules.generators import (
    FilledOneFOneB,
    Generator,
    Interleaved,
    OneFOneB,
    Tuning,
    ZeroBubbleH1,
    max_fills,
)

GOLDEN = Path(__file__).parents[1] / "unit" / "schedules" / "golden"

# Read by eye when they were written: each is a picture of its schedule.
SMALL: dict[str, Generator] = {
    "1f1b": OneFOneB(num_ranks=4, num_microbatches=6),
    "1f1b_filled": FilledOneFOneB(num_ranks=4, num_microbatches=6, backward_forward_ratio=2.0),
    "interleaved": Interleaved(num_ranks=2, num_microbatches=4, num_chunks=2),
    "zero_bubble_h1": ZeroBubbleH1(num_ranks=4, num_microbatches=6),
    "ee_tuning": Tuning(num_ranks=4, num_microbatches=3, exit_stages=frozenset({0, 2})),
    "ee_tuning_gates": Tuning(
        num_ranks=4, num_microbatches=5, exit_stages=frozenset({0, 1, 3}), learns_from_last=True
    ),
}

ratios = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0]), st.floats(0.5, 4.0))
num_ranks = st.integers(1, 16)
num_microbatches = st.integers(1, 64)


@st.composite
def filled(draw: st.DrawFn) -> FilledOneFOneB:
    """1F1B with any number of the fills that fit."""
    ranks, ratio = draw(num_ranks), draw(ratios)
    fills = st.integers(0, max_fills(ranks, ratio))
    return FilledOneFOneB(
        num_ranks=ranks,
        num_microbatches=draw(num_microbatches),
        backward_forward_ratio=ratio,
        num_warmup_fills=draw(fills),
        num_cooldown_fills=draw(fills),
    )


@st.composite
def overfilled(draw: st.DrawFn) -> FilledOneFOneB:
    """1F1B with any number of fills and exits on any stages."""
    ranks = draw(num_ranks)
    exit_stages = draw(st.frozensets(st.integers(0, ranks - 1)))
    reachable = [s for s in exit_stages if s < ranks - 1]
    places = ranks - 1 - min(reachable) if reachable else 0
    return FilledOneFOneB(
        num_ranks=ranks,
        num_microbatches=draw(num_microbatches),
        backward_forward_ratio=draw(ratios),
        num_warmup_fills=draw(st.integers(0, places)),
        num_cooldown_fills=draw(st.integers(0, ranks - 1)),
        exit_stages=exit_stages,
    )


@st.composite
def interleaved(draw: st.DrawFn) -> Interleaved:
    """Interleaved schedules of up to four chunks."""
    ranks = draw(st.integers(2, 16))
    groups = draw(st.integers(1, 64 // ranks))
    return Interleaved(
        num_ranks=ranks, num_microbatches=groups * ranks, num_chunks=draw(st.integers(1, 4))
    )


@st.composite
def tuning(draw: st.DrawFn) -> Tuning:
    """EE-Tuning with exits on any stages."""
    ranks = draw(num_ranks)
    stages = draw(st.frozensets(st.integers(0, ranks - 1), min_size=1))
    return Tuning(
        num_ranks=ranks,
        num_microbatches=draw(num_microbatches),
        exit_stages=stages,
        learns_from_last=draw(st.booleans()),
    )


generators = st.one_of(
    st.builds(OneFOneB, num_ranks=num_ranks, num_microbatches=num_microbatches),
    filled(),
    overfilled(),
    interleaved(),
    st.builds(ZeroBubbleH1, num_ranks=num_ranks, num_microbatches=num_microbatches),
    tuning(),
)


def limits(generator: Generator) -> list[int]:
    """The largest number of activations that the generator allows on each rank."""
    return [generator.activation_limit(rank) for rank in range(generator.num_ranks)]
