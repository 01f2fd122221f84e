"""What a run refuses before it starts, and what it hands to Megatron's data sets."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from multiprocessing import current_process
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from megatron.core.rerun_state_machine import (  # noqa: E402
    RerunMode,
    destroy_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.training.arguments import parse_args  # noqa: E402

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.cli.arguments import add_early_exit_arguments  # noqa: E402
from megatron.early_exit.training.cli.checks import check_arguments, check_data  # noqa: E402
from megatron.early_exit.training.cli.flag_rules.unsupported import UNSUPPORTED  # noqa: E402
from megatron.early_exit.training.loop import step  # noqa: E402
from megatron.early_exit.training.loop.data import (  # noqa: E402
    data_sources,
    dataset_config,
    dataset_provider,
)
from megatron.early_exit.training.loop.step import LossChecks, final_loss, rejected_results  # noqa: E402

VOCAB = 50
TOKENIZER = SimpleNamespace(vocab_size=VOCAB)
Parse = Callable[..., Namespace]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Parses flags; those that a run cannot do without are added."""

    def run(*flags: object) -> Namespace:
        always = ["--train-iters", "10", "--lr", "0.1", "--seq-length", "8", "--eval-iters", "1"]
        monkeypatch.setattr(sys, "argv", ["pretrain", *always, *map(str, flags)])
        args = parse_args(add_early_exit_arguments)
        args.dataloader_type = args.dataloader_type or "single"
        args.padded_vocab_size = VOCAB
        return args

    return run


def write_documents(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "data", [[1, 2, 3]] * 100)


def refusal(check: Callable[[], object]) -> str:
    """The sentence that `check` refuses with."""
    with pytest.raises(ValueError, match=r"--[a-z]") as error:
        check()
    message = str(error.value)
    assert message.count("\n") == 0
    return message


# --- flags about data ---------------------------------------------------------------------------

# Fields of GPTDatasetConfig that no flag of a run that is served would change.
NOT_PASSED = {
    # Set by the class itself.
    *("split_matrix", "mock", "token_dtype_code"),
    # No flag of Megatron's sets them for a GPT.
    *("drop_last_partial_validation_sequence", "add_extra_token_to_sequence"),
    # Of refused flags: several validation sets, packed samples.
    *("multiple_validation_sets", "full_validation", "hybrid_context_parallel"),
    *("data_parallel_size", "sequence_parallel_size", "context_parallel_size"),
    "inter_document_masking",
}


def test_every_field_of_megatrons_data_sets_is_passed_or_refused(parse, data, monkeypatch):
    passed: dict[str, object] = {}
    monkeypatch.setattr(
        "megatron.early_exit.training.loop.data.GPTDatasetConfig",
        lambda **fields: passed.update(fields),
    )
    dataset_config(parse("--data-path", data, "--split", "98,2,0"), TOKENIZER)
    assert passed.keys() | NOT_PASSED == {one.name for one in dataclasses.fields(GPTDatasetConfig)}
    assert not passed.keys() & NOT_PASSED


def test_flags_about_data_reach_megatrons_data_sets(parse, data, tmp_path):
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({str(data): [100, 101]}))
    args = parse(
        *("--train-data-path", data, "--valid-data-path", 1, data, "--seed", 3),
        *("--data-cache-path", tmp_path, "--dataloader-fast-cache-load", "--no-mmap-bin-files"),
        *("--dataloader-defer-npy-index-mmap", "--allow-ambiguous-pad-tokens", "--eod-mask-loss"),
        *("--object-storage-cache-path", tmp_path, "--mid-level-dataset-surplus", 0.1),
        *("--num-dataset-builder-threads", 2, "--per-dataset-sequences-path", counts),
    )
    config = dataset_config(args, TOKENIZER)
    assert config.blend_per_split == [([str(data)], None), ([str(data)], [1.0]), None]
    assert (config.blend, config.split, config.random_seed) == (None, None, 3)
    assert (config.path_to_cache, config.object_storage_cache_path) == (str(tmp_path),) * 2
    assert config.fast_cache_load
    assert config.defer_npy_index_mmap
    assert config.allow_ambiguous_pad_tokens
    assert config.eod_mask_loss
    assert not config.mmap_bin_files
    assert (config.mid_level_dataset_surplus, config.num_dataset_builder_threads) == (0.1, 2)
    assert config.sequences_per_dataset == {str(data): [100, 101]}
    assert not config.create_attention_mask


def test_data_sets_may_be_listed_in_files(parse, data, tmp_path):
    blend, per_split = tmp_path / "blend.txt", tmp_path / "splits.json"
    blend.write_text(f"0.3 {data}\n0.7 /other\n")
    args = parse("--data-args-path", blend, "--split", "98,2,0")
    assert dataset_config(args, TOKENIZER).blend == ([str(data), "/other"], [0.3, 0.7])
    assert list(map(str, data_sources(args))) == [
        f"--data-args-path {data}",
        "--data-args-path /other",
    ]
    per_split.write_text(json.dumps({"train": [str(data)], "valid": "1 /v", "test": None}))
    args = parse("--per-split-data-args-path", per_split)
    config = dataset_config(args, TOKENIZER)
    assert config.blend_per_split == [([str(data)], None), (["/v"], [1.0]), None]
    assert {one.flag for one in data_sources(args)} == {"--per-split-data-args-path"}


def test_what_is_read_from_megatrons_skipped_batches_has_no_mask(parse):
    args = parse("--mock-data")
    dataset_provider(args, TOKENIZER)
    assert not args.create_attention_mask_in_dataloader


def test_a_temporary_folder_in_which_no_checkpoint_can_be_written(parse, monkeypatch, tmp_path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    # Python remembers where it has made sockets before.
    monkeypatch.delitem(current_process()._config, "tempdir", raising=False)
    args = parse("--save", tmp_path)
    with pytest.raises(ValueError, match=r"^TMPDIR .*long: .*allowed: .* at most 75 bytes"):
        check_arguments(args, EarlyExitConfig())
    check_arguments(parse(), EarlyExitConfig())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "a", "--train-data-path", "b"], ["--data-path", "--train-data-path"]),
        (["--data-path", "a", "--mock-data"], ["--data-path", "--mock-data"]),
        (["--data-args-path", "/absent"], ["--data-args-path /absent", "No such file"]),
        (["--per-split-data-args-path", "FILE"], ["--per-split-data-args-path", "train, valid"]),
        (["--data-path"], ["--data-path", "prefixes"]),
        (["--mock-data", "--per-dataset-sequences-path", "/absent"], ["/absent", "cannot be read"]),
        (
            ["--data-path", "a", "--split", "1,1,1", "--per-dataset-sequences-path", "FILE"],
            ["--per-dataset-sequences-path", "JSON object with a"],
        ),
    ],
    ids=str,
)
def test_data_sets_that_cannot_be_understood_are_refused(parse, tmp_path, flags, words):
    file = tmp_path / "file"
    file.write_text("{}")
    flags = [str(file) if flag == "FILE" else flag for flag in flags]
    message = refusal(lambda: dataset_config(parse(*flags), TOKENIZER))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dataloader-type", "external"], ["--dataloader-type external", "single, cyclic"]),
        (
            ["--reset-position-ids", "--position-embedding-type", "rope"],
            ["--reset-position-ids", "learned_absolute"],
        ),
        (["--phase-transition-iterations", "5"], ["--train-samples"]),
        (["--exit-loss-chunk-tokens", 0], ["--exit-loss-chunk-tokens 0", "1 or more"]),
        (["--min-lr", 1], ["--min-lr 1.0", "0 to 0.1 (--lr)"]),
        (["--lr-warmup-iters", 10], ["--lr-warmup-iters 10", "0 to less than 10 (--train-iters)"]),
    ],
    ids=str,
)
def test_flags_that_are_not_served_are_refused(parse, flags, words):
    message = refusal(lambda: check_arguments(parse(*flags), EarlyExitConfig()))
    assert all(word in message for word in words), message


def test_defaults_are_served(parse):
    check_arguments(parse(), EarlyExitConfig())


def test_every_flag_of_megatrons_data_group_is_known(monkeypatch):
    """A flag that a later Megatron adds has to be given to its data sets, or refused."""
    parsers: list[ArgumentParser] = []

    def keep(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return parser

    monkeypatch.setattr(sys, "argv", ["pretrain"])
    parse_args(keep)
    (group,) = [one for one in parsers[0]._action_groups if one.title == "data and dataloader"]
    known = {
        *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split"),
        *("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path"),
        *("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap", "data_cache_path"),
        *("mmap_bin_files", "mock_data", "seq_length", "reset_position_ids", "eod_mask_loss"),
        *("num_dataset_builder_threads", "object_storage_cache_path"),
        *("mid_level_dataset_surplus", "allow_ambiguous_pad_tokens"),
        # Read by Megatron itself.
        *("encoder_seq_length", "num_workers", "phase_transition_iterations"),
        # Off in any case.
        "create_attention_mask_in_dataloader",
    }
    names = {action.dest for action in group._group_actions}
    assert {name for name in names - known if not any(u.covers(name) for u in UNSUPPORTED)} == set()


# --- data sets ----------------------------------------------------------------------------------


def test_whole_data_are_taken(parse, data):
    check_data(parse("--data-path", data, "--split", "98,2,0"), VOCAB)
    check_data(parse("--train-data-path", data, "--valid-data-path", data), VOCAB)
    check_data(parse("--mock-data"), VOCAB)


def broken(data: Path, how: str) -> None:
    idx, content = Path(f"{data}.idx"), Path(f"{data}.bin")
    if how == "bad header":
        idx.write_bytes(b"X" + idx.read_bytes()[1:])
    elif how == "unknown type":
        idx.write_bytes(idx.read_bytes()[:17] + b"\x63" + idx.read_bytes()[18:])
    elif how == "short header":
        idx.write_bytes(idx.read_bytes()[:12])
    elif how == "empty index":
        idx.write_bytes(b"")
    elif how == "short index":
        idx.write_bytes(idx.read_bytes()[:-8])
    elif how == "wrong count":
        count = struct.pack("<Q", 99)
        idx.write_bytes(idx.read_bytes()[:18] + count + idx.read_bytes()[26:])
    elif how == "short data":
        content.write_bytes(content.read_bytes()[:-1])
    elif how == "empty data":
        content.write_bytes(b"")
    elif how == "no data":
        content.unlink()
    elif how == "no documents":
        write_documents(data, [])
    elif how == "large token":
        write_documents(data, [[1, VOCAB]] * 100)
    elif how == "negative token":
        write_documents(data, [[1, -1]] * 100)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("bad header", ".idx is damaged or no index (bad header"),
        ("unknown type", ".idx is damaged"),
        ("short header", ".idx is damaged"),
        ("empty index", ".idx is damaged"),
        ("short index", ".idx is damaged"),
        ("wrong count", ".idx is damaged"),
        ("short data", ".bin is cut short, it has 1199 bytes of 1200"),
        ("empty data", ".bin is cut short, it has 0 bytes of 1200"),
        ("no data", "there is no file"),
        ("no documents", "has no documents"),
        ("large token", f"the token {VOCAB} is out of range, allowed: 0 to {VOCAB - 1}"),
        ("negative token", "the token -1"),
    ],
)
def test_damaged_data_are_refused_under_the_flag_that_gave_them(parse, data, how, words):
    broken(data, how)
    message = refusal(lambda: check_data(parse("--data-path", data, "--split", "98,2,0"), VOCAB))
    assert message.startswith(f"--data-path {data}")
    assert words in message
    flags = ["--train-data-path", data, "--valid-data-path", data]
    message = refusal(lambda: check_data(parse(*flags), VOCAB))
    assert message.startswith(f"--train-data-path {data}")


@pytest.mark.parametrize("length", [2, 5000])
def test_the_end_of_documents_must_be_a_token_of_the_tokenizer(parse, tmp_path, length):
    """EE-LLM appends its own to SentencePiece's; padded rows may have room for them."""
    end = VOCAB - 1
    data = write_documents(tmp_path / "appended", [[1] * length + [end]] * 20)
    args = parse("--data-path", data, "--split", "50,50,0")
    check_data(args, VOCAB)
    message = refusal(lambda: check_data(args, VOCAB - 3))
    assert f"the token {end} is out of range, allowed: 0 to {VOCAB - 4};" in message
    assert "--tokenizer-sentencepiece-legacy" in message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--data-path", "--mock-data"]),
        (["--train-data-path", "DATA"], ["--eval-iters 1", "--valid-data-path"]),
        (["--valid-data-path", "DATA"], ["--train-data-path"]),
        (["--data-path", "DATA", "--split", "0,1,0"], ["no data to train on"]),
        (["--data-path", "DATA", "--split", "1"], ["--eval-iters 1"]),
        (["--data-path", "DATA", "--split", "a,b"], ["--split 'a,b'", "98,2,0"]),
        (["--data-path", "DATA", "--split", "0,0,0"], ["--split '0,0,0'"]),
        (["--data-path", "DATA", "--split", "9999,1,0"], ["--split '9999,1,0'", "for validation"]),
        (
            ["--data-path", "-1", "DATA", "2", "DATA", "--split", "1,1"],
            ["weights -1.0 2.0 in --data-path"],
        ),
        (["--train-data-path", "DATA", "--valid-data-path", "DATA", "--split", "1,1"], ["--split"]),
        (["--data-path", "s3://a/b", "--split", "1,1"], ["--object-storage-cache-path"]),
    ],
    ids=str,
)
def test_data_that_leave_nothing_to_do_are_refused(parse, data, flags, words):
    flags = [data if flag == "DATA" else flag for flag in flags]
    message = refusal(lambda: check_data(parse(*flags), VOCAB))
    assert all(word in message for word in words), message


# --- the loss -----------------------------------------------------------------------------------


@pytest.fixture
def rerun_machine():
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)
    yield
    destroy_rerun_state_machine()


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "Inf")])
def test_a_loss_that_is_not_finite_ends_the_run_in_one_sentence(rerun_machine, value, name):
    losses, mask = torch.full((2, 4), value), torch.ones(2, 4)
    with pytest.raises(SystemExit, match=f"^error: .*found {name} in the final loss"):  # noqa: SIM117
        with rejected_results():
            final_loss(LossChecks(finite=True, spikes=False), mask, losses)
    total, tokens, report = final_loss(LossChecks(finite=False, spikes=False), mask, losses)
    assert not total.isfinite()
    assert tokens == 8
    assert report["lm loss"].shape == (2,)


def test_a_spike_is_reported_and_training_goes_on(rerun_machine, caplog):
    checks, mask = LossChecks(finite=True, spikes=True), torch.ones(1, 1)
    for _ in range(100):
        final_loss(checks, mask, torch.ones(1, 1))
    final_loss(checks, mask, torch.full((1, 1), 9.0))
    assert "Spiky loss" not in caplog.text
    final_loss(checks, mask, torch.full((1, 1), 10.0))
    assert "Spiky loss" in caplog.text


def test_other_ends_of_a_run_stay_as_they_are(capsys):
    with pytest.raises(RuntimeError, match="something else"), rejected_results():
        raise RuntimeError("something else")
    with pytest.raises(SystemExit), rejected_results():
        sys.exit(0)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as end, rejected_results():
        sys.exit(step.EXIT_CODE_RESUME_TO_DISAMBIGUATE)
    assert end.value.code == step.EXIT_CODE_RESUME_TO_DISAMBIGUATE
    assert "--rerun-mode disabled" in capsys.readouterr().err
