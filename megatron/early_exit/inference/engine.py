"""The engine: a model in one process that continues prompts."""

from collections import abc
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch

from megatron.early_exit.checkpoint.description import describe
from megatron.early_exit.checkpoint.location import locate
from megatron.early_exit.checkpoint.reader import CheckpointReader
from megatron.early_exit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from megatron.early_exit.checkpoint.weights import load_weights
from megatron.early_exit.inference.modes import (
    Choice,
    DecodingMode,
    EarlyExitMode,
    FullMode,
    Sampler,
)
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import (
    FinishReason,
    GeneratedToken,
    GenerationResult,
    GenerationStatistics,
)
from megatron.early_exit.inference.segments import SegmentedModel
from megatron.early_exit.inference.sequence import Sequence
from megatron.early_exit.inference.text import TextStream

Prompts = str | abc.Sequence[str] | abc.Sequence[abc.Sequence[int]]
DEFAULT_MAX_PENDING = 64
_ARGMAX_CHUNK = 256


class EarlyExitEngine:
    """Generates text with a model, with or without its exits.

    Args:
        model: the model.
        tokenizer: text to tokens and back; None where prompts are token ids only.
        eod_id: the token that ends a document; None is the tokenizer's.
        max_pending: see `EarlyExitMode`.

    Raises:
        ValueError: max_pending is below 1.
    """

    def __init__(
        self,
        model: SegmentedModel,
        tokenizer: Tokenizer | None = None,
        eod_id: int | None = None,
        max_pending: int = DEFAULT_MAX_PENDING,
    ) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending {max_pending} is out of range, allowed: 1 or more")
        self.model = model
        self.tokenizer = tokenizer
        self.eod_id = tokenizer.eod_id if eod_id is None and tokenizer is not None else eod_id
        self.max_pending = max_pending

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_pending: int = DEFAULT_MAX_PENDING,
    ) -> "EarlyExitEngine":
        """Load a model that Megatron saved in the `torch_dist` format, at whatever layout.

        Args:
            path: a save directory, or one iteration in it.
            dtype: torch.float32, torch.bfloat16 or torch.float16; by default what the model was
                trained in.
            device: where to run; by default the first GPU if there is one, else the CPU.
            max_pending: see `EarlyExitMode`.

        Raises:
            ValueError: the checkpoint is missing, damaged, or of a kind that cannot be computed.
        """
        location = locate(path)
        description = describe(location)
        architecture, early_exit = description.architecture, description.early_exit
        assert architecture is not None
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = getattr(torch, architecture.params_dtype)
        weights = load_weights(
            CheckpointReader(location.iteration_dir),
            architecture,
            early_exit,
            dtype,
            torch.device(device),
        )
        tokenizer, eod_id = None, None
        if description.tokenizer is not None:
            tokenizer = load_tokenizer(description.tokenizer, location.tokenizer_dir)
            eod_id = description.tokenizer.eod_id
        model = SegmentedModel(architecture, early_exit, weights)
        return cls(model, tokenizer, eod_id, max_pending)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The model's exits, each named by the number of backbone layers before it."""
        return tuple(exit_.position for exit_ in self.model.exits)

    def generate(
        self, prompts: Prompts, params: SamplingParams | None = None
    ) -> list[GenerationResult]:
        """Continue prompts, one after the other.

        Args:
            prompts: a text, several texts, or several lists of token ids.
            params: how; by default greedy with all layers.

        Returns:
            One result for each prompt, in their order.

        Raises:
            ValueError: a prompt is empty, too long or has unknown tokens, or `params` asks for
                exits that the model does not have.
            FloatingPointError: the logits are not finite: damaged weights, or an overflow.
        """
        params = params or SamplingParams()
        items: abc.Sequence[str | abc.Sequence[int]] = (
            [prompts] if isinstance(prompts, str) else prompts
        )
        encoded = [self.encode_prompt(prompt) for prompt in items]
        mode = self._mode(params)
        return [self._generate(prompt, mode, params) for prompt in encoded]

    def stream(
        self, prompt: str | abc.Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[GeneratedToken]:
        """Continue one prompt and hand out each token as soon as it is known.

        Raises:
            ValueError, FloatingPointError: as `generate`; a ValueError comes at once, not with the
                first token.
        """
        params = params or SamplingParams()
        return self._tokens(self.encode_prompt(prompt), self._mode(params), params)

    def argmax_tokens(self, token_ids: abc.Sequence[int]) -> list[int]:
        """What the full model finds most probable behind every prefix of a sequence, in one pass.

        Returns:
            As many tokens as `token_ids`: the one at index i follows `token_ids[: i + 1]`.

        Raises:
            ValueError: `token_ids` is empty, too long or has unknown tokens.
        """
        tokens = self._check_tokens(
            list(token_ids), self.model.architecture.max_position_embeddings
        )
        with torch.inference_mode():
            sequence = Sequence(self.model, len(tokens))
            sequence.tokens = tokens
            for index in range(len(self.model.segments)):
                hidden = sequence.run_segment(index)
            chunks = hidden.split(_ARGMAX_CHUNK)
            best = [self.model.final_head.logits(chunk).argmax(dim=-1) for chunk in chunks]
            return [int(token) for token in torch.cat(best)]

    def encode_prompt(self, prompt: str | abc.Sequence[int]) -> list[int]:
        """The token ids of a prompt, checked.

        Raises:
            ValueError: the prompt is empty, leaves no room for a token, or has unknown tokens.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    "prompts: a text needs a tokenizer that inference supports, and this model "
                    "has none; allowed: lists of token ids"
                )
            tokens = self.tokenizer.encode(prompt)
        else:
            tokens = list(prompt)
        return self._check_tokens(tokens, self.model.architecture.max_position_embeddings - 1)

    def _check_tokens(self, tokens: list[int], longest: int) -> list[int]:
        if not tokens:
            raise ValueError("prompts: a prompt is empty, allowed: 1 token or more")
        if len(tokens) > longest:
            raise ValueError(
                f"prompts: a prompt of {len(tokens)} tokens is too long, allowed: up to {longest}"
            )
        size = self.model.architecture.vocab_size
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < size:
                raise ValueError(f"prompts: token {token!r} is unknown, allowed: 0 to {size - 1}")
        return tokens

    def _mode(self, params: SamplingParams) -> DecodingMode:
        for token in params.stop_token_ids:
            if not 0 <= token < self.model.architecture.vocab_size:
                raise ValueError(
                    f"stop_token_ids {token} is out of range, allowed: 0 to "
                    f"{self.model.architecture.vocab_size - 1}"
                )
        if params.mode == "full":
            return FullMode()
        known = frozenset(self.exit_layers)
        wanted = known if params.exit_layers is None else frozenset(params.exit_layers)
        if unknown := sorted(wanted - known):
            listed = ", ".join(map(str, self.exit_layers)) or "none, the model has no exits"
            raise ValueError(f"exit_layers {unknown[0]} is unknown, allowed: {listed}")
        return EarlyExitMode(params.threshold, wanted, self.max_pending)

    def _generate(
        self, prompt: list[int], mode: DecodingMode, params: SamplingParams
    ) -> GenerationResult:
        start = first = perf_counter()
        tokens: list[GeneratedToken] = []
        for token in self._tokens(prompt, mode, params):
            if not tokens:
                first = perf_counter()
            tokens.append(token)
        end = perf_counter()
        reason = tokens[-1].finish_reason
        assert reason is not None
        texts = None if self.tokenizer is None else [token.text or "" for token in tokens]
        return GenerationResult(
            prompt_token_ids=prompt,
            token_ids=[token.token_id for token in tokens],
            text=None if texts is None else "".join(texts),
            token_texts=texts,
            exit_layers=[token.exit_layer for token in tokens],
            confidences=[token.confidence for token in tokens],
            logprobs=[token.logprob for token in tokens],
            finish_reason=reason,
            statistics=GenerationStatistics(len(prompt), len(tokens), first - start, end - first),
        )

    def _tokens(
        self, prompt: list[int], mode: DecodingMode, params: SamplingParams
    ) -> Iterator[GeneratedToken]:
        room = self.model.architecture.max_position_embeddings - len(prompt)
        count = min(params.max_tokens, room)
        stops = set(params.stop_token_ids)
        if self.eod_id is not None and not params.ignore_eos:
            stops.add(self.eod_id)
        sampler = Sampler(params, self.model.device)
        text = None if self.tokenizer is None else TextStream(self.tokenizer, prompt)
        with torch.inference_mode():
            sequence = Sequence(self.model, len(prompt) + count)
        sequence.tokens = list(prompt)
        for remaining in reversed(range(count)):
            with torch.inference_mode():
                choice = mode.next_token(sequence, sampler)
            sequence.tokens.append(choice.token_id)
            reason: FinishReason | None = "length" if remaining == 0 else None
            if choice.token_id in stops:
                reason = "stop"
            yield _generated(choice, text, reason)
            if reason is not None:
                return


def _generated(
    choice: Choice, text: TextStream | None, reason: FinishReason | None
) -> GeneratedToken:
    piece = None
    if text is not None:
        is_last = reason is not None
        piece = text.flush() if reason == "stop" else text.add(choice.token_id, is_last)
    return GeneratedToken(
        choice.token_id, piece, choice.exit_layer, choice.confidence, choice.logprob, reason
    )
