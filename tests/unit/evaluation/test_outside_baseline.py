"""The full model's numbers are those of transformers on the same prompts."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron.early_exit.checkpoint.huggingface import open_export
from megatron.early_exit.evaluation.evaluation import Evaluation
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.measurement import Measurement
from megatron.early_exit.evaluation.output import CURVE, RECORDS, REPORT, RESULTS, rebuild
from megatron.early_exit.evaluation.outside_baseline import (
    LeftOut,
    OutsideBaseline,
    OutsideError,
)
from megatron.early_exit.evaluation.outside_summary import Both
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.summary import Summary
from megatron.early_exit.evaluation.units import Unit
from megatron.early_exit.inference import EarlyExitEngine
from tests.helpers.text_checkpoint import save_text_checkpoint

MAX_TOKENS = 8
ITEMS = (
    Item("own", "the quick brown", " fox"),
    Item("own", "pack my box with five", " dozen liquor jugs"),
    Item("own", "jugs", " and boxes"),
    Item("own", "the lazy", choices=(" dogs", " foxes jump"), gold=0),
)
SETTINGS = Settings(
    tasks=("own",),
    thresholds=(0.3,),
    measures=("max_probability",),
    kv_policies=("exact",),
    max_tokens=MAX_TOKENS,
    repeats=2,
    batch_size=2,
)
MODEL = {"checkpoint": "some/model", "dtype": "fp32", "weight_dtype": None, "compile": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> EarlyExitEngine:
    return EarlyExitEngine.from_checkpoint(checkpoint, torch.float32, "cpu", prefix_caching=False)


@pytest.fixture(scope="module")
def outside(checkpoint: Path) -> OutsideBaseline:
    return OutsideBaseline.from_checkpoint(checkpoint, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def evaluated(engine, outside, tmp_path_factory) -> tuple[Path, Summary]:
    folder = tmp_path_factory.mktemp("evaluation")
    return folder, Evaluation(engine, ITEMS, SETTINGS, MODEL, outside).run(folder, list)


def test_the_full_models_numbers_are_those_of_transformers(evaluated):
    folder, summary = evaluated
    found = summary.outside
    assert found.answers == found.equal_answers == 3
    assert found.agreement == 1
    for both in (found.answer_perplexity, found.held_out_perplexity):
        assert both.outside == pytest.approx(both.full, rel=1e-4)
    assert found.held_out_perplexity.full == pytest.approx(summary.outcomes[0].held_out_perplexity)
    assert found.accuracy == Both(*[summary.outcomes[0].scores["accuracy"].value] * 2)
    choice = {
        kind: next(one for one in records_of(folder) if one["kind"] == kind)
        for kind in ("choice", "transformers_choice")
    }
    for own, other in zip(*(one["choices"] for one in choice.values()), strict=True):
        assert other["tokens"] == own["tokens"]
        assert other["logprob"] == pytest.approx(own["logprob"], rel=1e-4)
    assert "texts equal 3 of 3, " in found.sentence()


def records_of(folder: Path) -> list[dict]:
    return json.loads((folder / RESULTS).read_text())["records"]


def test_a_model_with_other_weights_is_noticed(engine, tmp_path_factory, evaluated):
    other = save_text_checkpoint(tmp_path_factory.mktemp("other"), seed=1)
    wrong = OutsideBaseline.from_checkpoint(other, torch.float32, torch.device("cpu"))
    folder = tmp_path_factory.mktemp("evaluation")
    found = Evaluation(engine, ITEMS, SETTINGS, MODEL, wrong).run(folder, list).outside
    assert found.equal_answers < 3
    assert found.agreement < 1
    assert found.held_out_perplexity.outside != pytest.approx(found.held_out_perplexity.full)


def test_speeds_are_in_all_files(evaluated):
    folder, summary = evaluated
    found = summary.outside
    assert found.speedup == pytest.approx(
        found.tokens_per_second.outside / found.tokens_per_second.full
    )
    low, high = found.speedup_interval
    assert low <= found.speedup <= high
    results = json.loads((folder / RESULTS).read_text())
    assert results["outside_baseline"] == "transformers"
    assert results["outside"]["speedup"] == found.speedup
    assert len(results["outside"]["speedup_interval"]) == 2
    with (folder / CURVE).open() as file:
        *_, row = csv.DictReader(file)
    assert row["threshold"] == "transformers"
    assert float(row["tokens_per_second"]) == found.tokens_per_second.outside
    assert float(row["batch_speedup"]) == found.batch.speedup
    page = (folder / REPORT).read_text()
    assert found.sentence() in page
    assert f"<td>{found.tokens_per_second.outside:.1f}</td>" in page


def test_texts_have_the_asked_length_and_are_timed_in_turns(engine, outside, monkeypatch):
    calls: list[str] = []
    prompts = []
    for name, program in (("full", engine), ("transformers", outside)):
        own = program.generate

        def spy(*given, name=name, own=own):
            calls.append(name)
            prompts.append(given[0])
            return own(*given)

        monkeypatch.setattr(program, "generate", spy)
    measurement = Measurement(engine, ITEMS, SETTINGS, outside)
    found = measurement.measure(Unit("transformers_batch", 0), {})
    # At first a prompt and a batch that are not measured.
    assert calls[:2] == ["transformers"] * 2
    assert calls[2:] == ["full", "transformers", "transformers", "full"]
    # The clock of neither has the work of the tokenizer.
    assert prompts[1:] == [[engine.tokenizer.encode(one.prompt) for one in ITEMS[:2]]] * 5
    assert found["members"] == [0, 1]
    assert len(found["seconds"]) == len(found["full_seconds"]) == 2


def test_no_token_ends_a_text(outside):
    """A model that always chooses the token by which texts end goes on, alone and in a batch."""
    end = outside.model.config.eos_token_id
    (end,) = end if isinstance(end, list) else [end]
    head = outside.model.get_output_embeddings()
    handle = head.register_forward_hook(
        lambda _module, _inputs, logits: torch.zeros_like(logits).index_fill_(
            -1, torch.tensor([end]), 1.0
        )
    )
    try:
        assert outside.generate([[5, 6, 7], [8]], 4) == [[end] * 4] * 2
    finally:
        handle.remove()


def test_padding_does_not_change_texts(outside):
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    alone = [outside.generate([one], 6)[0] for one in prompts]
    assert outside.generate(prompts, 6) == alone
    assert all(len(one) == 6 for one in alone)


class Exhausted(SimpleNamespace):
    """A model that has no memory for an answer."""

    device = torch.device("cpu")

    def eval(self) -> Exhausted:
        return self

    def generate(self, *_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory\nfor 2 GB")


def exhausted() -> OutsideBaseline:
    return OutsideBaseline(Exhausted(generation_config=SimpleNamespace()))


def test_a_measurement_goes_on_without_a_baseline_that_fails(engine, tmp_path):
    baseline = exhausted()
    evaluation = Evaluation(engine, ITEMS, replace(SETTINGS, repeats=1), MODEL, baseline)
    found = evaluation.run(tmp_path, list).outside
    # Four prompts and two batches.
    assert found.left_out == 6
    assert found.reason == "transformers has failed: no memory for 2 GB"
    assert found.answers == 0
    assert found.accuracy is found.batch is None
    assert baseline.model is None
    assert found.sentence() == (
        "transformers is left out of 6 answers or scores "
        "(transformers has failed: no memory for 2 GB)"
    )
    assert found.sentence() in (tmp_path / REPORT).read_text()
    assert rebuild(tmp_path).outside == found
    # Killed within its last record, and begun again where transformers is not installed.
    records = tmp_path / RECORDS
    records.write_bytes(records.read_bytes()[:-9])
    without = replace(evaluation, outside=LeftOut("not installed"))
    assert without.run(tmp_path, list).outside.left_out == 6
    assert json.loads(records.read_text().splitlines()[-1])["left_out"] == "not installed"


def test_a_baseline_that_was_asked_for_has_to_work(engine, tmp_path):
    evaluation = Evaluation(engine, ITEMS, SETTINGS, MODEL, exhausted(), needs_outside=True)
    with pytest.raises(OutsideError, match="transformers has failed: no memory for 2 GB"):
        evaluation.measurement().measure(Unit("transformers_batch", 0), {})


def test_a_long_text_is_scored_in_pieces(outside, monkeypatch):
    text = list(range(5, 25))
    with torch.inference_mode():
        logits = outside.model(torch.tensor([text])).logits[0, :-1]
    wanted = logits.log_softmax(-1)[range(19), text[1:]].tolist()
    monkeypatch.setattr("megatron.early_exit.evaluation.outside_baseline._ROWS", 8)
    found = outside.score(text)
    assert [one.logprob for one in found] == pytest.approx(wanted)
    assert [one.best for one in found] == logits.argmax(-1).tolist()
    handle = outside.model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, logits: logits / 0
    )
    try:
        with pytest.raises(OutsideError, match="failed: its logits are not finite"):
            outside.score(text)
    finally:
        handle.remove()


def test_a_model_for_which_there_is_no_room_is_refused(checkpoint, monkeypatch, tmp_path):
    """A folder in memory needs room for the files, too, and nothing stays of it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = "megatron.early_exit.evaluation.outside_baseline"
    size = open_export(checkpoint, plain=True).num_bytes

    def load(memory: int, kind: str, dtype: torch.dtype = torch.float32) -> OutsideBaseline:
        mounts = [SimpleNamespace(mountpoint=one, fstype="ext4") for one in ("/", "/other")]
        mounts.append(SimpleNamespace(mountpoint=str(tmp_path), fstype=kind))
        monkeypatch.setattr(f"{module}.available_memory", lambda: memory)
        monkeypatch.setattr("psutil.disk_partitions", lambda **_: mounts)
        return OutsideBaseline.from_checkpoint(checkpoint, dtype, torch.device("cpu"))

    with pytest.raises(ValueError, match=r"needs .* GB of memory, and .* GB are available"):
        load(size - 1, "ext4")
    with pytest.raises(ValueError, match=r"needs .* GB of memory"):
        load(2 * size - 1, "tmpfs")
    with pytest.raises(ValueError, match=r"needs .* GB of memory"):
        load(size // 2 - 1, "ext4", torch.bfloat16)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(ValueError, match=f"its files need .* GB in {tmp_path}, which has"):
        load(9 * size, "ext4")
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loaded = load(2 * size, "tmpfs")
    assert list(tmp_path.glob("early-exit-*")) == []
    # Nothing is mapped from a file that is gone.
    assert f"{tmp_path}/early-exit-" not in Path("/proc/self/maps").read_text()
    assert loaded.score([5, 6, 7])
