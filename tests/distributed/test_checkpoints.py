"""Checkpoints load in any layout, with other exits, and without the command line that made them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402

from megatron.early_exit.checkpoint.reader import CheckpointReader  # noqa: E402
from tests.helpers.training_runs import (  # noqa: E402
    BACKBONE,
    SCHEDULE,
    TOKENIZER,
    VOCAB,
    Run,
    read_events,
    train,
    write_documents,
)
from tests.helpers.warm_ranks import ENTRY, WarmRanks  # noqa: E402

STOCK = Path(__file__).with_name("stock_gpt.py")
PP, TP = "--pipeline-model-parallel-size", "--tensor-model-parallel-size"
VPP = "--num-layers-per-virtual-pipeline-stage"
OWN_PROJECTION = "--untie-embeddings-and-output-weights"
HEADS = "--use-exit-norm --use-exit-mlp --untie-exit-output-weights"
# Drawn anew in each microbatch, from a state that no checkpoint has.
HELD = "--layer-dropout 0.9 --layer-dropout-schedule exponential --exit-propagate-prob 0.2"
# A step that changes nothing, so that what was loaded can be read in what is saved.
STANDSTILL = "--train-iters 1 --save-interval 1 --lr 0"


@dataclass
class Runner:
    """Runs tiny models and remembers where they saved."""

    ranks: WarmRanks
    folder: Path
    data: list[object]

    def __call__(self, name: str, flags: str, nproc: int = 1, script: Path = ENTRY) -> Run:
        every = ["--mock-data"] if script == STOCK else self.data
        every = [*every, *flags.format(folder=self.folder).split()]
        return train(self.ranks, self.folder / "runs" / name, nproc, every, script)

    def tensors(self, name: str, iteration: int) -> dict[str, torch.Tensor]:
        """Everything in a checkpoint."""
        reader = CheckpointReader(self.folder / name / f"iter_{iteration:07d}")
        return {tensor: reader.read(tensor) for tensor in reader.tensors}

    def refusal(
        self, name: str, flags: str, nproc: int = 1, base: list[object] | None = None
    ) -> str:
        """The one line that a run says before it ends with status 2."""
        base = [*BACKBONE, *TOKENIZER, *SCHEDULE] if base is None else base
        command = [ENTRY, *base, *self.data, *flags.format(folder=self.folder).split()]
        folder = self.folder / "runs" / name
        done = self.ranks.run(list(map(str, command)), nproc, folder)
        lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2, done.stdout[-3000:]
        assert "Traceback" not in done.stdout
        assert len(lines) == 1, lines
        return lines[0]


@pytest.fixture(scope="module")
def run(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    folder = tmp_path_factory.mktemp("checkpoints")
    return Runner(ranks, folder, write_documents(folder))


def check_same(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    which: Callable[[str], bool] = lambda name: True,
) -> None:
    """The chosen tensors are the same, bit for bit."""
    assert [n for n in sorted(found) if which(n)] == [n for n in sorted(expected) if which(n)]
    differ = [n for n in expected if which(n) and not torch.equal(found[n], expected[n])]
    assert not differ, differ


def is_backbone(name: str) -> bool:
    return not name.startswith(("exits.", "optimizer."))


@dataclass(frozen=True)
class Journey:
    """A model that is handed on from layout to layout; (processes, flags) of each."""

    model: str
    legs: tuple[tuple[int, str], ...]


_POST, _PRE = "--exit-layer-nums 1 3", "--pre-exit --exit-layer-nums 4 2"
JOURNEYS = {
    "every-part": Journey(
        f"--exit-layer-nums 1 2 4 {HEADS} --use-exit-block {OWN_PROJECTION}",
        ((1, ""), (4, f"{TP} 2 {PP} 2"), (2, f"{PP} 2 {VPP} 1"), (1, "")),
    ),
    "tied-copies": Journey(
        f"--use-exit-norm {OWN_PROJECTION}",
        ((4, f"{PP} 4 {_POST}"), (2, f"{TP} 2 {_PRE}"), (2, f"{PP} 2 {VPP} 1 {_PRE}"), (1, _POST)),
    ),
    "sharded-optimizer": Journey(
        f"--share-final-head {OWN_PROJECTION} --use-distributed-optimizer --overlap-grad-reduce",
        ((2, _POST), (2, f"{TP} 2 {_PRE}"), (4, f"{PP} 2 {_PRE}"), (1, _POST)),
    ),
}


@pytest.mark.parametrize("name", JOURNEYS)
def test_what_one_layout_saved_any_other_loads(run: Runner, name: str):
    journey = JOURNEYS[name]
    (nproc, layout), *others = journey.legs
    here = "{folder}/" + f"{name}-0"
    every = f"{journey.model} --train-iters 2"
    run(f"{name}-0", f"{every} {layout} --save {here} --save-interval 2", nproc)
    saved = run.tensors(f"{name}-0", 2)
    assert sum(tensor.startswith("optimizer.state.exp_avg.") for tensor in saved) > 8
    for leg, (nproc, layout) in enumerate(others, start=1):
        there = "{folder}/" + f"{name}-{leg}"
        # Nothing is left to train: what was loaded, optimizer included, is saved at the end.
        flags = f"{every} {layout} --load {here} --save {there} --save-interval 1000"
        run(f"{name}-{leg}", flags, nproc)
        check_same(run.tensors(f"{name}-{leg}", 2), saved)
        here = there


def test_a_sharded_optimizer_goes_on_in_another_layout(run: Runner):
    every = "--exit-layer-nums 1 3 --use-exit-norm --use-distributed-optimizer --train-iters 6"
    whole = run("sharded-whole", f"{every} --save {{folder}}/sharded --save-interval 3", 2)
    resumed = run("sharded-resumed", f"{every} {TP} 2 --load {{folder}}/sharded --ckpt-step 3", 2)
    for loss in ("lm loss", "exit 1 loss", "exit 3 loss"):
        assert resumed.scalars[loss] == pytest.approx(whole.scalars[loss][3:], rel=1e-5)


def test_an_optimizer_saved_for_one_layout_is_refused_in_another(run: Runner):
    every = "--use-distributed-optimizer --train-iters 2"
    fixed = "--no-dist-ckpt-optim-fully-reshardable"
    run("fixed", f"{every} {fixed} --save {{folder}}/fixed --save-interval 2", 2)
    message = run.refusal("fixed-pp2", f"{every} {PP} 2 --load {{folder}}/fixed", 2)
    assert "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1" in message
    assert "--no-load-optim" in message
    message = run.refusal("fixed-plain", "--train-iters 2 --load {folder}/fixed")
    assert "was saved with --use-distributed-optimizer" in message


@pytest.fixture(scope="module")
def plain(run: Runner) -> dict[str, torch.Tensor]:
    """A checkpoint of Megatron's own training."""
    run("plain", "--train-iters 2 --save {folder}/plain --save-interval 2", script=STOCK)
    return run.tensors("plain", 2)


@pytest.mark.parametrize(
    ("name", "exits", "nproc", "layout"),
    [
        ("heads", f"--exit-layer-nums 1 3 {HEADS}", 2, f"{PP} 2"),
        ("tied", "--exit-layer-nums 2 4", 2, f"{PP} 2"),
        ("pre", "--pre-exit --exit-layer-nums 2 --use-exit-norm --use-exit-block", 1, ""),
    ],
)
def test_a_plain_checkpoint_is_the_backbone(
    run: Runner, plain: dict[str, torch.Tensor], name: str, exits: str, nproc: int, layout: str
):
    save = "{folder}/" + f"plain-{name}"
    flags = f"{exits} {layout} {STANDSTILL} --load {{folder}}/plain --save {save}"
    output = run(f"plain-{name}", flags, nproc).output
    saved = run.tensors(f"plain-{name}", 1)
    check_same(saved, plain, is_backbone)
    assert "not in it and start fresh; the rest is loaded" in output
    assert output.count("start anew at iteration 0 (as with --finetune)") == 1
    fresh = [tensor for name, tensor in saved.items() if name.startswith("exits.")]
    assert all(tensor.std() > 0 or torch.equal(tensor, torch.ones_like(tensor)) for tensor in fresh)
    assert bool(fresh) == (name != "tied")


def test_exits_that_a_checkpoint_lacks_start_fresh_and_others_are_kept(
    run: Runner, plain: dict[str, torch.Tensor]
):
    start = f"--exit-layer-nums 1 3 {HEADS} {STANDSTILL} --load {{folder}}/plain"
    run("two-exits", f"{start} --save {{folder}}/two-exits")
    two = run.tensors("two-exits", 1)

    other = f"--exit-layer-nums 1 2 {HEADS} {STANDSTILL} --load {{folder}}/two-exits"
    output = run("other-exits", f"{other} --save {{folder}}/other-exits {PP} 2", 2).output
    other_tensors = run.tensors("other-exits", 1)
    assert "layers 2 are not in it and start fresh" in output
    assert "layers 3 are in it but not in this run and are left out" in output
    check_same(other_tensors, two, lambda name: is_backbone(name) or name.startswith("exits.1."))
    assert any(name.startswith("exits.2.") for name in other_tensors)
    assert not any(name.startswith("exits.3.") for name in other_tensors)

    none = f"{STANDSTILL} --load {{folder}}/two-exits --save {{folder}}/no-exits"
    output = run("no-exits", none).output
    assert "layers 1, 3 are in it but not in this run and are left out" in output
    no_exits = run.tensors("no-exits", 1)
    check_same(no_exits, plain, is_backbone)
    assert not any("exits." in name for name in no_exits)

    run("stock-again", "--train-iters 1 --lr 0 --load {folder}/two-exits --finetune", script=STOCK)

    heads = "--exit-layer-nums 1 --use-exit-norm --train-iters 1 --load {folder}/two-exits"
    assert "another head" in run.refusal("other-heads", heads)


@pytest.fixture(scope="module")
def continued(run: Runner) -> Run:
    """An uninterrupted run of four iterations that saved at the second."""
    exits = "--pre-exit --exit-layer-nums 4 2 --exit-layer-weight 0.5 0.25 --use-exit-norm"
    save = "--save {folder}/continued --save-interval 2"
    return run("continued", f"{exits} {HELD} --hidden-dropout 0.1 --train-iters 4 {save}")


def test_a_checkpoint_restores_its_model_and_exits(run: Runner, continued: Run):
    flags = (
        f"--use-checkpoint-args --load {{folder}}/continued --ckpt-step 2 --train-iters 4 {HELD}"
    )
    command = [ENTRY, *SCHEDULE, *run.data, *flags.format(folder=run.folder).split()]
    events = run.folder / "runs" / "restored" / "events"
    done = run.ranks.run(
        [*map(str, command), "--tensorboard-dir", str(events)], 1, run.folder / "runs" / "restored"
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert (
        "exits of the checkpoint restored: exits after layers 1 3 (--use-exit-norm)" in done.stdout
    )
    restored = Run(done.stdout, events.parent)
    read_events(events, restored)
    for name in ("lm loss", "exit 1 loss", "exit 3 loss", "grad-norm", "learning-rate"):
        assert restored.steps[name] == [3, 4]
        assert restored.scalars[name] == continued.scalars[name][2:]
    assert restored.scalars["exit 3 weight"] == [0.5, 0.5]


def test_a_flag_beside_restored_arguments_wins(run: Runner, continued: Run):
    flags = "--use-checkpoint-args --load {folder}/continued --train-iters 1 --exit-layer-nums 1 2"
    command = [ENTRY, *SCHEDULE, *run.data, *flags.format(folder=run.folder).split()]
    done = run.ranks.run(list(map(str, command)), 1, run.folder / "runs" / "overridden")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "exits after layers 1 2 (--use-exit-norm)" in done.stdout
    assert "layers 2 are not in it and start fresh" in done.stdout


def test_a_saved_model_carries_its_tokenizer(run: Runner):
    import sentencepiece

    corpus = run.folder / "corpus.txt"
    corpus.write_text(
        "\n".join(f"the {n} quick brown foxes jump over my lazy dogs" for n in range(300))
    )
    model = run.folder / "words"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(model), vocab_size=VOCAB, minloglevel=2
    )
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
    save = run.folder / "words-model"
    exits = ["--exit-layer-nums", "2", "--save", save, "--save-interval", "2"]
    every = [*SCHEDULE, *run.data, "--train-iters", "2"]
    command = [ENTRY, *BACKBONE, *every, *tokenizer, f"{model}.model", *exits]
    done = run.ranks.run(list(map(str, command)), 1, run.folder / "runs" / "words")
    assert done.returncode == 0, done.stdout[-3000:]
    description = json.loads((save / "early_exit_model.json").read_text())
    assert description["early_exit"]["exit_layer_nums"] == [2]
    assert description["tokenizer"]["model"] == "words.model"
    assert description["architecture"]["vocab_size"] == VOCAB

    # The checkpoint moves to another place, where the tokenizer's own path means nothing.
    Path(f"{model}.model").unlink()
    moved = run.folder / "moved" / "model"
    shutil.move(save, moved)
    command = [ENTRY, *every, "--use-checkpoint-args", "--load", moved]
    done = run.ranks.run(list(map(str, command)), 2, run.folder / "runs" / "words-moved")
    assert done.returncode == 0, done.stdout[-3000:]


_CONTINUED = "--load {folder}/continued"
_EXITS = "--pre-exit --exit-layer-nums 4 2 --use-exit-norm --train-iters 6"
REFUSALS = {
    "absent": (f"{_EXITS} --load {{folder}}/nowhere", "nowhere: there is no checkpoint"),
    "absent-and-required": (
        f"{_EXITS} --load {{folder}}/new --save {{folder}}/new --save-interval 1 "
        "--exit-on-missing-checkpoint",
        "new: there is no checkpoint",
    ),
    "absent-iteration": (f"{_EXITS} {_CONTINUED} --ckpt-step 3", "there is no such directory"),
    "architecture": (
        f"{_EXITS} {_CONTINUED} --ffn-hidden-size 48",
        "ffn_hidden_size is 64 in checkpoint",
    ),
    "schedule": (f"{_EXITS} {_CONTINUED} --lr 1", "--override-opt_param-scheduler"),
    "another-directory": (
        f"{_EXITS} --save {{folder}}/continued --save-interval 1",
        "this run does not continue them but would write over them",
    ),
    "other-exits-here": (
        f"--exit-layer-nums 2 --use-exit-norm --train-iters 6 {_CONTINUED} "
        "--save {folder}/continued --save-interval 1",
        "holds a model with exits after layers 1 3 (--use-exit-norm), and this run asks for exits "
        "after layers 2",
    ),
    "finetune-here": (
        f"{_EXITS} {_CONTINUED} --finetune --save {{folder}}/continued --save-interval 1",
        "save to another directory",
    ),
    "legacy-format": (f"{_EXITS} --ckpt-format torch", "--ckpt-format torch cannot be combined"),
    "yaml": (f"{_EXITS} --yaml-cfg x.yaml", "--yaml-cfg"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_in_a_sentence(run: Runner, continued: Run, name: str):
    flags, part = REFUSALS[name]
    before = sorted(str(path) for path in (run.folder / "continued").rglob("*"))
    assert part in run.refusal(f"refused-{name}", flags, nproc=2)
    assert sorted(str(path) for path in (run.folder / "continued").rglob("*")) == before


def test_a_checkpoint_whose_content_is_damaged_is_refused(run: Runner, continued: Run):
    damaged = run.folder / "damaged"
    shutil.copytree(run.folder / "continued", damaged)
    for file in (damaged / "iter_0000004").glob("*.distcp"):
        content = bytearray(file.read_bytes())
        middle = len(content) // 4
        content[middle : middle + 20_000] = bytes(20_000)
        file.write_bytes(content)
    message = run.refusal("damaged", f"{_EXITS} --load {{folder}}/damaged")
    assert "damaged" in message or "cannot be loaded" in message


def test_a_directory_is_mended_and_the_run_goes_on(run: Runner, continued: Run):
    broken = run.folder / "broken"
    shutil.copytree(run.folder / "continued", broken)
    (broken / "latest_checkpointed_iteration.txt").write_text("")
    (broken / "iter_0000004" / "metadata.json").unlink()
    shutil.copytree(broken / "iter_0000002", broken / "iter_0000006")
    for name in (".metadata", "metadata.json"):
        (broken / "iter_0000006" / name).unlink()
    exits = _EXITS.replace("6", "4") + " --exit-layer-weight 0.5 0.25 --hidden-dropout 0.1"
    here = "--load {folder}/broken --save {folder}/broken --save-interval 2"
    resumed = run("mended", f"{exits} {HELD} {here}")
    assert resumed.scalars["lm loss"] == continued.scalars["lm loss"][2:]
    assert f"removed {broken}/iter_0000006: its save was interrupted" in resumed.output
    assert (broken / "set-aside" / "iter_0000004").is_dir()
    assert (broken / "latest_checkpointed_iteration.txt").read_text() == "4"
    check_same(run.tensors("broken", 4), run.tensors("continued", 4))
