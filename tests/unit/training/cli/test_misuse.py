"""Bad values of Megatron's flags: refused early where that is known, and blamed on the right flag
where Megatron is the one who fails."""

from __future__ import annotations

import runpy
import sys
from argparse import ArgumentParser, Namespace

import pytest

from megatron.early_exit import platform

platform.prepare()

from megatron.training.arguments import parse_args  # noqa: E402

from megatron.early_exit.training.cli import command_line  # noqa: E402
from megatron.early_exit.training.cli.checks import check_data  # noqa: E402
from megatron.early_exit.training.cli.misuse import explain  # noqa: E402
from megatron.early_exit.training.cli.number_ranges import (  # noqa: E402
    check_batch_size_schedule,
    check_combinations,
    check_numbers,
)

ALWAYS = (
    "--num-layers 4 --hidden-size 8 --num-attention-heads 2 --micro-batch-size 2 --seq-length 8 "
    "--max-position-embeddings 8"
)


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parsers: list[ArgumentParser] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        parse_args(lambda parser: parsers.append(parser) or parser)
    return parsers[0]


def parse(parser: ArgumentParser, words: str, processes: int = 1) -> Namespace:
    args = parser.parse_args([*ALWAYS.split(), *words.split()])
    args.world_size, args.data_parallel_size = processes, processes
    args.gtp_weight_remat_size = 1
    return args


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--log-interval 0", "--log-interval 0 is out of range, allowed: above 0"),
        ("--hidden-size 0", "--hidden-size 0"),
        ("--pipeline-model-parallel-size 0", "--pipeline-model-parallel-size 0"),
        ("--num-workers -1", "--num-workers -1 is out of range, allowed: 0 or more"),
        ("--hidden-dropout 2", "--hidden-dropout 2.0 is out of range, allowed: 0 to 1"),
        ("--adam-beta1 1", "--adam-beta1 1.0 is out of range, allowed: 0 to less than 1"),
        ("--seed 0", "--seed 0 is out of range, allowed: above 0"),
        ("--loss-scale -1", "--loss-scale -1.0 is out of range, allowed: 0 or more"),
    ],
)
def test_numbers_out_of_range(parser, words, message):
    check_numbers(parse(parser, ""))
    with pytest.raises(ValueError, match=f"^{message}"):
        check_numbers(parse(parser, words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--save x", "--save x needs --save-interval"),
        ("--wandb-project p", "--wandb-project p needs --wandb-save-dir or --save"),
        ("--wandb-project p --wandb-save-dir d", "--wandb-project p needs --tensorboard-dir"),
        ("--num-experts 4 --moe-router-topk 9", "--moe-router-topk 9 .* 1 to 4 .--num-experts"),
        ("--tensor-model-parallel-size 3", "--tensor-model-parallel-size 3 takes .* there are 2"),
        ("--global-batch-size 6", "--global-batch-size 6 .* --micro-batch-size 2 x 2 replicas"),
    ],
)
def test_numbers_that_do_not_fit_together(parser, words, message):
    check_combinations(parse(parser, "--global-batch-size 8 --save x --save-interval 3", 2))
    with pytest.raises(ValueError, match=f"^{message}"):
        check_combinations(parse(parser, words, 2))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("abc", r"abc' cannot be understood .*, allowed: 'TOKENS:BATCH TOKENS:BATCH"),
        ("0:x", "cannot be understood"),
        ("0:1e400", "cannot be understood"),
        ("100:8", "changes after .12. samples"),
        ("0:8,0:16", "changes after .0, 0. samples"),
        ("0:0", "a batch of 0 is out of range"),
        ("0:8,1K:5", "a batch of 5 is out of range, .* --micro-batch-size 2 x 2 replicas"),
    ],
)
def test_schedules_of_batch_sizes_are_blamed_on_their_flag(parser, schedule, message):
    check_batch_size_schedule(parse(parser, "--step-batch-size-schedule 0:8,1K:12", 2))
    args = parse(parser, f"--step-batch-size-schedule {schedule}", 2)
    with pytest.raises(ValueError, match=f"^--step-batch-size-schedule '.*{message}") as error:
        check_batch_size_schedule(args)
    assert "tokenizer" not in str(error.value)


def test_a_run_that_goes_on_may_have_left_batch_sizes_behind(parser):
    words = "--step-batch-size-schedule 0:2,1K:8 --load x"
    check_batch_size_schedule(parse(parser, words, 2))


def caught(function, *values) -> BaseException:
    try:
        function(*values)
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def divide(args: Namespace) -> int:
    return args.hidden_size % args.kv_channels


def refuse_in_words(config: Namespace) -> None:
    if config.num_attention_heads < 3:
        raise ValueError("too few heads")


def test_exceptions_are_blamed_on_the_flags_that_the_failing_statement_reads(parser, tmp_path):
    args = parse(parser, "--kv-channels 0")
    assert explain(caught(divide, args)) == (
        "--hidden-size 8 --kv-channels 0 cannot be used: ZeroDivisionError: integer modulo by zero"
    )
    # Not in this file, where pytest gives every assertion a text.
    (tmp_path / "plain.py").write_text(
        "def check(args):\n    assert args.num_layers > \\\n        args.hidden_size\n"
    )
    check = runpy.run_path(str(tmp_path / "plain.py"))["check"]
    assert explain(caught(check, args)) == (
        "the arguments do not fit together, required: args.num_layers > args.hidden_size "
        "(--num-layers 4 --hidden-size 8)"
    )
    assert explain(caught(refuse_in_words, args)) == "too few heads"
    assert explain(ValueError("--x 3 is out of range")) == "--x 3 is out of range"


def test_exceptions_that_no_flag_explains_stay_what_they_are():
    assert explain(caught(lambda: {}["absent"])) is None


def test_what_fails_while_megatron_sets_itself_up_is_named(parser, monkeypatch):
    def _set_wandb_writer(args: Namespace) -> None:
        raise TypeError("expected str")

    def _set_energy_monitor(args: Namespace) -> None:
        raise TypeError("no such meter")

    args = parse(parser, "--wandb-project p --wandb-exp-name n --wandb-save-dir d")
    monkeypatch.setattr(command_line, "set_global_variables", _set_wandb_writer)
    with pytest.raises(ValueError, match=r"^W&B \(--wandb-project p .*: expected str$"):
        command_line._set_up_globals(args)
    # Not known to be the fault of a flag, so it is not blamed on one.
    monkeypatch.setattr(command_line, "set_global_variables", _set_energy_monitor)
    with pytest.raises(TypeError, match=r"^no such meter$"):
        command_line._set_up_globals(args)


def test_a_folder_for_indices_that_cannot_be_written(parser, tmp_path):
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    with pytest.raises(ValueError, match=r"^--data-cache-path .* a folder to write to$"):
        check_data(parse(parser, f"--mock-data --data-cache-path {folder}"), 8)
