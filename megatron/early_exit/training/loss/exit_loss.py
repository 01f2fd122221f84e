"""The deferred auxiliary loss of the exits.

At an exit the hidden state passes through one autograd function. Going forward it is the
identity. In backward it rebuilds the exit's graph from the saved hidden state, computes the
weighted exit loss, backpropagates it there and then, and adds its gradient to the incoming one.
So stage i of a pipeline minimises its exit losses plus <g_i, x_i> (EE-LLM, arXiv 2312.04916),
under any of Megatron's schedules, with nothing more to transfer; and the exit's own forward runs
in the backward phase, one microbatch at a time.
"""

from collections import deque
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.nn import functional

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.exit_head import ExitHeads
from megatron.early_exit.model.rng import derived_seed, dropout_rng
from megatron.early_exit.training.loss.curriculum import LossCurriculum
from megatron.early_exit.training.loss.exit_input import ExitInput, Targets
from megatron.early_exit.training.loss.final_tokens import FinalTokens
from megatron.early_exit.training.loss.gate_metrics import GateMetrics
from megatron.early_exit.training.loss.head_loss import (
    HeadLoss,
    HeadLossOptions,
    Teacher,
    head_loss,
)
from megatron.early_exit.training.loss.loss_weight import exit_loss_weights
from megatron.early_exit.training.loss.metrics import ExitMetrics
from megatron.early_exit.training.loss.vocabulary import LocalVocabulary


class _Deferred(torch.autograd.Function):
    """Identity; in backward, `run(hidden)` is added to the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.run = run
        # A tensor of its own on the same memory: the pipeline frees a stage's output through
        # `.data` after sending it, and refuses to do so for a view.
        output = torch.empty((1,), dtype=hidden.dtype, device=hidden.device)
        output.data = hidden.data
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (hidden,) = ctx.saved_tensors
        return ctx.run(hidden).add_(gradient), None


@dataclass(frozen=True, kw_only=True)
class LossNormalization:
    """How Megatron reduces a loss over tokens.

    Attributes:
        per_token: `--calculate-per-token-loss`: sums here, divided by the tokens of the global
            batch when gradients are finished; else the mean of each microbatch.
        context_parallel_size: ranks that a sequence is divided over.
    """

    per_token: bool
    context_parallel_size: int


class EndedAtExit(Exception):
    """The last exit of a model chunk has been passed, and nobody needs what comes after it.

    Args:
        hidden: [s, b, h], what went on behind the exit.
    """

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class ExitObjective:
    """The exits' share of the training objective; the `exit_tap` of a model.

    Args:
        config: the exits.
        normalization: how the final loss is reduced, the exits' are reduced the same way.
        chunk_tokens: tokens whose logits exist at a time; None for a default by memory.
        seed: of the exits' dropout.
        curriculum: which exits learn in an iteration, and the weights of LayerSkip (arXiv
            2404.16710); None for all, with the weights of `config`.

    Attributes:
        weights: of the exits' losses in this iteration, by position.
        final_weight: of the final head's loss.
        ends_at_exit: the next forward pass may end at the last exit of its model chunk, by
            `EndedAtExit`, since no stage takes the microbatch on.
        learning_stages: on which the microbatch of the next forward pass runs backward, so that
            gates there need the final head's tokens; None is all.
        reaches_final_head: the microbatch of the next backward pass has been run to the end; from
            others gates do not learn.
    """

    def __init__(
        self,
        config: EarlyExitConfig,
        normalization: LossNormalization,
        chunk_tokens: int | None = None,
        seed: int = 0,
        curriculum: LossCurriculum | None = None,
    ) -> None:
        self.config = config
        self.normalization = normalization
        self.chunk_tokens = chunk_tokens
        self.seed = seed
        self.temperatures = {one.position: one.temperature for one in config.exits}
        self.curriculum = curriculum
        self.weights = exit_loss_weights(config, iteration=0)
        self.final_weight = 1.0
        self._active = frozenset(config.positions)
        self._have_learnt: frozenset[int] = frozenset()
        self.training_metrics = ExitMetrics(config.positions, config.use_exit_gate)
        self.validation_metrics = ExitMetrics(config.positions, config.use_exit_gate)
        self.ends_at_exit = False
        self.learning_stages: Collection[int] | None = None
        self.reaches_final_head = True
        self._final_tokens: FinalTokens | None = None
        self._loss_scale: Tensor | float = 1.0
        self._per_token_share = self._gate_share = 1.0
        self._iteration = 0
        self._dropout_draws = 0
        self._of_this_pass: list[ExitInput] = []
        self._of_other_passes: dict[int, deque[ExitInput]] = {}

    def start_iteration(self, iteration: int) -> None:
        """Set the loss weights for the iteration after `iteration` completed ones."""
        self.weights = exit_loss_weights(self.config, iteration)
        if self.curriculum is not None:
            self.weights, self.final_weight = self.curriculum.weights(self.weights, iteration)
            self._active = self.curriculum.active(iteration)
        self._have_learnt |= self._active
        if iteration != self._iteration:
            self._iteration, self._dropout_draws = iteration, 0

    @property
    def yet_to_learn(self) -> frozenset[int]:
        """The exits that have not learnt in any iteration so far, so that there is no loss to show
        of them."""
        return frozenset(self.config.positions) - self._have_learnt

    def take_means(
        self, groups: ProcessGroupCollection, device: torch.device, training: bool
    ) -> dict[str, Tensor]:
        """What heads have measured since the last call, in training or in evaluation; a collective
        call, see `ExitMetrics.take_means`; each is 0-dimensional. Exits that have never learned are
        left out."""
        if not self.config.positions:
            return {}
        if training:
            return self.training_metrics.take_means(groups, device, but=self.yet_to_learn)
        for position in self._of_other_passes:
            self._measure_all_but(0, position)
        return self.validation_metrics.take_means(groups, device)

    def start_step(self, per_token_share: float, gate_share: float) -> None:
        """Prepare a step in which stages work on different microbatches.

        Args:
            per_token_share: microbatches that contribute on the last stage, whose tokens are
                counted, over those that contribute on this one.
            gate_share: microbatches that contribute on this one, over those of them that gates
                learn from.
        """
        self._per_token_share, self._gate_share = per_token_share, gate_share

    def connect(self, final_tokens: FinalTokens) -> None:
        """Let gates of other stages than the last learn, and be measured."""
        self._final_tokens = final_tokens

    def set_loss_scale(self, scale: Tensor) -> None:
        """For `config.experimental_attention_variant_loss_scale_func`, the hook that Megatron
        calls at every forward step with gradient scale * context parallel size / microbatches
        (without the last two when losses are reduced per token), 0-dimensional or [1]."""
        if self.normalization.per_token:
            self._loss_scale = scale * self._per_token_share
        else:
            self._loss_scale = scale / self.normalization.context_parallel_size

    def __call__(
        self,
        exits: ExitHeads,
        position: int,
        hidden: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        final_tokens: Tensor | None,
        layer_kwargs: dict[str, Any],
        asked: Tensor | None = None,
        asked_at_end: Tensor | None = None,
    ) -> Tensor:
        """Attach the loss of the exit at `position` to `hidden` [s, b, h]; see `ExitTap`.

        In evaluation the loss is only measured: at once; or at the end of the pass, if this chunk
        has gates and the final head that they are compared with; or once the final head's tokens
        have come, if they do from another chunk.
        """
        targets = Targets.of(labels, loss_mask, final_tokens, asked, asked_at_end)
        exit_input = ExitInput(exits, position, hidden, targets, layer_kwargs)
        if exits.training:
            return self.in_training(exit_input)
        if final_tokens is not None:
            self._of_this_pass.append(exit_input)
        elif self._final_tokens is None:
            self._run(exit_input, self.validation_metrics)
        else:
            # Of the tensor itself the pipeline frees the memory.
            kept = replace(exit_input, hidden=hidden.detach())
            self._of_other_passes.setdefault(position, deque()).append(kept)
            self._measure_all_but(self._final_tokens.delay, position)
        return hidden

    def keep_final_tokens(self, exits: ExitHeads, logits: Tensor, final_tokens: Tensor) -> None:
        """Fill in what exits are compared with, [b, s], by logits [s, b, v / tp]; see `ExitTap`."""
        vocabulary = LocalVocabulary(logits.shape[-1], exits.tp_group, size=None)
        _, tokens = vocabulary.largest(logits.detach().flatten(0, 1))
        if self._final_tokens is not None:
            self._final_tokens.send(tokens, self.learning_stages)
        # The tensor may be kept for a backward that computes nothing from these values.
        final_tokens.data.copy_(tokens.view(logits.shape[:2]).t())
        waiting, self._of_this_pass = self._of_this_pass, []
        for exit_input in waiting:
            self._run(exit_input, self.validation_metrics)

    def _measure_all_but(self, number: int, position: int) -> None:
        """Measure an exit on all microbatches of the evaluation but the last ones, for which it
        still waits."""
        waiting = self._of_other_passes[position]
        while len(waiting) > number:
            exit_input = self._with_final_tokens(waiting.popleft())
            # At its end Megatron has begun to train again.
            was_training = exit_input.exits.training
            exit_input.exits.eval()
            with torch.no_grad():
                self._run(exit_input, self.validation_metrics)
            exit_input.exits.train(was_training)

    def in_training(self, exit_input: ExitInput) -> Tensor:
        """What goes on behind an exit, [s, b, h]: its loss is deferred to the backward phase.

        In a forward pass without gradients (the first one of activation recomputation) nothing
        happens.

        Raises:
            EndedAtExit: this is the last exit that is to be reached.
        """
        hidden = exit_input.hidden
        if not torch.is_grad_enabled():
            return hidden

        def run(saved: Tensor) -> Tensor:
            leaf = saved.detach().requires_grad_()
            with torch.enable_grad():
                self.train_exit(replace(exit_input, hidden=leaf))
            assert leaf.grad is not None
            return leaf.grad

        if not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        output: Tensor = _Deferred.apply(hidden, run)
        if self.ends_at_exit and exit_input.position == max(exit_input.exits.heads):
            raise EndedAtExit(output)
        return output

    def backpropagate_passed_exits(self) -> None:
        """For schedules in which exits have a backward of their own; here it is part of the
        backbone's."""

    def train_exit(self, exit_input: ExitInput, teacher: Teacher | None = None) -> None:
        """Compute an exit's loss and backpropagate it, to the leaf `hidden` where that needs a
        gradient; see `head_loss` for `teacher`. Of an exit that does not learn in this iteration
        nothing is computed."""
        exit_input = self._with_final_tokens(exit_input)
        if exit_input.position in self._active:
            self._run(exit_input, self.training_metrics, teacher)
        else:
            exit_input.leave_out()

    def _with_final_tokens(self, exit_input: ExitInput) -> ExitInput:
        """An exit's microbatch with what another stage knows of it, or will never know."""
        targets, hidden = exit_input.targets, exit_input.hidden
        if self._final_tokens is None or targets.final_tokens is not None:
            return exit_input
        if not self.reaches_final_head:
            return exit_input
        count, batch = len(targets.labels), hidden.shape[1]
        tokens = self._final_tokens.take(exit_input.position, count, hidden.device)
        final_tokens = tokens.view(-1, batch).t()
        return replace(exit_input, targets=replace(targets, final_tokens=final_tokens))

    def options(self, exits: ExitHeads, position: int) -> HeadLossOptions:
        """How the loss of an exit is computed."""
        return HeadLossOptions(
            temperature=self.temperatures[position],
            confidence_weighted=self.config.use_dynamic_exit_layer_weight,
            chunk_tokens=self.chunk_tokens,
            tp_group=exits.tp_group,
            vocab_size=self.config.exit_vocab_size,
        )

    def _run(
        self, exit_input: ExitInput, metrics: ExitMetrics, teacher: Teacher | None = None
    ) -> None:
        """Compute an exit's loss; with gradients enabled, backpropagate it."""
        exits, position, targets = exit_input.exits, exit_input.position, exit_input.targets
        options = self.options(exits, position)
        final_tokens = targets.of_final_head()

        def criterion(output: Tensor, weight: Tensor) -> HeadLoss:
            if exits.config.sequence_parallel:
                output = gather_from_sequence_parallel_region(output, group=exits.tp_group)
            else:
                output = copy_to_tensor_model_parallel_region(output, group=exits.tp_group)
            flat = output.reshape(-1, output.shape[-1]).to(weight.dtype)
            coefficients = None
            if torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad):
                coefficients = targets.mask * self._coefficient(self.weights[position], targets)
            result, gradient = head_loss(
                flat, weight, targets.labels, options, coefficients, teacher, final_tokens
            )
            metrics.add(position, result, targets.mask)
            if gradient is not None and flat.requires_grad:
                torch.autograd.backward(flat, gradient)
            return result

        with self._random_numbers(exits, position):
            result = exits(position, exit_input.hidden, criterion, exit_input.layer_kwargs)
        if metrics.gates is not None and self.reaches_final_head:
            assert result.agrees is not None
            self._run_gate(exit_input, result.agrees, metrics.gates)

    def _run_gate(self, exit_input: ExitInput, agrees: Tensor, metrics: GateMetrics) -> None:
        """Compute the loss of an exit's gate; with gradients enabled, backpropagate it to the gate
        and nothing else. Tokens for which the final head is not asked, since they are frozen behind
        an exit, do not count: nobody knows what it would say of them. Nor do microbatches that end
        before it, which are not in the mean.

        Args:
            exit_input: the exit's.
            agrees: [s * b], 1 where the exit's most probable token is the final head's, else 0.
            metrics: what the results are added to.
        """
        exits, mask = exit_input.exits, exit_input.targets.final_mask
        output = exits.heads[exit_input.position].gate(exit_input.hidden.detach())
        if exits.config.sequence_parallel:
            # All ranks compute the same loss, so each takes the gradient of its own part.
            output = gather_from_sequence_parallel_region(
                output, tensor_parallel_output_grad=False, group=exits.tp_group
            )
        losses = functional.binary_cross_entropy_with_logits(
            output.flatten(), agrees, reduction="none"
        )
        confidence = output.detach().flatten().sigmoid()
        metrics.add(exit_input.position, confidence, losses.detach(), agrees, mask)
        if losses.requires_grad:
            coefficient = self._coefficient(self._gate_share, exit_input.targets)
            torch.autograd.backward(losses, mask * coefficient)

    def _random_numbers(self, exits: ExitHeads, position: int) -> AbstractContextManager[None]:
        """Dropout of the exit's own: the backbone's random numbers stay as they are without exits,
        and a resumed run draws what an uninterrupted one does."""
        if not (exits.training and exits.heads[position].draws_random_numbers):
            return nullcontext()
        self._dropout_draws += 1
        seed = derived_seed(self.seed, self._iteration, self._dropout_draws, position)
        tp_rank = torch.distributed.get_rank(exits.tp_group)
        return dropout_rng(seed, tp_rank, exits.config.sequence_parallel)

    def _coefficient(self, weight: float, targets: Targets) -> Tensor | float:
        coefficient = weight * self._loss_scale
        if self.normalization.per_token:
            return coefficient
        return coefficient / targets.whole_mask.sum().clamp(min=1)
