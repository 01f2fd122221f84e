"""Every flag of the installed Megatron does something in a run, or is refused, or is known here.

A Megatron that brings a flag which nothing reads, or stops reading one, fails these tests: the flag
then belongs into `flag_rules/unsupported.py`, or below with its reason."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from argparse import ArgumentParser, Namespace

import pytest

from megatron.early_exit import platform

platform.prepare()

from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402

from megatron.early_exit.model.gpt_builder import EarlyExitGPTModelConfig  # noqa: E402
from megatron.early_exit.training import session  # noqa: E402
from megatron.early_exit.training.cli.arguments import add_early_exit_arguments  # noqa: E402
from megatron.early_exit.training.cli.flag_rules.dependent import DEPENDENT  # noqa: E402
from megatron.early_exit.training.cli.flag_rules.rule import FlagRule, check_rules  # noqa: E402
from megatron.early_exit.training.cli.flag_rules.unsupported import UNSUPPORTED  # noqa: E402
from megatron.early_exit.training.cli.given_flags import given_arguments  # noqa: E402
from megatron.early_exit.training.cli.number_ranges import check_numbers  # noqa: E402
from tests.helpers.flag_readers import UNREACHED, read_flags  # noqa: E402

# Flags that are read only where Megatron derives others from them or checks them.
DERIVED = {
    "the initialisation of weights is made from them": (
        *("embedding_init_method_std", "init_method_xavier_uniform"),
        *("mup_base_hidden_size", "mup_base_head_dim", "mup_attn_scale_power"),
    ),
    "the activation function and the norms are chosen by them": (
        *("squared_relu", "quick_geglu", "bias_gelu_fusion", "bias_swiglu_fusion"),
        "no_persist_layer_norm",
    ),
    "the model's configuration is made from them": (
        *("max_position_embeddings", "untie_embeddings_and_output_weights", "use_rope_scaling"),
        *("rotary_seq_len_interpolation_factor", "heterogeneous_layers_config_path"),
        *("heterogeneous_layers_config_encoded_json", "te_precision_config_file"),
        *("use_rotary_position_embeddings", "encoder_num_layers", "encoder_seq_length"),
    ),
    "the division of the model is made from them": (
        *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
        *("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
        *("tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards"),
    ),
    "other flags are set by them": (
        *("recompute_activations", "grad_reduce_in_bf16", "no_weight_decay_cond_type"),
        *("enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope_deprecated"),
        *("moe_router_padding_for_fp8", "moe_enable_deepep", "moe_layer_recompute"),
        *("moe_deepep_num_sms", "moe_hybridep_num_sms", "disable_bf16_reduced_precision_matmul"),
    ),
    "the optimizer is given all fields that begin with its name": (
        *("muon_momentum", "muon_split_qkv", "muon_nesterov", "muon_fp32_matmul_prec"),
        *("muon_coefficient_type", "muon_num_ns_steps", "muon_tp_mode"),
        "muon_extra_scale_factor",
    ),
    "Megatron refuses them in a sentence": ("batch_size", "warmup", "model_parallel_size"),
    "Megatron refuses another value without --use-precision-aware-optimizer, which takes it": (
        "main_grads_dtype",
    ),
    "the entry refuses it": ("yaml_cfg",),
    "the parser serves it": ("help",),
}

# Flags that change nothing because what they ask for is so in any case.
FULFILLED = {
    "Megatron has only these models": ("deprecated_use_mcore_models",),
    "Megatron's checkpoints are always distributed, and says so": (
        *("use_dist_ckpt_deprecated", "ckpt_fully_parallel_save_deprecated"),
    ),
    "storage of that kind is off by default": ("disable_msc_deprecated",),
    "Megatron refuses it but with rotary embeddings, beside which there are no others": (
        "add_position_embedding",
    ),
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parsers: list[ArgumentParser] = []

    def keep(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return add_early_exit_arguments(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        parse_args(keep)
    return parsers[0]


@pytest.fixture(scope="module")
def names(parser) -> frozenset[str]:
    """Those of Megatron's flags."""
    groups = [one for one in parser._action_groups if not str(one.title).startswith("early exit")]
    return frozenset(action.dest for group in groups for action in group._group_actions)


@pytest.fixture(scope="module")
def read(names) -> set[str]:
    return read_flags(names)


def flat(table: dict[str, tuple[str, ...]]) -> set[str]:
    return {name for names in table.values() for name in names}


def test_what_is_left_out_of_the_search_is_there():
    assert [str(path) for path in UNREACHED if not path.exists()] == []


def test_every_flag_is_read_or_refused_or_known(names, read):
    refused = {name for name in names if any(one.covers(name) for one in UNSUPPORTED)}
    assert names - read - refused == flat(DERIVED) | flat(FULFILLED)


def test_what_is_known_is_known_once(names, read):
    assert not flat(DERIVED) & flat(FULFILLED)
    for name in sorted(names):
        reasons = [one.refusal for one in UNSUPPORTED if one.covers(name)]
        assert len(reasons) <= 1, name


@pytest.mark.parametrize("one", [*UNSUPPORTED, *DEPENDENT], ids=lambda one: str(one.names[:1]))
def test_the_tables_name_flags_that_there_are(names, one: FlagRule):
    assert {*one.names, *one.but} <= names
    for family in one.families:
        assert any(name.startswith(family) for name in names), family
    assert {name for name in one.but if name.startswith(one.families)} == {*one.but}


def parsed(parser: ArgumentParser, monkeypatch, *words: str) -> tuple[Namespace, frozenset[str]]:
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    return parser.parse_args(), given_arguments(parser)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--rampup-batch-size", "4", "4", "100"],
            "--rampup-batch-size 4 4 100 is not supported: .*use --step-batch-size-schedule",
        ),
        (["--use-flash-attn"], "--use-flash-attn is not supported: .*--attention-backend flash"),
        (["--checkpoint-activations"], "use --recompute-activations"),
        (["--dist-ckpt-format", "zarr"], "--dist-ckpt-format zarr .*--ckpt-format"),
        (["--perform-rl-step"], "--perform-rl-step is not supported: reinforcement"),
        (["--grpo-kl-beta=0.1"], "^--grpo-kl-beta 0.1 is not"),
        (["--bert-no-binary-head"], "^--bert-no-binary-head is not"),
        (["--dino-teacher-temp", "0.1"], "^--dino-teacher-temp 0.1"),
        (["--inference-max-seq-length", "9"], "tools/generate.py"),
        (["--inprocess-restart"], "torchrun --max-restarts"),
        (["--hybrid-layer-pattern", "M*"], "Mamba"),
        (["--spec", "a", "b"], "--spec a b .*--transformer-impl"),
        (["--reset-attention-mask"], "^--reset-attention-mask is .*whole sequence"),
        (["--sft"], "^--sft is"),
        (["--fim-data"], "^--fim-data is"),
        (["--fim-rate", "0.1"], "^--fim-rate 0.1 is"),
        (["--full-validation"], "^--full-validation is .*--eval-iters"),
    ],
)
def test_flags_that_nothing_reads_are_refused(parser, monkeypatch, words, message):
    args, given = parsed(parser, monkeypatch, *words)
    with pytest.raises(ValueError, match=message):
        check_rules(UNSUPPORTED, parser, args, given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-query-groups", "2"], "^--num-query-groups 2 has no .* --group-query-attention$"),
        (["--rotary-base", "500000"], "without rotary embeddings"),
        (["--moe-router-topk", "1"], "without --num-experts"),
        (["--no-tp-comm-bulk-wgrad"], "^--no-tp-comm-bulk-wgrad has no .* --tp-comm-overlap"),
        (["--initial-loss-scale", "8", "--bf16"], "without --fp16"),
        (["--save-interval", "5"], "without --save: nothing would be saved"),
        (["--ckpt-step", "5"], "without --load or"),
        (["--fp8-margin", "5"], "without --fp8-format"),
        (["--wandb-exp-name", "x"], "without --wandb-project"),
        (["--log-timers-to-tensorboard"], "^--log-timers-to-tensorboard has"),
        (["--use-rope-scaling", "--position-embedding-type", "yarn"], "^--use-rope-scaling has no"),
        (["--num-layers-at-start-in-bf16", "2", "--fp8-format", "e4m3"], "--first-last-layers"),
        (["--adam-beta2", "0.9", "--optimizer", "lion"], "^--adam-beta2 0.9 has no effect"),
        (["--expert-tensor-parallel-size", "2"], "without --num-experts"),
        (["--yarn-beta-fast", "16", "--multi-latent-attention"], "^--yarn-beta-fast 16.0 has no"),
        (["--loss-scale", "8"], "without --fp16, --bf16 or --use-distributed-optimizer"),
        (["--lr-wsd-decay-iters", "5"], "without --lr-decay-style WSD"),
    ],
)
def test_flags_that_lack_another_are_refused(parser, monkeypatch, words, message):
    args, given = parsed(parser, monkeypatch, *words)
    with pytest.raises(ValueError, match=message):
        check_rules(DEPENDENT, parser, args, given)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--num-query-groups 2 --group-query-attention",
        "--rotary-base 500000 --use-rotary-position-embeddings",
        "--moe-router-topk 1 --num-experts 4",
        # A default value asks for nothing.
        "--mask-prob 0.15",
        "--use-mcore-models --no-create-attention-mask-in-dataloader --use-dist-ckpt",
        "--log-timers-to-tensorboard --tensorboard-dir x --save-interval 5 --save x",
        # As scripts for Megatron-LM have them.
        "--use-dist-ckpt --dist-ckpt-format torch_dist",
        "--expert-model-parallel-size 1 --expert-tensor-parallel-size 1",
        "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0",
        "--bf16 --loss-scale 0 --hysteresis 2 --min-loss-scale 1",
        "--loss-scale 0 --exit-interval 0 --exit-duration-in-mins 0 --train-sync-interval 0",
        "--moe-layer-recompute --num-experts 4 --recompute-modules moe_act",
        "--load x --ckpt-convert-format torch_dist --ckpt-convert-save y --no-save-optim",
        "--loss-scale 8 --use-distributed-optimizer",
        "--yarn-beta-fast 16 --position-embedding-type yarn",
    ],
)
def test_flags_that_do_something_are_taken(parser, monkeypatch, words):
    args, given = parsed(parser, monkeypatch, *words.split())
    check_numbers(args)
    check_rules(UNSUPPORTED, parser, args, given)
    check_rules(DEPENDENT, parser, args, given)


def test_no_flag_is_lost_on_its_way_into_the_models_configuration(names):
    """Megatron hands over the fields of a model one by one, and has forgotten some."""
    handed_over: set[str] = {
        # Read from the arguments themselves.
        "tp_comm_overlap_cfg",
        # Of another name, or made from it.
        *("seq_length", "vocab_size"),
    }
    for source in (inspect.getsource(gpt_config_from_args), inspect.getsource(session)):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                handed_over.add(node.slice.value)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                handed_over.add(node.attr)
    fields = {one.name for one in dataclasses.fields(EarlyExitGPTModelConfig)}
    assert fields & names <= handed_over
