"""Small models with a multi-token-prediction module, and what it says, without any cache.

`depth_logits` is written from the definition: one pass over a whole text for each depth, with the
parts of the reference decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.checkpoint.architecture import Architecture
from tests.helpers.reference_decoder import _attention, _mlp, _norm, all_heads
from tests.helpers.tiny_models import LLAMA, TinyModel, make_model


def depth_logits(model: TinyModel, tokens: Sequence[int]) -> list[Tensor]:
    """For each depth k the logits [s - k, v] of its rows over a text of s tokens: row i predicts
    token i + k + 1."""
    w, a = model.weights, model.architecture
    embedding = w["embedding.word_embeddings.weight"]
    output = embedding if a.share_embeddings_and_output_weights else w["output_layer.weight"]
    output = w.get("embedding.projection.weight", output) if output is embedding else output
    hidden = _norm(model, "decoder.final_layernorm.", all_heads(model, tokens)["final"].stream)
    logits = []
    for depth in range(1, a.mtp_num_layers + 1):
        prefix = f"mtp.layers.{0 if a.mtp_use_repeated_layer else depth - 1}."
        ahead = embedding[torch.tensor(tokens[depth:], dtype=torch.long)]
        parts = (
            _norm(model, f"{prefix}enorm.", ahead),
            _norm(model, f"{prefix}hnorm.", hidden[:-1]),
        )
        x = torch.cat(parts, dim=1) @ w[f"{prefix}eh_proj.weight"].T
        layer = f"{prefix}transformer_layer."
        x = x + _attention(model, f"{layer}self_attention.", x)
        x = x + _mlp(model, f"{layer}mlp.", x)
        hidden = _norm(model, f"{prefix}final_layernorm.", x)
        logits.append(hidden @ output.T)
    return logits


def assert_drafts(
    model: TinyModel,
    tokens: Sequence[int],
    drafts: Sequence[int],
    num_answers: int | None = None,
) -> None:
    """Check that each draft behind a text is the most probable token by its depth, among the first
    ones of the vocabulary."""
    # No depth looks ahead of the tokens that it has, so one text is enough for all of them.
    logits = depth_logits(model, [*tokens, *drafts])
    row = len(tokens) - 2
    expected = [int(one[row, :num_answers].argmax()) for one in logits[: len(drafts)]]
    assert list(drafts) == expected


def mtp_model(
    depths: int = 2,
    repeated: bool = False,
    architecture: Architecture = LLAMA,
    noise: float | None = 0.4,
    memory: float = 0.15,
    seed: int = 0,
    **options: Any,
) -> TinyModel:
    """A model with the module.

    Args:
        depths: K.
        repeated: one layer serves all of them.
        architecture: of the backbone.
        noise: how far the weights of the module are from those that foresee a text in which each
            token follows from the one before, as it does mostly in this model; None leaves model
            and module random.
        memory: how much the tokens before that one count.
        seed: of the weights.
        options: see `make_model`.
    """
    shape = replace(architecture, mtp_num_layers=depths, mtp_use_repeated_layer=repeated)
    model = make_model(shape, seed=seed, **options)
    if noise is None:
        return model
    weights = dict(model.weights)
    for name, tensor in weights.items():
        if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            weights[name] = memory * tensor
    generator = torch.Generator().manual_seed(seed)
    for number in range(shape.mtp_stored_layers):
        prefix = f"mtp.layers.{number}."
        noisy = noise * torch.randn(shape.hidden_size, 2 * shape.hidden_size, generator=generator)
        takes_embedding = torch.eye(shape.hidden_size, 2 * shape.hidden_size)
        weights[f"{prefix}eh_proj.weight"] = (
            takes_embedding + noisy * (2 * shape.hidden_size) ** -0.5
        ).to(tensor.dtype)
        for ending in ("weight", "bias"):
            gain = weights.get(f"decoder.final_layernorm.{ending}")
            if gain is not None:
                weights[f"{prefix}final_layernorm.{ending}"] = gain
    return TinyModel(shape, model.early_exit, weights)
