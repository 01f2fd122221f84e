"""The reference decoder for inference: no cache, one forward pass over the whole prefix per token.

It is written from the definitions, independently of the engine: plain loops over layers and heads,
Megatron's rotary embeddings, weights in the layout in which they are stored, and one forward pass
for each token.

Where exits propagate, a position that has left at one has the same hidden state in all later half
layers: the forward pass computes them for all positions, and then takes the old state for those
that have left.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.helpers.reference_pauses import asks_exits
from tests.helpers.tiny_models import TinyModel


@dataclass(frozen=True)
class ReferenceToken:
    token_id: int
    exit_layer: int
    confidence: float
    logprob: float


@dataclass(frozen=True)
class ReferenceHead:
    """What a head says of each position of a text, [s, v], how many tokens it can answer with, the
    residual stream [s, h] there and at the exit before, and what its gate says [s]."""

    logits: Tensor
    num_answers: int
    stream: Tensor
    stream_before: Tensor
    gate: Tensor | None = None


def generate(
    model: TinyModel,
    prompt: Sequence[int],
    max_tokens: int,
    threshold: float | Sequence[float] | None,
    exit_layers: Sequence[int] | None = None,
    forbidden: Collection[int] = (),
    num_forbidden: int = 0,
    measure: str = "max_probability",
    decay: float = 0.0,
    most_tokens: int | None = None,
    propagates: bool = False,
    pays_at: int = 0,
) -> list[ReferenceToken]:
    """Greedy tokens; a threshold of None means that no exit is ever taken.

    The rule: a token is the choice of the first enabled exit whose confidence on the last position
    reaches the threshold, or that of the exit where there are several, else of the final head. A
    confidence is what `confidence_of` says. Thresholds decay over `most_tokens`,
    by default all of them. None of the first
    `num_forbidden` tokens may be `forbidden`; that changes the choice, not the confidence. Where it
    `propagates`, a position is held behind the exit that has given its token. With `pays_at` exits
    pause where they do not pay in a batch of so many sequences, see `asks_exits`.
    """
    tokens, generated = list(prompt), []
    left: dict[int, int] = {}
    places, given_by = model.early_exit.positions, []
    for _ in range(max_tokens):
        heads = all_heads(model, tokens, left)
        limits = _limits(
            model, threshold, exit_layers, decay, len(generated) / (most_tokens or max_tokens)
        )
        if pays_at:
            asked = [places.index(one) for one in limits]
            kind = {"is_gated": measure == "gate", "is_held": propagates}
            if not asks_exits(model, asked, pays_at, given_by, **kind):
                limits = {}
        place, probabilities, confidence = _answer(heads, -1, limits, measure)
        given_by.append(len(places) if place == "final" else places.index(place))
        layer = place if isinstance(place, int) else model.architecture.num_layers
        if propagates and place != "final":
            left[len(tokens) - 1] = layer
        best, token = (float(v) for v in probabilities.max(-1))
        logprob = math.log(best)
        if token in forbidden and len(generated) < num_forbidden:
            probabilities[list(forbidden)] = 0
            allowed, token = (float(v) for v in probabilities.max(-1))
            logprob = math.log(allowed)
        chosen = ReferenceToken(int(token), layer, confidence, logprob)
        generated.append(chosen)
        tokens.append(chosen.token_id)
    return generated


def choices(
    model: TinyModel,
    prompt: Sequence[int],
    tokens: Sequence[int],
    threshold: float | Sequence[float] | None,
    measure: str = "max_probability",
    decay: float = 0.0,
) -> list[ReferenceToken]:
    """What `generate` chooses behind a prompt and each beginning of `tokens`: a text that is equal
    to its choices is what `generate` gives. That takes one pass, since heads do not look ahead.
    Thresholds decay over the number of tokens."""
    heads = all_heads(model, [*prompt, *tokens])
    chosen = []
    for place in range(len(tokens)):
        limits = _limits(model, threshold, None, decay, place / len(tokens))
        position = len(prompt) - 1 + place
        answering, probabilities, confidence = _answer(heads, position, limits, measure)
        layer = answering if isinstance(answering, int) else model.architecture.num_layers
        best, token = (float(value) for value in probabilities.max(-1))
        chosen.append(ReferenceToken(int(token), layer, confidence, math.log(best)))
    return chosen


def scores(
    model: TinyModel,
    tokens: Sequence[int],
    threshold: float | Sequence[float] | None,
    exit_layers: Sequence[int] | None = None,
    measure: str = "max_probability",
    decay: float = 0.0,
    propagates: bool = False,
) -> list[ReferenceToken]:
    """The log-probability of each token of a text, except the first, by the rule of `generate`;
    thresholds decay over the text, and all positions are held that leave."""
    heads = all_heads(model, tokens)
    scored = []
    left: dict[int, int] = {}
    for position, token in enumerate(tokens[1:]):
        if propagates:
            heads = all_heads(model, tokens, left)
        limits = _limits(model, threshold, exit_layers, decay, (position + 1) / len(tokens))
        place, probabilities, confidence = _answer(heads, position, limits, measure)
        layer = place if isinstance(place, int) else model.architecture.num_layers
        if propagates and place != "final":
            left[position] = layer
        logprob = float(probabilities[token].log())
        scored.append(ReferenceToken(token, layer, confidence, logprob))
    return scored


def _limits(
    model: TinyModel,
    threshold: float | Sequence[float] | None,
    exit_layers: Sequence[int] | None,
    decay: float,
    share: float,
) -> dict[int, float]:
    """The threshold of each enabled exit, by its layer, behind a share of all tokens."""
    if threshold is None:
        return {}
    known = model.early_exit.positions
    enabled = [layer for layer in known if exit_layers is None or layer in exit_layers]
    limits = threshold if isinstance(threshold, Sequence) else [threshold] * len(enabled)
    if decay:
        limits = [0.9 * one + math.exp(-decay * share) / 10 for one in limits]
    return dict(zip(enabled, limits, strict=True))


def _answer(
    heads: dict[int | str, ReferenceHead],
    position: int,
    limits: dict[int, float],
    measure: str,
) -> tuple[int | str, Tensor, float]:
    """The head that gives the token at a position, its probabilities [v] in fp64, and its
    confidence."""
    for layer in (*limits, "final"):
        confidence = confidence_of(heads[layer], position, measure)
        # It is an fp32 number: close to 1 it is 1.
        confidence = float(torch.tensor(confidence, dtype=torch.float32))
        if layer == "final" or confidence >= limits[layer]:
            break
    probabilities = heads[layer].logits[position].double().softmax(-1)
    return layer, probabilities, confidence


def confidence_of(head: ReferenceHead, position: int, measure: str) -> float:
    """How sure a head is at a position."""
    probabilities = head.logits[position].double().softmax(-1)
    if measure == "gate" and head.gate is not None:
        return float(head.gate[position])
    if measure in ("max_probability", "gate"):
        return float(probabilities.max())
    if measure == "margin":
        first, second, *_ = sorted(probabilities.tolist(), reverse=True)
        return first - second
    if measure == "entropy":
        entropy = -sum(p * math.log(p) for p in probabilities.tolist() if p > 0)
        return 1 - entropy / math.log(head.num_answers)
    assert measure == "similarity"
    here, before = head.stream[position].double(), head.stream_before[position].double()
    return max(float(here @ before / (here.norm() * before.norm())), 0.0)


def all_logits(model: TinyModel, tokens: Sequence[int]) -> dict[int | str, Tensor]:
    """Logits [s, v] of every head over a sequence, by position of the exit and "final"; no position
    is held."""
    return {layer: head.logits for layer, head in all_heads(model, tokens).items()}


def all_heads(
    model: TinyModel, tokens: Sequence[int], left: Mapping[int, int] | None = None
) -> dict[int | str, ReferenceHead]:
    """What every head has over a sequence, by position of the exit and "final".

    Heads that are tied to the embedding project with `embedding.projection.weight` where the model
    has such a tensor.

    Args:
        left: of the positions that are held behind an exit, the exit.
    """
    w, a, options = model.weights, model.architecture, model.early_exit
    left = left or {}
    embedding = w["embedding.word_embeddings.weight"]
    x = embedding[torch.tensor(tokens)]
    if a.position_embedding_type == "learned_absolute":
        x = x + w["embedding.position_embeddings.weight"][: len(tokens)]
    heads: dict[int | str, ReferenceHead] = {}
    stream_before = x
    for layer in range(a.num_layers):
        prefix = f"decoder.layers.{layer}."
        position = layer + 1
        held = torch.tensor([left.get(t, position) < position for t in range(len(tokens))])
        x = torch.where(held[:, None], x, x + _attention(model, f"{prefix}self_attention.", x))
        before_mlp = x
        if options.use_exit_mlp:
            # The exit's own MLP takes the place of this one.
            held = torch.tensor([left.get(t, position + 1) <= position for t in range(len(tokens))])
        x = torch.where(held[:, None], x, x + _mlp(model, f"{prefix}mlp.", x))
        if position in options.positions:
            exit_prefix = f"exits.{position}."
            branch = x
            if options.use_exit_mlp:
                branch = before_mlp + _mlp(model, f"{exit_prefix}mlp.", before_mlp)
            if options.use_exit_block:
                block = f"{exit_prefix}block."
                branch = branch + _attention(model, f"{block}self_attention.", branch)
                branch = branch + _mlp(model, f"{block}mlp.", branch)
            if options.use_exit_norm:
                branch = _norm(model, f"{exit_prefix}norm.", branch)
            projection = w.get("embedding.projection.weight", embedding)
            if options.untie_exit_output_weights:
                projection = w[f"{exit_prefix}projection.weight"]
            if options.share_final_head:
                branch = _norm(model, "decoder.final_layernorm.", branch)
                projection = w.get("output_layer.weight", projection)
            logits = branch @ projection.T
            num_answers = options.exit_vocab_size or a.vocab_size
            logits[:, num_answers:] = -torch.inf
            stream = before_mlp if options.use_exit_mlp else x
            gate = None
            if options.use_exit_gate:
                length = (stream.double().square().mean(-1) + a.layernorm_epsilon).sqrt()
                score = (stream.double() @ w[f"{exit_prefix}gate.weight"][0].double()) / length
                gate = 1 / (1 + torch.exp(-score - w[f"{exit_prefix}gate.bias"].double()))
            heads[position] = ReferenceHead(logits, num_answers, stream, stream_before, gate)
            stream_before = stream
    normed = _norm(model, "decoder.final_layernorm.", x)
    output = w.get("embedding.projection.weight", embedding)
    if not a.share_embeddings_and_output_weights:
        output = w["output_layer.weight"]
    heads["final"] = ReferenceHead(normed @ output.T, a.vocab_size, x, stream_before)
    return heads


def _norm(model: TinyModel, prefix: str, x: Tensor) -> Tensor:
    a, gain = model.architecture, model.weights[f"{prefix}weight"]
    if a.layernorm_zero_centered_gamma:
        gain = gain + 1
    if a.normalization == "LayerNorm":
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        normed = centred / (variance + a.layernorm_epsilon).sqrt()
        return normed * gain + model.weights[f"{prefix}bias"]
    return x / (x.square().mean(-1, keepdim=True) + a.layernorm_epsilon).sqrt() * gain


def _linear(model: TinyModel, prefix: str, x: Tensor) -> Tensor:
    y = x @ model.weights[f"{prefix}weight"].T
    bias = model.weights.get(f"{prefix}bias")
    return y if bias is None else y + bias


def _mlp(model: TinyModel, prefix: str, x: Tensor) -> Tensor:
    a = model.architecture
    y = _linear(model, f"{prefix}linear_fc1.", _norm(model, f"{prefix}linear_fc1.layer_norm_", x))
    gate = y[:, : a.ffn_hidden_size]
    gate = {
        "silu": lambda t: t / (1 + torch.exp(-t)),
        "gelu": lambda t: t * 0.5 * (1 + torch.erf(t / math.sqrt(2))),
        "gelu_tanh": lambda t: (
            t * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3)))
        ),
        "squared_relu": lambda t: t.clamp(min=0) ** 2,
        "quick_gelu": lambda t: t / (1 + torch.exp(-1.702 * t)),
    }[a.activation](gate)
    if a.gated_linear_unit:
        gate = gate * y[:, a.ffn_hidden_size :]
    return _linear(model, f"{prefix}linear_fc2.", gate)


def _attention(model: TinyModel, prefix: str, x: Tensor) -> Tensor:
    a, size = model.architecture, model.architecture.kv_channels
    normed = _norm(model, f"{prefix}linear_qkv.layer_norm_", x)
    per_group = a.num_attention_heads // a.num_query_groups
    mixed = _linear(model, f"{prefix}linear_qkv.", normed)
    mixed = mixed.view(len(x), a.num_query_groups, per_group + 2, size)
    scale = a.softmax_scale or size**-0.5
    outputs = []
    for group in range(a.num_query_groups):
        key, value = mixed[:, group, per_group], mixed[:, group, per_group + 1]
        if a.qk_layernorm:
            key = _norm(model, f"{prefix}k_layernorm.", key)
        key = _rotate(model, key)
        for head in range(per_group):
            query = mixed[:, group, head]
            if a.qk_layernorm:
                query = _norm(model, f"{prefix}q_layernorm.", query)
            scores = _rotate(model, query) @ key.T * scale
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
    return _linear(model, f"{prefix}linear_proj.", torch.cat(outputs, dim=-1))


def _rotate(model: TinyModel, x: Tensor) -> Tensor:
    """Rotary embedding of one head [s, hn], a pair of entries at a time."""
    a = model.architecture
    if a.position_embedding_type != "rope":
        return x
    turned = int(a.kv_channels * a.rotary_percent)
    result = x.clone()
    positions = torch.arange(len(x), dtype=torch.float64)
    positions /= a.rotary_seq_len_interpolation_factor or 1.0
    for pair in range(turned // 2):
        i, j = (2 * pair, 2 * pair + 1) if a.rotary_interleaved else (pair, pair + turned // 2)
        angle = positions * _frequency(a.rotary_base ** (-2 * pair / turned), a.rope_scaling_factor)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        result[:, i] = x[:, i] * cos - x[:, j] * sin
        result[:, j] = x[:, j] * cos + x[:, i] * sin
    return result


def _frequency(frequency: float, llama3_factor: float | None) -> float:
    if llama3_factor is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192:
        return frequency / llama3_factor
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / llama3_factor + smooth * frequency
