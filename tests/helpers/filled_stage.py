"""One rank of a tiny pipeline that runs filled steps, without Megatron's training loop."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.early_exit.config import EarlyExitConfig
from tests.helpers.exit_models import Microbatch, build_model, gradients


class FilledStage:
    """A stage with given weights, with Megatron's process groups for the pipeline.

    Args:
        config: the exits of the model.
        weights: of the whole model.
        first_layer: of this stage, counted from 0.
        fills: microbatches in the warm-up and in the cool-down.
        exit_stages: the stages that have exits.
        backbone: see `build_model`.
        data: microbatches for all steps, the same on all ranks.
        draws: of what layers hand on.
    """

    def __init__(
        self,
        config: EarlyExitConfig,
        weights: dict[str, Tensor],
        first_layer: int,
        fills: tuple[int, int],
        exit_stages: frozenset[int],
        backbone: dict[str, Any],
        data: Iterator[Microbatch],
        draws: Any = None,
    ) -> None:
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.process_groups_config import ProcessGroupCollection

        from megatron.early_exit.training.loop.bubble_filling import FilledBubbles
        from megatron.early_exit.training.loop.data import BatchReader
        from megatron.early_exit.training.loop.filling_options import FillingOptions
        from megatron.early_exit.training.loop.step import ForwardStep, LossChecks
        from megatron.early_exit.training.loop.training_schedule import ScheduledSteps
        from megatron.early_exit.training.loss.exit_loss import ExitObjective, LossNormalization
        from megatron.early_exit.training.loss.final_tokens import FinalTokens

        stages = parallel_state.get_pipeline_model_parallel_world_size()
        per_token = backbone.get("calculate_per_token_loss", False)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self.model = build_model(config, pipeline_model_parallel_size=stages, **backbone)
        self._names = _load(self.model, weights, first_layer)
        normalization = LossNormalization(per_token=per_token, context_parallel_size=1)
        self.model.exit_tap = objective = ExitObjective(config, normalization, chunk_tokens=5)
        if config.use_exit_gate:
            pipeline = parallel_state.get_pipeline_model_parallel_group()
            objective.connect(FinalTokens.of([self.model], pipeline))
        megatrons = self.model.config
        megatrons.deallocate_pipeline_outputs = True
        megatrons.experimental_attention_variant_loss_scale_func = objective.set_loss_scale
        megatrons.finalize_model_grads_func = self._count_tokens
        self._batch, self._sequence = Microbatch(0).tokens.shape
        reader = BatchReader(
            groups=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
            micro_batch_size=self._batch,
            eval_micro_batch_size=self._batch,
            seq_length=self._sequence,
        )
        checks = LossChecks(finite=True, spikes=False)
        self._forward_step = ForwardStep(reader, objective, lambda: 0, checks, draws=draws)
        options = FillingOptions(
            fill_explicit_bubbles=True,
            num_fill_warmup_microbatches=fills[0],
            num_fill_cooldown_microbatches=fills[1],
            backward_forward_ratio=2.0,
        )
        bubbles = FilledBubbles(options, stages, exit_stages, Namespace())
        self._steps = ScheduledSteps(objective, bubbles)
        self._data = (
            {
                "tokens": batch.tokens,
                "labels": batch.labels,
                "loss_mask": batch.mask,
                "position_ids": batch.positions,
            }
            for batch in data
        )
        self._num_tokens: Tensor | None = None

    def step(self, num_microbatches: int) -> tuple[dict[str, Tensor], int]:
        """Run a step with this many microbatches.

        Returns:
            The gradients by the names that parameters have on one process, and the number of final
            losses that were reported.
        """
        self.model.zero_grad()
        reports = self._steps(
            forward_step_func=self._forward_step,
            data_iterator=self._data,
            model=[self.model],
            num_microbatches=num_microbatches,
            seq_length=self._sequence,
            micro_batch_size=self._batch,
        )
        scale = 1.0 if self._num_tokens is None else 1 / self._num_tokens
        found = gradients(self.model)
        return {self._names[name]: value * scale for name, value in found.items()}, len(reports)

    def _count_tokens(self, _: Any, num_tokens: Tensor | None, **__: Any) -> None:
        """The number of tokens by which Megatron divides losses that are reduced per token: the
        last stage's."""
        from megatron.core import parallel_state

        if num_tokens is not None:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(num_tokens, last)
        self._num_tokens = num_tokens


def _load(model: Any, weights: dict[str, Tensor], first_layer: int) -> dict[str, str]:
    """Give a stage its weights; returns the names of its parameters on one process."""
    names = {}
    for name, parameter in model.named_parameters():
        whole = name
        if name.startswith("decoder.layers."):
            number, rest = name.removeprefix("decoder.layers.").split(".", 1)
            whole = f"decoder.layers.{int(number) + first_layer}.{rest}"
        elif name.startswith("exits.backbone."):
            copies = model.exits.backbone.copies
            whole = next(original for original, one in copies.items() if one is parameter)
        elif name == "output_layer.weight" and name not in weights:
            whole = "embedding.word_embeddings.weight"
        parameter.data.copy_(weights[whole])
        names[name] = whole
    return names
