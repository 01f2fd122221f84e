"""What a training run is made of, put together from the command line.

This is where Megatron's arguments are read, once, into the objects that the rest is given.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import cached_property
from typing import Any

from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from torch import Tensor

from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.gpt_model import EarlyExitGPTModelConfig, check_backbone
from megatron.early_exit.model.layer_specs import gpt_layer_spec
from megatron.early_exit.model.tied_weights import finalize_gradients
from megatron.early_exit.training.data import BatchReader, dataset_provider
from megatron.early_exit.training.exit_loss import ExitObjective, LossNormalization
from megatron.early_exit.training.logging import Progress, log_exits
from megatron.early_exit.training.step import ForwardStep, LossFunction

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


def parse_arguments(add_arguments: ArgumentsProvider) -> Namespace:
    """Parse and check the command line, and set Megatron's globals from it.

    The exits are checked first, before Megatron sets anything up.

    Raises:
        ValueError: a flag is outside its range.
        AssertionError: Megatron refuses a flag.
    """
    first_look = parse_args(add_arguments)
    exits = EarlyExitConfig.from_attributes(first_look)
    if first_look.num_layers is not None:
        exits.validate(first_look.num_layers)
    args = parse_and_validate_args(add_arguments)
    for name, value in exits.to_dict().items():
        setattr(args, name, value)
    _check(args, exits)
    return args


def _check(args: Namespace, exits: EarlyExitConfig) -> None:
    exits.validate(args.num_layers)
    chunk = args.exit_loss_chunk_tokens
    if chunk is not None and chunk < 1:
        raise ValueError(f"--exit-loss-chunk-tokens {chunk} is out of range, allowed: 1 or more")
    for flag in ("use_torch_fsdp2", "use_megatron_fsdp"):
        if exits.positions and getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} cannot be combined with --exit-layer-nums, allowed: "
                "Megatron's own data parallelism, with or without --use-distributed-optimizer"
            )


class Session:
    """One training run.

    Args:
        args: checked arguments.
        tokenizer: the one that the data sets use.
    """

    def __init__(self, args: Namespace, tokenizer: Any) -> None:
        self.args = args
        self.datasets = dataset_provider(args, tokenizer)
        self.exits = EarlyExitConfig.from_attributes(args)
        self.objective = ExitObjective(
            self.exits,
            LossNormalization(
                per_token=args.calculate_per_token_loss,
                context_parallel_size=args.context_parallel_size,
            ),
            args.exit_loss_chunk_tokens,
        )
        self.model_config = self._model_config()
        progress = Progress(
            args.train_iters or 0,
            args.log_interval,
            lambda: get_current_global_batch_size() * args.seq_length,
        )
        log_exits(self.objective, progress)

    def _model_config(self) -> EarlyExitGPTModelConfig:
        config = gpt_config_from_args(self.args, model_config_cls=EarlyExitGPTModelConfig)
        assert isinstance(config, EarlyExitGPTModelConfig)
        config.early_exit = self.exits
        config.transformer_layer_spec = gpt_layer_spec
        config.transformer.experimental_attention_variant_loss_scale_func = (
            self.objective.set_loss_scale
        )
        config.transformer.finalize_model_grads_func = finalize_gradients
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, self._attach_objective]
        check_backbone(config)
        return config

    def _attach_objective(self, chunks: list[Any]) -> list[Any]:
        for chunk in chunks:
            chunk.exit_tap = self.objective
        return chunks

    @cached_property
    def _step(self) -> ForwardStep:
        args = self.args
        reader = BatchReader(
            groups=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]),
            micro_batch_size=args.micro_batch_size,
            eval_micro_batch_size=args.eval_micro_batch_size,
            seq_length=args.seq_length,
        )
        return ForwardStep(reader, self.objective, lambda: args.curr_iteration)

    def forward_step(self, data: Any, model: Any) -> tuple[Tensor, LossFunction]:
        """For Megatron's schedules; the process groups exist by the time it is called."""
        return self._step(data, model)
