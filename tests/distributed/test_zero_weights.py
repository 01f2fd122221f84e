"""Exits whose losses have no weight change nothing: the final losses are bitwise stock Megatron's.

The stock runs use Megatron's own model class, builder, schedules and loss function, with the same
layers and seed. Dropout is on, so that an exit which drew from the backbone's random numbers, when
it is built or when it runs, would show."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

from tests.helpers.training_runs import LAYERS, Run, train, write_documents  # noqa: E402
from tests.helpers.warm_ranks import ENTRY, WarmRanks  # noqa: E402

STOCK = Path(__file__).with_name("stock_gpt.py")
STEPS = 6
DROPOUT = ["--hidden-dropout", 0.1, "--attention-dropout", 0.1]

PP2 = "--pipeline-model-parallel-size 2"
TP2 = "--tensor-model-parallel-size 2"


@dataclass
class Runs:
    """Stock runs are remembered by their layout."""

    ranks: WarmRanks
    folder: Path
    data: list[object]
    _stock: dict[str, Run] = field(default_factory=dict)
    _count: int = 0

    def train(self, script: Path, flags: str) -> Run:
        self._count += 1
        nproc = 2 if "parallel-size 2" in flags else 1
        common = [*self.data, *DROPOUT, "--train-iters", STEPS, *flags.split()]
        return train(self.ranks, self.folder / str(self._count), nproc, common, script)

    def stock(self, layout: str) -> Run:
        if layout not in self._stock:
            self._stock[layout] = self.train(STOCK, layout)
        return self._stock[layout]


@pytest.fixture(scope="module")
def runs(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("zero")
    return Runs(ranks, folder, write_documents(folder))


@pytest.mark.parametrize("layout", ["", PP2, TP2], ids=["1", "pp2", "tp2"])
def test_without_exits_the_entry_point_is_stock_megatron(runs: Runs, layout: str):
    stock, plain = runs.stock(layout), runs.train(ENTRY, layout)
    assert not [name for name in plain.scalars if "exit" in name]
    for name in ("lm loss", "grad-norm"):
        assert len(stock.scalars[name]) == STEPS
        assert plain.scalars[name] == stock.scalars[name]


HEADS = {
    "plain": "--exit-layer-nums 1 3",
    "pre-exit-norm-block": "--exit-layer-nums 2 4 --pre-exit --use-exit-norm --use-exit-block",
    "everything": (
        "--exit-layer-nums 1 2 4 --use-exit-norm --use-exit-mlp --use-exit-block "
        "--untie-exit-output-weights --use-dynamic-exit-layer-weight"
    ),
}
SEQUENCE_PARALLEL = f"{TP2} --sequence-parallel"


@pytest.mark.parametrize(
    ("layout", "heads"),
    [
        ("", "plain"),
        ("", "pre-exit-norm-block"),
        ("", "everything"),
        (PP2, "everything"),
        (TP2, "everything"),
        (SEQUENCE_PARALLEL, "everything"),
    ],
)
def test_weightless_exits_change_nothing(runs: Runs, layout: str, heads: str):
    flags = HEADS[heads]
    count = sum(word.isdigit() and int(word) <= LAYERS for word in flags.split())
    weights = " ".join(["0.0"] * count)
    found = runs.train(ENTRY, f"{layout} {flags} --exit-layer-weight {weights}")
    stock = runs.stock(layout)
    assert found.scalars["lm loss"] == stock.scalars["lm loss"]
    assert (
        sum(name.startswith("exit ") and name.endswith(" loss") for name in found.scalars) == count
    )


def test_the_comparison_would_notice(runs: Runs):
    flags = f"{HEADS['plain']} --exit-layer-weight 1e-3 1e-3"
    assert runs.train(ENTRY, flags).scalars["lm loss"] != runs.stock("").scalars["lm loss"]
