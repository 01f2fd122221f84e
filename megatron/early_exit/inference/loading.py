"""From a checkpoint to a model that an engine can run, or to this process's part of one."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.checkpoint.description import ModelDescription, describe
from megatron.early_exit.checkpoint.location import CheckpointLocation, locate
from megatron.early_exit.checkpoint.quantization import Quantization
from megatron.early_exit.checkpoint.stored_rule import StoredRule, number_format
from megatron.early_exit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from megatron.early_exit.checkpoint.weights import load_weights, model_weights
from megatron.early_exit.errors import FieldError
from megatron.early_exit.hardware.dtypes import NAMES
from megatron.early_exit.hardware.huge_pages import use_huge_pages
from megatron.early_exit.inference.distributed.parallel_backend import (
    ParallelBackend,
    parallel_model,
)
from megatron.early_exit.inference.distributed.process_groups import join, own_part
from megatron.early_exit.inference.dtype import decide_dtype
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.weight_dtype import make_quantizer
from megatron.early_exit.ranges import Range

_LOG = logging.getLogger(__name__)
_LARGE = 64 * 1024 * 1024
"""Bytes of weights beyond which a step is mostly reading from memory."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a checkpoint holds for this process.

    Attributes:
        model: the model, or a part of it.
        tokenizer: None where the checkpoint has none that inference supports.
        eod_id: the token that ends a document; None where it is unknown.
        other_end_ids: further tokens that end a text.
        backend: how the model is divided of which `model` is a part; None where it is whole.
        stored_rule: how tokens leave where a request does not say it; None where nothing is
            stored, or where it was found of other weights.
    """

    model: SegmentedModel
    tokenizer: Tokenizer | None
    eod_id: int | None
    other_end_ids: tuple[int, ...]
    backend: ParallelBackend | None
    stored_rule: StoredRule | None = None


def load_model(
    path: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    tensor_parallel: int,
    pipeline_parallel: int,
    compile_rows: bool,
    has_driver: bool,
    weight_dtype: str | None = None,
    quantize_heads: bool | None = None,
    draft_vocab_size: int | None = None,
) -> LoadedModel:
    """Load a model; see `EarlyExitEngine.from_checkpoint`.

    Raises:
        ValueError: the checkpoint is missing, damaged, or of a kind that cannot be computed, or the
            model or the number of processes does not fit the layout.
    """
    rank_info = None
    if (tensor_parallel, pipeline_parallel) != (1, 1):
        rank_info, device = join(tensor_parallel, pipeline_parallel, device)
    location = locate(path)
    description = describe(location)
    architecture, early_exit = description.architecture, description.early_exit
    assert architecture is not None
    if rank_info is not None:
        rank_info.check(architecture)
    _check_draft_vocab_size(draft_vocab_size, architecture)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = decide_dtype(dtype, architecture, early_exit, torch.device(device), rank_info)
    quantizer = make_quantizer(
        weight_dtype, quantize_heads, dtype, torch.device(device), description.quantization
    )
    _LOG.info(
        "reading weights in %s for %s, computing in %s",
        NAMES[dtype] if quantizer is None else quantizer.quantization.weight_dtype,
        device,
        NAMES[dtype],
    )
    weights = load_weights(
        model_weights(location, description, takes_quantized=True),
        dtype,
        torch.device(device),
        None if rank_info is None else partial(own_part, rank_info, architecture, early_exit),
        quantizer,
    )
    _LOG.info("weights are read; preparing layers")
    tokenizer, eod_id, backend = None, None, None
    other_end_ids: tuple[int, ...] = ()
    if description.tokenizer is not None:
        tokenizer = load_tokenizer(description.tokenizer, location.tokenizer_dir)
        eod_id = description.tokenizer.eod_id
        other_end_ids = description.tokenizer.other_end_ids
    if rank_info is None:
        model = SegmentedModel(
            architecture,
            early_exit,
            weights,
            compile_rows=compile_rows,
            draft_vocab_size=draft_vocab_size,
        )
    else:
        model, backend = parallel_model(
            rank_info, architecture, early_exit, weights, compile_rows, has_driver, draft_vocab_size
        )
    size = sum(tensor.nbytes for tensor in weights.values())
    # What layers have copied need not move.
    del weights
    if compile_rows and model.device.type == "cpu" and size >= _LARGE:
        use_huge_pages()
    quantization = None if quantizer is None else quantizer.quantization
    rule = _usable_rule(location, description, NAMES[dtype], quantization)
    return LoadedModel(model, tokenizer, eod_id, other_end_ids, backend, rule)


def _usable_rule(
    location: CheckpointLocation,
    description: ModelDescription,
    dtype: str,
    quantization: Quantization | None,
) -> StoredRule | None:
    """The stored rule, unless it is of other weights than those that were loaded."""
    rule = description.rule
    if rule is None:
        return None
    now = (None, None) if quantization is None else (quantization.weight_dtype, quantization.heads)
    found, problem = rule.promise, None
    if rule.iteration != location.iteration_dir.name:
        problem = f"it was found of {rule.iteration}, and this is {location.iteration_dir.name}"
    elif (found.weight_dtype, found.quantize_heads) != now:
        problem = f"it was found in {found.number_format}, and this is {number_format(dtype, *now)}"
    if problem is not None:
        _LOG.warning("the stored rule of early exit is not used: %s", problem)
        return None
    _LOG.info("stored with the model: %s", rule.sentence())
    if found.dtype != dtype:
        _LOG.warning(
            "the stored rule was found in %s, and this is %s: its promise is not for this format",
            found.dtype,
            dtype,
        )
    return rule


def _check_draft_vocab_size(size: int | None, shape: Architecture) -> None:
    if size is None:
        return
    if not shape.mtp_num_layers:
        problem = "needs a multi-token-prediction module, which there is not"
        allowed = "with a model that has one"
        raise FieldError("draft_vocab_size", problem, allowed, value=size)
    Range(least=1, most=shape.vocab_size, is_integer=True).check(draft_vocab_size=size)
