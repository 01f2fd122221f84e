"""EE-Tuning: every layout tunes the same exits, the backbone stays as it is, stopped runs go on.

One model is trained by one process; all runs tune exits on it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.checkpoint.base import is_of_exit  # noqa: E402
from megatron.early_exit.checkpoint.description import read_description  # noqa: E402
from megatron.early_exit.checkpoint.location import locate  # noqa: E402
from megatron.early_exit.checkpoint.reader import CheckpointReader  # noqa: E402
from megatron.early_exit.checkpoint.source import open_checkpoint  # noqa: E402
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams  # noqa: E402
from tests.helpers.training_runs import (  # noqa: E402
    BACKBONE,
    GLOBAL_BATCH,
    SCHEDULE,
    TOKENIZER,
    VOCAB,
    Run,
    train,
    write_documents,
)
from tests.helpers.warm_ranks import ENTRY, WarmRanks  # noqa: E402

STEPS = 10
BOUND = 1e-4
EXITS = {
    "tied": "--exit-layer-nums 3 4 --use-exit-norm",
    "untied": (
        "--exit-layer-nums 1 2 --use-exit-norm --use-exit-mlp --untie-exit-output-weights "
        "--exit-layer-weight 0.5 1.5 --exit-layer-lr 5e-3 1e-3 --use-dynamic-exit-layer-weight"
    ),
    "blocks": (
        "--exit-layer-nums 1 4 --use-exit-block --use-exit-norm --untie-exit-output-weights "
        "--freeze-exit-output-weights --calculate-per-token-loss --use-exit-gate"
    ),
    # The second of two stages has no exit.
    "early": "--exit-layer-nums 1 --use-exit-norm --calculate-per-token-loss",
    "taught": (
        "--exit-layer-nums 1 2 --use-exit-mlp --use-exit-norm --exit-distillation-weight 0.7 "
        "--exit-distillation-temperature 2 --use-exit-gate"
    ),
    # Nothing is tuned but the gates. Evaluations between the steps change nothing.
    "gates": (
        "--exit-layer-nums 1 3 --share-final-head --use-exit-gate --eval-interval 3 --eval-iters 2"
    ),
    # No exit, and a layer that is fed its own outputs.
    "ahead": (
        "--mtp-num-layers 2 --mtp-use-repeated-layer --exit-distillation-weight 0.7 "
        "--calculate-per-token-loss"
    ),
    "ahead-beside": "--exit-layer-nums 2 --use-exit-norm --mtp-num-layers 2 --random-init",
}


@dataclass(frozen=True)
class Layout:
    exits: str
    name: str
    nproc: int
    flags: str


LAYOUTS = [
    Layout("tied", "pp2", 2, "--pipeline-model-parallel-size 2"),
    Layout(
        *("tied", "pp2-dp2", 4),
        "--pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
    Layout("untied", "tp2", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    Layout("untied", "dp2", 2, "--use-distributed-optimizer"),
    Layout(
        *("untied", "pp4of2", 2),
        "--pipeline-model-parallel-size 4 --tune-exit-pipeline-parallel-size 2",
    ),
    Layout(
        *("blocks", "tp2-pp2", 4),
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    ),
    Layout("taught", "tp2", 2, "--tensor-model-parallel-size 2"),
    Layout("gates", "tp2-sp", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    Layout("gates", "pp4", 4, "--pipeline-model-parallel-size 4"),
    Layout("ahead", "tp2-sp", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    Layout(
        "ahead-beside", "dp2", 2, "--use-distributed-optimizer --eval-interval 3 --eval-iters 1"
    ),
    Layout("early", "pp2", 2, "--pipeline-model-parallel-size 2 --eval-interval 3 --eval-iters 1"),
]


class Tuner:
    """Tunes exits of one model, and remembers what one process does."""

    def __init__(self, ranks: WarmRanks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        # All tokens of the data are of the vocabulary: what is beyond it is not loaded.
        self.data = [*write_documents(folder), "--vocab-size", VOCAB]
        self.base = folder / "base"
        flags = [*self.data, "--train-iters", 60, "--save", self.base, "--save-interval", 60]
        train(ranks, folder / "base-run", 1, flags)
        self._references: dict[str, Run] = {}

    def tune(self, name: str, nproc: int, exits: str, *flags: object) -> Run:
        """Its checkpoints are in `checkpoints` of the run's folder."""
        folder = self.folder / name
        save = ["--save", folder / "checkpoints", "--save-interval", STEPS // 2]
        every = [*self.data, "--tune-exit", *EXITS[exits].split(), "--train-iters", STEPS, *save]
        return train(self.ranks, folder, nproc, [*every, *flags])

    def reference(self, exits: str) -> Run:
        if exits not in self._references:
            run = self.tune(f"{exits}-one", 1, exits, "--load", self.base)
            self._references[exits] = run
        return self._references[exits]

    def refuse(self, nproc: int, *flags: object) -> str:
        """The error of a run that has to end with one."""
        command = [ENTRY, *BACKBONE, *TOKENIZER, *SCHEDULE, *self.data, "--train-iters", 1, *flags]
        done = self.ranks.run([str(one) for one in command], nproc, self.folder / "refused")
        assert done.returncode == 2, done.stdout[-3000:]
        assert "Traceback" not in done.stdout
        errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert len(set(errors)) == 1
        return errors[0]


@pytest.fixture(scope="module")
def tuner(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Tuner:
    return Tuner(ranks, tmp_path_factory.mktemp("tuning"))


def exit_figures(run: Run) -> dict[str, list[float]]:
    return {
        name: values
        for name, values in run.scalars.items()
        if name == "grad-norm" or name.endswith((" loss", " accuracy"))
    }


def assert_same(found: Run, expected: Run) -> None:
    figures = exit_figures(expected)
    counted = sum(name.endswith(" loss") for name in figures)
    assert counted > 0
    assert len(figures) == 1 + 2 * counted, figures.keys()
    for name, values in figures.items():
        assert found.scalars[name] == pytest.approx(values, rel=BOUND), name
    for name, values in expected.scalars.items():
        if name.endswith(" validation"):
            # Confidences at the edge of a bin change an AUC by a few pairs.
            bounds = {"abs": 2e-3} if " AUC " in name else {"rel": BOUND}
            assert found.scalars[name] == pytest.approx(values, **bounds), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: f"{one.exits}-{one.name}")
def test_layout_tunes_as_one_process(tuner: Tuner, layout: Layout):
    expected = tuner.reference(layout.exits)
    name = f"{layout.exits}-{layout.name}"
    found = tuner.tune(
        name, layout.nproc, layout.exits, "--load", tuner.base, *layout.flags.split()
    )
    assert_same(found, expected)
    for figure, values in exit_figures(found).items():
        # What gates learn changes while heads are tuned.
        is_fixed = (" gate " in figure) == (layout.exits == "gates")
        if figure.endswith(" loss") and is_fixed:
            assert values[-1] < values[0], figure


def test_gates_are_saved_alone_and_asked(tuner: Tuner):
    run = tuner.reference("gates")
    for name in [f"exit {n} gate AUC{end}" for n in (1, 3) for end in ("", " validation")]:
        assert all(0 <= value <= 1 for value in run.scalars[name])
    path = tuner.folder / "gates-one" / "checkpoints"
    reader = CheckpointReader(locate(path).iteration_dir)
    own = {name for name in reader.tensors if not name.startswith("optimizer.")}
    gates = {f"exits.{n}.gate.{name}" for n in (1, 3) for name in ("weight", "bias")}
    assert own == {"tuning_anchor", *gates}
    assert all(reader.read(name).any() for name in gates)
    engine = EarlyExitEngine.from_checkpoint(path)
    params = SamplingParams(
        mode="early_exit", exit_measure="gate", early_exit_threshold=0.0, max_tokens=4
    )
    assert engine.generate([[3, 4, 5, 6]], params)[0].exit_layers == [1] * 4


def test_what_is_saved_are_the_exits(tuner: Tuner):
    """And together with the base, untouched, they are a model."""
    tuner.reference("untied")
    path = tuner.folder / "untied-one" / "checkpoints"
    reader = CheckpointReader(locate(path).iteration_dir)
    own = {name for name in reader.tensors if not name.startswith("optimizer.")}
    assert {name for name in own if not is_of_exit(name)} == {"tuning_anchor"}
    of_optimizer = {name.split(".", 3)[-1] for name in reader.tensors.keys() - own}
    assert of_optimizer == own
    description = read_description(path)
    assert description.architecture is not None
    assert description.architecture.num_layers == 4
    base, tuned = open_checkpoint(tuner.base), open_checkpoint(path)
    for name, tensor in base.weights.items():
        assert torch.equal(tuned.weights[name].read(), tensor.read()), name
    engine = EarlyExitEngine.from_checkpoint(path)
    full = SamplingParams(mode="full", max_tokens=8)
    plain = EarlyExitEngine.from_checkpoint(tuner.base)
    prompt = [[3, 4, 5, 6]]
    assert engine.generate(prompt, full)[0].token_ids == plain.generate(prompt, full)[0].token_ids
    early = SamplingParams(mode="early_exit", early_exit_threshold=0.0, max_tokens=8)
    assert set(engine.generate(prompt, early)[0].exit_layers) == {1}


def test_fresh_exits_are_copies(tuner: Tuner):
    """An exit that follows the last layer, with copies of its MLP and of the final norm, starts
    with the model's own loss."""
    flags = ["--exit-layer-nums", 4, "--use-exit-mlp", "--use-exit-norm"]
    flags += ["--train-iters", 1, "--lr", 1e-9]
    run = train(
        tuner.ranks,
        tuner.folder / "copied",
        1,
        [*tuner.data, "--tune-exit", *flags, "--load", tuner.base],
    )
    plain = [*tuner.data, "--train-iters", 1, "--lr", 1e-9, "--load", tuner.base, "--finetune"]
    model = train(tuner.ranks, tuner.folder / "copied-from", 1, plain)
    assert run.scalars["exit 4 loss"] == pytest.approx(model.scalars["lm loss"], rel=1e-6)


def test_a_look_ahead_head_that_is_there_is_tuned(tuner: Tuner):
    """Its loss is the one that Megatron logs of the model, and none of its layers may be lost."""
    head = ["--mtp-num-layers", 2, "--micro-batch-size", GLOBAL_BATCH]
    base, folder = tuner.folder / "looking-ahead", tuner.folder / "there"
    flags = [*tuner.data, *head, "--train-iters", 10, "--save", base, "--save-interval", 10]
    train(tuner.ranks, folder / "base-run", 1, flags)
    one = [*tuner.data, "--load", base, "--train-iters", 1, "--lr", 1e-9]
    plain = train(tuner.ranks, folder / "plain", 1, [*one, *head, "--finetune"])
    save = ["--save", folder / "checkpoints", "--save-interval", 1]
    run = train(tuner.ranks, folder / "run", 1, [*one, *head, "--tune-exit", *save])
    for depth in (1, 2):
        expected = plain.scalars[f"mtp_{depth} loss"]
        assert run.scalars[f"mtp {depth} loss"] == pytest.approx(expected, rel=1e-5)
    tuned = open_checkpoint(folder / "checkpoints")
    assert tuned.weights.keys() == open_checkpoint(base).weights.keys()
    error = tuner.refuse(1, *one, "--mtp-num-layers", 1, "--tune-exit")
    assert error.startswith("error: --mtp-num-layers 1 is out of range, allowed: 2 or more")


@pytest.mark.parametrize("exits", ["tied", "untied"])
def test_a_run_that_was_stopped_goes_on(tuner: Tuner, exits: str):
    """In another layout, and with the model somewhere else."""
    expected = tuner.reference(exits)
    name = f"{exits}-stopped"
    moved = tuner.folder / f"{name}-base"
    shutil.copytree(tuner.base, moved)
    load = ["--pretrained-checkpoint", moved, "--load", tuner.folder / name / "checkpoints"]
    tuner.tune(name, 1, exits, *load, "--exit-interval", STEPS // 2)
    moved = moved.rename(f"{moved}-2")
    load[1] = moved
    parallel = ["--pipeline-model-parallel-size", 2, "--tensorboard-dir", tuner.folder / "again"]
    found = tuner.tune(name, 2, exits, *load, *parallel)
    assert f"iteration {STEPS // 2:8d}/" not in found.output
    last = exit_figures(expected)
    line = [line for line in found.output.splitlines() if f"iteration {STEPS:8d}/" in line][-1]
    for position in EXITS[exits].split()[1:3]:
        value = float(line.split(f"exit {position} loss: ")[1].split()[0])
        assert value == pytest.approx(last[f"exit {position} loss"][-1], rel=BOUND)


def test_a_look_ahead_head_is_tuned_on(tuner: Tuner):
    """In another layout, with flags from the checkpoint; the base stays as it is."""
    expected = tuner.reference("ahead")
    own = ["--exit-distillation-weight", 0.7, "--calculate-per-token-loss"]
    folder = tuner.folder / "ahead-stopped"
    start = ["--load", tuner.base, "--use-checkpoint-args", "--exit-interval", STEPS // 2]
    tuner.tune("ahead-stopped", 1, "ahead", *start)
    go_on = [*tuner.data, "--tune-exit", *own, "--train-iters", STEPS, "--use-checkpoint-args"]
    go_on += ["--load", folder / "checkpoints", "--save", folder / "checkpoints"]
    found = train(tuner.ranks, folder / "again", 2, [*go_on, "--save-interval", STEPS])
    figures = exit_figures(expected)
    assert len(figures) == 5
    for name, values in figures.items():
        assert found.scalars[name] == pytest.approx(values[STEPS // 2 :], rel=BOUND), name
    base, tuned = open_checkpoint(tuner.base), open_checkpoint(folder / "checkpoints")
    architecture = tuned.description.architecture
    assert architecture is not None
    assert (architecture.mtp_num_layers, architecture.mtp_use_repeated_layer) == (2, True)
    for name, tensor in base.weights.items():
        assert torch.equal(tuned.weights[name].read(), tensor.read()), name
    reader = CheckpointReader(locate(folder / "checkpoints").iteration_dir)
    own_names = {name for name in reader.tensors if not name.startswith("optimizer.")}
    assert own_names == {"tuning_anchor", *(tuned.weights.keys() - base.weights.keys())}


def test_another_model_is_refused(tuner: Tuner):
    tuner.reference("tied")
    exits = tuner.folder / "tied-one" / "checkpoints"
    other = tuner.folder / "other"
    flags = [*tuner.data, "--train-iters", 1, "--save", other, "--save-interval", 1]
    train(tuner.ranks, tuner.folder / "other-run", 1, flags)
    load = ["--load", exits, "--pretrained-checkpoint", other]
    error = tuner.refuse(1, "--tune-exit", *EXITS["tied"].split(), *load)
    assert "is not the one that the exits were tuned on" in error
    error = tuner.refuse(1, *EXITS["tied"].split(), "--load", exits)
    assert "holds exits only: give --tune-exit to go on tuning them" in error
    error = tuner.refuse(1, "--tune-exit", *EXITS["tied"].split(), "--pretrained-checkpoint", exits)
    assert "holds exits only, allowed: the model that they were tuned on" in error
    converted = tuner.folder / "converted"
    open_checkpoint(tuner.base).write(converted)
    before = (converted / "early_exit_model.json").read_text()
    for load in (converted, tuner.base):
        save = ["--load", load, "--save", converted, "--save-interval", 1]
        error = tuner.refuse(1, "--tune-exit", *EXITS["tied"].split(), *save)
        assert f"--save {converted} holds checkpoints, and this run does not continue them" in error
        assert error.endswith("write over them: save to another directory")
    assert (converted / "early_exit_model.json").read_text() == before
    error = tuner.refuse(
        *(1, "--tune-exit", *EXITS["tied"].split(), "--load", tuner.base),
        *("--save", tuner.base, "--save-interval", 1),
    )
    assert error.endswith("write over them: save to another directory")
