"""Every parallel layout trains the same model: losses and accuracies of all exits, step for step.

Each model is saved once by one process; from that checkpoint all layouts, one process among them,
train on the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

from tests.helpers.training_runs import Run, train, write_documents  # noqa: E402
from tests.helpers.warm_ranks import WarmRanks  # noqa: E402

STEPS = 10
LEARNING_RATE = 2e-2
"""So high that every head learns something in these steps."""
BOUND = 1e-4

MODELS = {
    # Both exits tied to the embedding, which the last stage holds too.
    "tied": "--exit-layer-nums 2 3 --use-exit-norm",
    # A final projection of its own: exits need copies of the embedding on every later stage.
    "copies": "--untie-embeddings-and-output-weights --exit-layer-nums 1 2 3 4",
    "untied": (
        "--untie-embeddings-and-output-weights --untie-exit-output-weights --exit-layer-nums 1 3 "
        "--use-exit-norm --use-exit-mlp --exit-layer-weight 0.5 1.5 --exit-layer-temperature 2 0.5 "
        "--use-dynamic-exit-layer-weight"
    ),
    # Exits need copies of the final norm and the output layer on every earlier stage.
    "final-head": (
        "--untie-embeddings-and-output-weights --share-final-head --exit-layer-nums 1 2 3 4"
    ),
    "gates": (
        "--exit-layer-nums 2 3 --use-exit-norm --use-exit-gate --eval-interval 4 --eval-iters 2"
    ),
    "blocks": "--exit-layer-nums 1 2 --use-exit-block --use-exit-norm --exit-layer-weight 0.3 0.7",
    # In each iteration some exits are left out, on some stages all.
    "turns": (
        "--untie-embeddings-and-output-weights --exit-layer-nums 1 2 3 --use-exit-norm "
        "--exit-curriculum rotational --exit-curriculum-period 2 --exit-loss-scale 2 "
        "--use-exit-gate"
    ),
    # A head that looks further ahead, on the last stage, which needs an embedding for it.
    "ahead": (
        "--exit-layer-nums 2 3 --use-exit-norm --mtp-num-layers 2 --mtp-use-repeated-layer "
        "--mtp-loss-scaling-factor 1 --layer-dropout 0.3"
    ),
    "ahead-untied": (
        "--untie-embeddings-and-output-weights --exit-layer-nums 1 2 3 4 --mtp-num-layers 1"
    ),
    # Layers that sequences skip, and tokens that leave early.
    "held": (
        "--exit-layer-nums 1 2 3 --use-exit-norm --layer-dropout 0.5 --exit-propagate-prob 0.3 "
        "--use-exit-gate"
    ),
    "experts": (
        "--exit-layer-nums 1 3 --use-exit-norm --num-experts 4 --moe-router-topk 2 "
        "--moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall"
    ),
}


@dataclass
class Trainer:
    """Trains each model in any layout from the same checkpoint, and remembers one process's run."""

    ranks: WarmRanks
    folder: Path
    data: list[object]

    def __post_init__(self) -> None:
        self._references: dict[tuple[str, str], Run] = {}

    def save(self, model: str) -> Path:
        checkpoint = self.folder / f"checkpoint-{model}"
        if not checkpoint.exists():
            flags = [*MODELS[model].split(), "--train-iters", 1]
            flags += ["--save", checkpoint, "--save-interval", 1]
            train(self.ranks, self.folder / f"save-{model}", 1, [*self.data, *flags])
        return checkpoint

    def run(self, model: str, name: str, nproc: int, flags: str) -> Run:
        checkpoint = self.save(model)
        load = ["--load", checkpoint, "--no-load-optim", "--no-load-rng"]
        steps = ["--train-iters", STEPS + 1, "--lr", LEARNING_RATE]
        every = [*self.data, *MODELS[model].split(), *load, *steps, *flags.split()]
        run = train(self.ranks, self.folder / f"{model}-{name}", nproc, every)
        assert run.steps["lm loss"] == list(range(2, STEPS + 2))
        return run

    def reference(self, model: str, flags: str = "") -> Run:
        """What one process logs."""
        key = (model, flags)
        if key not in self._references:
            name = f"reference-{len(self._references)}"
            self._references[key] = self.run(model, name, 1, flags)
        return self._references[key]


@pytest.fixture(scope="module")
def trainer(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = tmp_path_factory.mktemp("layouts")
    return Trainer(ranks, folder, write_documents(folder))


def differences(found: Run, expected: Run) -> dict[str, float]:
    """The largest relative difference over the steps, of each figure that depends on training."""
    names = [
        name
        for name in expected.scalars
        if name in ("lm loss", "grad-norm")
        or name.removesuffix(" validation").endswith((" loss", " accuracy"))
    ]
    assert sum(name.startswith("exit ") for name in names) >= 4, names
    return {
        name: max(
            abs(a - b) / max(abs(b), 1e-6)
            for a, b in zip(found.scalars[name], expected.scalars[name], strict=True)
        )
        for name in names
    }


def check_learning(run: Run) -> None:
    """The runs are worth comparing: every head has learnt something."""
    for name, values in run.scalars.items():
        if " gate " in name:
            # What exits agree on with the final head changes as fast as gates learn it; one that
            # learnt nothing would stay undecided.
            assert " loss" not in name or abs(values[-1] - math.log(2)) > 1e-3, name
            continue
        if name.endswith(" loss"):
            assert values[-1] < values[0] - 0.3, name
        if name.endswith(" accuracy"):
            assert values[-1] > values[0], name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layout" in metafunc.fixturenames:
        metafunc.parametrize("layout", LAYOUTS, ids=[f"{one.model}-{one.name}" for one in LAYOUTS])


@dataclass(frozen=True)
class Layout:
    """`flags` describe the layout; `objective` flags are given to the one process as well."""

    model: str
    name: str
    nproc: int
    flags: str
    objective: str = ""


PP, TP = "--pipeline-model-parallel-size", "--tensor-model-parallel-size"
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
VPP = "--num-layers-per-virtual-pipeline-stage"
SHARDED = "--use-distributed-optimizer"
OVERLAP = "--overlap-grad-reduce --ddp-bucket-size 2000"
GATHER = f"{SHARDED} {OVERLAP} --overlap-param-gather"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
PER_TOKEN = "--calculate-per-token-loss"

LAYOUTS = [
    Layout("tied", "pp2", 2, f"{PP} 2"),
    Layout("tied", "tp2", 2, f"{TP} 2"),
    Layout("tied", "tp2-sp", 2, f"{TP} 2 --sequence-parallel"),
    Layout("tied", "pp2-vpp2", 2, f"{PP} 2 {VPP} 1"),
    Layout("tied", "pp4", 4, f"{PP} 4"),
    Layout("tied", "dp2-sharded", 2, SHARDED),
    Layout("tied", "tp2-pp2", 4, f"{TP} 2 {PP} 2"),
    Layout("tied", "pp2-pre-exit", 2, f"{PP} 2 --pre-exit --exit-layer-nums 3 4"),
    Layout("tied", "pp2-recompute", 2, f"{PP} 2 {RECOMPUTE}"),
    Layout("tied", "dp2-gather", 2, GATHER, PER_TOKEN),
    Layout("copies", "pp4", 4, f"{PP} 4"),
    Layout("copies", "pp2-vpp2-dp2-overlap", 4, f"{PP} 2 {VPP} 1 {OVERLAP}"),
    Layout("copies", "pp2-vpp2-dp2-gather", 4, f"{PP} 2 {VPP} 1 {GATHER}"),
    Layout("final-head", "tp2-sp-pp2", 4, f"{TP} 2 {PP} 2 --sequence-parallel {RECOMPUTE}"),
    Layout("final-head", "pp2-vpp2-dp2-gather", 4, f"{PP} 2 {VPP} 1 {GATHER}"),
    Layout("untied", "pp4", 4, f"{PP} 4", PER_TOKEN),
    Layout("untied", "tp2-sp", 2, f"{TP} 2 --sequence-parallel"),
    Layout("untied", "pp2-dp2-gather", 4, f"{PP} 2 {GATHER}", PER_TOKEN),
    Layout("gates", "tp2-recompute", 2, f"{TP} 2 {RECOMPUTE}"),
    Layout("gates", "tp2-sp", 2, f"{TP} 2 --sequence-parallel"),
    Layout("gates", "dp2-gather", 2, GATHER, PER_TOKEN),
    Layout("gates", "pp2-vpp2", 2, f"{PP} 2 {VPP} 1"),
    Layout("gates", "pp4", 4, f"{PP} 4"),
    Layout("blocks", "tp2-sp-pp2", 4, f"{TP} 2 {PP} 2 --sequence-parallel"),
    Layout("blocks", "pp2-dp2-recompute", 4, f"{PP} 2 {RECOMPUTE} {OVERLAP}"),
    Layout("turns", "pp2-vpp2-dp2-gather", 4, f"{PP} 2 {VPP} 1 {GATHER}"),
    Layout("turns", "tp2-sp-dp2-overlap", 4, f"{TP} 2 --sequence-parallel {OVERLAP}", PER_TOKEN),
    Layout("ahead", "pp2", 2, f"{PP} 2"),
    Layout("ahead", "tp2-sp", 2, f"{TP} 2 --sequence-parallel"),
    Layout("ahead-untied", "pp2-vpp2-dp2-gather", 4, f"{PP} 2 {VPP} 1 {GATHER}"),
    Layout("held", "tp2-sp-pp2-recompute", 4, f"{TP} 2 {PP} 2 --sequence-parallel {RECOMPUTE}"),
    Layout("held", "pp2-vpp2-dp2-gather", 4, f"{PP} 2 {VPP} 1 {GATHER}"),
    Layout("experts", "pp2", 2, f"{PP} 2"),
    Layout("experts", "tp2-sp-ep2", 2, f"{TP} 2 --sequence-parallel {EP} 2 {ETP} 1"),
    Layout("experts", "dp2-ep2-gather", 2, f"{EP} 2 {GATHER}"),
]


def test_layout_trains_as_one_process(trainer: Trainer, layout: Layout):
    expected = trainer.reference(layout.model, layout.objective)
    check_learning(expected)
    flags = f"{layout.flags} {layout.objective}"
    found = trainer.run(layout.model, layout.name, layout.nproc, flags)
    apart = differences(found, expected)
    print(layout.model, layout.name, apart)
    assert max(apart.values()) < BOUND, apart
    is_validated = "exit 2 gate AUC validation" in expected.scalars
    assert is_validated == ("--eval-iters" in MODELS[layout.model])
    for name in [name for name in expected.scalars if " AUC" in name]:
        # Confidences at the edge of a bin change it by a few pairs.
        assert found.scalars[name] == pytest.approx(expected.scalars[name], abs=2e-3), name


@pytest.mark.parametrize(
    ("precision", "bound"),
    [
        ("--bf16", 0.05),
        ("--bf16 --accumulate-allreduce-grads-in-fp32", 0.05),
        ("--fp16 --initial-loss-scale 65536", 0.02),
    ],
    ids=["bf16", "bf16-fp32-gradients", "fp16"],
)
def test_half_precision_follows_full_precision(trainer: Trainer, precision: str, bound: float):
    name = precision.replace(" ", "").replace("--", "-")
    flags = f"{PP} 2 {SHARDED} {precision}"
    found = trainer.run("tied", f"pp2{name}", 2, flags)
    apart = differences(found, trainer.reference("tied"))
    losses = {name: value for name, value in apart.items() if name.endswith(" loss")}
    print(precision, apart)
    assert max(losses.values()) < bound, losses
