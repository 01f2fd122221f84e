"""What weights in fewer bits change of a model: its perplexity, and its choices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.early_exit.checkpoint.description import describe, read_description
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.tokenizer import load_tokenizer
from megatron.early_exit.checkpoint.weights import quantized_refusal
from megatron.early_exit.inference.early_exit_engine import EarlyExitEngine
from megatron.early_exit.inference.params import SamplingParams


@dataclass(frozen=True, slots=True)
class QuantizationLoss:
    """How a model with quantized weights predicts a text, beside the model itself.

    Attributes:
        num_tokens: tokens that are predicted.
        perplexity: of them, by the model as it is.
        quantized_perplexity: by the model with quantized weights.
        agreement: share of the positions at which both find the same token most probable.
    """

    num_tokens: int
    perplexity: float
    quantized_perplexity: float
    agreement: float


@dataclass(frozen=True, slots=True)
class _Predictions:
    logprobs: list[float]
    choices: list[int]

    @property
    def perplexity(self) -> float:
        return math.exp(-sum(self.logprobs) / len(self.logprobs))


def quantization_loss(
    path: Path,
    text: str,
    quantize_heads: bool = True,
    device: str = "cpu",
    quantized_path: Path | None = None,
) -> QuantizationLoss:
    """Let all layers of a checkpoint's model predict a text, as it is and with weights in 8 bits.

    The text is cut into pieces as long as the model's context.

    Args:
        path: the checkpoint.
        text: what is predicted.
        quantize_heads: projections to the vocabulary are in 8 bits, too.
        device: where the model is computed.
        quantized_path: a checkpoint of the model that is stored in 8 bits; None quantizes the model
            when it is loaded.

    Raises:
        ValueError: the checkpoint's matrices are in 8 bits already, or it cannot be loaded or has
            no tokenizer, or the text has fewer than two tokens.
        FloatingPointError: logits are not finite.
    """
    if read_description(path).quantization is not None:
        raise quantized_refusal(path)
    tokens = encoded(path, text)
    engine = EarlyExitEngine.from_checkpoint(path, device=device, max_batch_size=1)
    length = engine.max_sequence_length
    pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    plain = _predict(engine, pieces)
    # One model at a time is in memory.
    dtype = engine.model.dtype
    del engine
    quantized = _predict(
        EarlyExitEngine.from_checkpoint(
            quantized_path or path,
            dtype,
            device,
            max_batch_size=1,
            weight_dtype="int8",
            quantize_heads=quantize_heads,
        ),
        pieces,
    )
    same = [a == b for a, b in zip(plain.choices, quantized.choices, strict=True)]
    return QuantizationLoss(
        num_tokens=len(same),
        perplexity=plain.perplexity,
        quantized_perplexity=quantized.perplexity,
        agreement=sum(same) / len(same),
    )


def encoded(path: Path, text: str) -> list[int]:
    """The tokens of a text, of which some can be predicted.

    Args:
        path: a checkpoint, whose tokenizer is used.

    Raises:
        ValueError: it has none, or the text has fewer than two tokens.
    """
    location = locate(path)
    description = describe(location).tokenizer
    tokenizer = None
    if description is not None:
        tokenizer = load_tokenizer(description, location.tokenizer_dir)
    if tokenizer is None:
        raise ValueError(f"checkpoint {path}: has no tokenizer, allowed: one that has")
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens, allowed: 2 or more")
    return tokens


def _predict(engine: EarlyExitEngine, pieces: Sequence[Sequence[int]]) -> _Predictions:
    """The predictions of all tokens of some pieces of text but the first of each."""
    logprobs: list[float] = []
    choices: list[int] = []
    scoring = SamplingParams(mode="full", max_tokens=0, prompt_logprobs=1)
    for piece in pieces:
        (result,) = engine.generate([piece], scoring)
        if result.error is not None:
            raise FloatingPointError(result.error)
        assert result.prompt_tokens is not None
        for token in result.prompt_tokens[1:]:
            assert token.logprob is not None
            logprobs.append(token.logprob)
            choices.append(token.top_logprobs[0][0])
    return _Predictions(logprobs, choices)
