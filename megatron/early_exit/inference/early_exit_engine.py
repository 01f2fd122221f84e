"""The engine: a model, in one process or divided over several, that continues prompts."""

import logging
from collections import abc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch

from megatron.early_exit.checkpoint.stored_rule import StoredRule
from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.config import ExitMeasure
from megatron.early_exit.inference.distributed.mode_costs import ModeCosts
from megatron.early_exit.inference.distributed.parallel_backend import (
    ParallelBackend,
    SingleProcess,
)
from megatron.early_exit.inference.engine.cache_budget import plan_caches
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.request_factory import RequestFactory
from megatron.early_exit.inference.loading import load_model
from megatron.early_exit.inference.model.runner import SegmentRunner
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from megatron.early_exit.inference.modes.measures import GATE
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import GeneratedToken, GenerationResult
from megatron.early_exit.ranges import ONE_OR_MORE, Range

Prompts = str | abc.Sequence[str] | abc.Sequence[abc.Sequence[int]]
DEFAULT_MAX_PENDING = 64
_LOG = logging.getLogger(__name__)
DEFAULT_MAX_BATCH_SIZE = 16


class EarlyExitEngine:
    """Generates text with a model, with or without its exits.

    Args:
        model: the model.
        tokenizer: text to tokens and back; None where prompts are token ids only.
        eod_id: the token that ends a document; None is the tokenizer's.
        max_pending: see `EarlyExitMode`.
        max_batch_size: sequences that run at a time; others wait for their turn.
        max_sequence_length: most tokens of a sequence; by default as many as the model can.
        backend: how a model is divided of which `model` is a part; None where it is whole.
        other_end_ids: further tokens that end a text, beside the tokenizer's.
        kv_cache_memory: bytes for keys and values in this process, of running sequences and of past
            ones; by default up to twice what `max_batch_size` sequences of full length need, at
            most half of the memory that a machine has left, or what `gpu_memory_utilization`
            leaves of a GPU. When it runs out, the youngest sequence waits, and is computed again.
        gpu_memory_utilization: share of a GPU's memory that this process may use in all, where
            `kv_cache_memory` is not given (0.9).
        prefix_caching: keep keys and values of past sequences, so that what new ones begin with
            alike (a system prompt, an earlier turn of a chat) is not computed again.
        stored_rule: that of the model, see `tools/choose_threshold.py`.
        use_stored_rule: requests get of it what they do not say themselves.

    Attributes:
        max_batch_size: sequences that run at a time, as far as there is memory for them.
        pages: what sequences take of the caches, and how it went so far.
        readings: how long the weights of layers take to read for several rows; measured where
            layers are compiled for a CPU.

    Raises:
        ValueError: a size is out of range, there is not enough memory for one sequence, or the
            model is to be compiled and that is not possible.
    """

    def __init__(
        self,
        model: SegmentedModel,
        tokenizer: Tokenizer | None = None,
        eod_id: int | None = None,
        max_pending: int = DEFAULT_MAX_PENDING,
        max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
        max_sequence_length: int | None = None,
        backend: ParallelBackend | None = None,
        other_end_ids: abc.Sequence[int] = (),
        kv_cache_memory: int | None = None,
        gpu_memory_utilization: float | None = None,
        prefix_caching: bool = True,
        stored_rule: StoredRule | None = None,
        use_stored_rule: bool = True,
    ) -> None:
        context = model.architecture.max_position_embeddings
        length = context if max_sequence_length is None else max_sequence_length
        ONE_OR_MORE.check(max_pending=max_pending, max_batch_size=max_batch_size)
        Range(least=1, most=context, is_integer=True).check(max_sequence_length=length)
        self.model = model
        self.tokenizer = tokenizer
        self.eod_id = tokenizer.eod_id if eod_id is None and tokenizer is not None else eod_id
        ends = (*other_end_ids, *(() if tokenizer is None else tokenizer.other_end_ids))
        self.other_end_ids = tuple(one for one in dict.fromkeys(ends) if one != self.eod_id)
        self.max_pending = max_pending
        self.stored_rule = stored_rule
        self.max_sequence_length = length
        self._backend = SingleProcess(model) if backend is None else backend
        budget = plan_caches(
            model,
            max_batch_size,
            length,
            kv_cache_memory,
            gpu_memory_utilization,
            self._backend.agree,
        )
        self.pages = self._backend.pages(budget, prefix_caching)
        self.max_batch_size = budget.num_slots
        piece_size = None if budget.pieces is None else budget.pieces.size
        runner = SegmentRunner(model, budget.num_slots, length, piece_size)
        _LOG.info("warming up, which includes compiling where that is asked for")
        runner.warm_up()
        self.loop = self._backend.loop(runner, self.pages)
        whole = self._backend.architecture
        costs = ModeCosts.measured(self._backend, runner)
        self.readings = costs.readings
        self._requests = RequestFactory(
            vocab_size=whole.vocab_size,
            num_layers=whole.num_layers,
            exit_layers=self.exit_layers,
            max_sequence_length=length,
            max_pending=max_pending,
            tokenizer=tokenizer,
            eod_id=self.eod_id,
            other_end_ids=self.other_end_ids,
            draw_seed=self._backend.draw_seed,
            draft_costs=costs.drafts,
            exit_costs=costs.exits,
            mtp_costs=costs.mtp,
            num_depths=self.num_mtp_depths,
            exit_measure=self._backend.exit_measure,
            has_gates=self._backend.has_gates,
            stored_rule=stored_rule if use_stored_rule else None,
            has_blocks=self._backend.has_blocks,
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        max_pending: int = DEFAULT_MAX_PENDING,
        max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
        max_sequence_length: int | None = None,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        compile: bool = False,
        has_driver: bool = False,
        kv_cache_memory: int | None = None,
        gpu_memory_utilization: float | None = None,
        prefix_caching: bool = True,
        weight_dtype: str | None = None,
        quantize_heads: bool | None = None,
        draft_vocab_size: int | None = None,
        use_stored_rule: bool = True,
    ) -> "EarlyExitEngine":
        """Load a model that Megatron saved in the `torch_dist` format, at whatever layout.

        With more than one process (`torchrun`), each makes the same calls in the same order, and
        gets the same results. Or, with `has_driver`, rank 0 alone makes calls, in one thread at a
        time, and the others `work` for it.

        Args:
            path: a save directory, or one iteration in it.
            dtype: torch.float32, torch.bfloat16 or torch.float16; by default what the model was
                trained in, or float32 where this machine is slow in that and has the memory (a
                line says so; of several processes the first one decides).
            device: where to run; by default the first GPU if there is one (of several processes,
                each its own), else the CPU.
            max_pending, max_batch_size, max_sequence_length: see the class.
            tensor_parallel: processes that share each layer.
            pipeline_parallel: stages that share the layers; there are `tensor_parallel` times as
                many processes.
            compile: compile the layers. On a CPU that takes up to minutes at the first start and
                seconds at later ones, a C++ compiler, and the memory of the layers' weights again,
                and what this process has in memory moves to huge pages where there are any; steps
                of decoding are then a tenth to a half faster, small models' even more. On a GPU as
                CUDA graphs, which nobody has run yet.
            has_driver: rank 0 alone gets requests, as in a server.
            kv_cache_memory, gpu_memory_utilization, prefix_caching: see the class.
            weight_dtype: "int8" keeps the matrices of layers and heads in 8 bits, with a scale for
                each output channel, and multiplies them by rows of activations in 14 bits: on a CPU
                a quarter of the memory, and faster decoding of a few sequences. Outputs are those
                of the rounded weights, in a batch or alone. None is as the checkpoint is stored: in
                8 bits by `tools/checkpoint.py quantize`, else in `dtype`.
            quantize_heads: projections to the vocabulary are in `weight_dtype`, too; None is as the
                checkpoint is stored, or yes.
            draft_vocab_size: a multi-token-prediction module drafts the first so many tokens only,
                for which it reads as many rows of the output layer; by default those that exits
                answer with (`--exit-vocab-size`), or all. It changes no greedy text, and no
                distribution of sampled ones.
            use_stored_rule: see the class; what measures a model says no, so that a rule means the
                same whatever is stored.

        Raises:
            ValueError: the checkpoint is missing, damaged, or of a kind that cannot be computed,
                the model or the number of processes does not fit the layout, or `compile` or
                `weight_dtype` is not possible here.
        """
        loaded = load_model(
            path,
            dtype,
            device,
            tensor_parallel,
            pipeline_parallel,
            compile,
            has_driver,
            weight_dtype,
            quantize_heads,
            draft_vocab_size,
        )
        return cls(
            loaded.model,
            tokenizer=loaded.tokenizer,
            eod_id=loaded.eod_id,
            max_pending=max_pending,
            max_batch_size=max_batch_size,
            max_sequence_length=max_sequence_length,
            backend=loaded.backend,
            other_end_ids=loaded.other_end_ids,
            kv_cache_memory=kv_cache_memory,
            gpu_memory_utilization=gpu_memory_utilization,
            prefix_caching=prefix_caching,
            stored_rule=loaded.stored_rule,
            use_stored_rule=use_stored_rule,
        )

    @property
    def is_worker(self) -> bool:
        """Whether rank 0 drives this rank, which is only to `work`."""
        return self._backend.is_worker

    def work(self) -> None:
        """Compute for rank 0's requests until it closes, and part from the others.

        Workers do nothing else; while rank 0 has nothing to do they wait.

        Raises:
            ValueError: this is rank 0, or the engine is not `has_driver`.
        """
        self._backend.work(self.loop, self._requests.build)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Register a callback that runs before this process ends because a peer died or hangs.

        Nothing can be computed then, so each process ends with the status 1. Before that `callback`
        is called once, in a thread of the engine, with a sentence that says why; it has two
        seconds.
        """
        self._backend.on_death(callback)

    def close(self) -> None:
        """Disconnect from the other processes, if there are any; all have to do so.

        The other processes of a pipeline may do so early: they compute for the first one's requests
        until it closes.
        """
        self._backend.close()

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """The model's exits, each named by the number of backbone layers before it."""
        return self._backend.exit_layers

    @property
    def num_mtp_depths(self) -> int:
        """Tokens that a multi-token-prediction module can draft at a time; 0 where none drafts."""
        return self._backend.num_depths

    @property
    def exit_measure(self) -> ExitMeasure:
        """What confidence is where a request does not say it: it is stored with the model."""
        return self._backend.exit_measure

    @property
    def exit_measures(self) -> tuple[ExitMeasure, ...]:
        """What confidence can be for this model: that of gates needs gates."""
        return tuple(one for one in get_args(ExitMeasure) if one != GATE or self.has_gates)

    @property
    def has_gates(self) -> bool:
        """Whether the exits have gates."""
        return self._backend.has_gates

    @property
    def num_layers(self) -> int:
        """Layers of the whole model's backbone."""
        return self._backend.architecture.num_layers

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._backend.architecture.vocab_size

    def generate(
        self, prompts: Prompts, params: SamplingParams | abc.Sequence[SamplingParams] | None = None
    ) -> list[GenerationResult]:
        """Continue prompts, together.

        Args:
            prompts: a text, several texts, or several lists of token ids.
            params: how, for all of them or for each; by default greedy, by the stored
                rule, else with all layers.

        Returns:
            One result for each prompt, in their order. Each is what it would be alone. One whose
            logits were not finite (damaged weights, or an overflow) has `finish_reason` "error".

        Raises:
            ValueError: a prompt is empty, too long or has unknown tokens, or `params` asks for
                exits that the model does not have; nothing is generated then.
            Exception: what came up while one of the prompts was computed, for example
                `torch.OutOfMemoryError`. It is raised when all have ended; their results are lost.
        """
        items: abc.Sequence[str | abc.Sequence[int]] = (
            [prompts] if isinstance(prompts, str) else prompts
        )
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(items)
        if len(params) != len(items):
            raise ValueError(
                f"params: {len(params)} are given for {len(items)} prompts, allowed: one for all "
                "or one for each"
            )
        requests = [self._request(*pair) for pair in zip(items, params, strict=True)]
        self._finish(requests)
        return [request.result() for request in requests]

    def _finish(self, requests: abc.Sequence[Request]) -> None:
        try:
            for request in requests:
                self.loop.submit(request)
            while any(not request.is_finished for request in requests):
                self.loop.step()
            for request in requests:
                if request.exception is not None:
                    raise request.exception
        finally:
            for request in requests:
                self.loop.cancel(request.key)

    def stream(
        self, prompt: str | abc.Sequence[int], params: SamplingParams | None = None
    ) -> Iterator[GeneratedToken]:
        """Continue one prompt and hand out each token as soon as it is known.

        Raises:
            ValueError: as `generate`; it comes at once, not with the first token.
            FloatingPointError: the logits are not finite: damaged weights, or an overflow.
            Exception: what came up while the prompt was computed.
        """
        return self._tokens(self._request(prompt, params or SamplingParams()))

    def submit(
        self, prompt: str | abc.Sequence[int], params: SamplingParams, group: Request | None = None
    ) -> Request:
        """Take in a request, which `step` brings forward together with the others.

        Args:
            group: the first one of those that belong together: they have one turn among all.

        Raises:
            ValueError: as `generate`.
        """
        request = self._request(prompt, params)
        if group is not None:
            request.sequence.group = group.sequence.group
        self.loop.submit(request)
        return request

    def _tokens(self, request: Request) -> Iterator[GeneratedToken]:
        self.loop.submit(request)
        try:
            given = 0
            while given < len(request.tokens) or not request.is_finished:
                if given == len(request.tokens):
                    self.loop.step()
                for token in request.tokens[given:]:
                    given += 1
                    yield token
        finally:
            self.loop.cancel(request.key)
        if request.error is not None:
            raise request.exception or FloatingPointError(request.error)

    def step(self) -> list[tuple[Request, GeneratedToken]]:
        """Bring the submitted requests forward by one batch, and the scoring of prompts by one
        piece; returns the tokens that came of it.

        An exception that comes up in there ends those requests that were in the batch, or the one
        that it is about: they have an `error` and that `exception`, and the others go on.

        Raises:
            Exception: the one that came up, where the engine cannot go on: its processes are no
                longer at the same step, or its device no longer computes.
        """
        return self.loop.step()

    def cancel(self, request: Request) -> None:
        """End a request; its result has what it got so far.

        That may be more or less on the ranks of a pipeline, which do not wait for each other here.
        """
        self.loop.cancel(request.key)

    def argmax_tokens(self, token_ids: abc.Sequence[int]) -> list[int]:
        """What the full model finds most probable behind every prefix of a sequence, in one pass.

        Returns:
            As many tokens as `token_ids`: the one at index i follows `token_ids[: i + 1]`.

        Raises:
            ValueError: `token_ids` is empty, too long or has unknown tokens.
            FloatingPointError: the logits are not finite: damaged weights, or an overflow.
        """
        params = SamplingParams(mode="full", max_tokens=0, prompt_logprobs=0)
        request = self._request(token_ids, params)
        self._finish([request])
        if request.error is not None:
            raise FloatingPointError(request.error)
        assert request.scoring is not None
        return [score.best_token for score in request.scoring.scores]

    def _request(self, prompt: str | abc.Sequence[int], params: SamplingParams) -> Request:
        if self.is_worker:
            raise ValueError("a rank that rank 0 drives makes no requests, allowed: work")
        return self._requests.build(prompt, params)
