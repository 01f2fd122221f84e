"""What a training run is made of, put together from the command line.

This is where Megatron's arguments are read, once, into the objects that the rest is given.
"""

import os
from argparse import Namespace
from functools import cached_property
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tensorboard_writer, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from torch import Tensor

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.gpt_model import EarlyExitGPTModelConfig, check_backbone
from megatron.early_exit.model.layer_specs import gpt_layer_spec
from megatron.early_exit.model.tied_weights import finalize_gradients
from megatron.early_exit.training.data import BatchReader, dataset_provider
from megatron.early_exit.training.event_log import ProgressOnDisk
from megatron.early_exit.training.exit_loss import ExitObjective, LossNormalization
from megatron.early_exit.training.index_cache import (
    cache_folders,
    data_prefixes,
    remove_unfinished_indices,
)
from megatron.early_exit.training.loading import (
    LoadedRandomState,
    checkpoint_errors,
    load_all_but,
)
from megatron.early_exit.training.logging import log_exits
from megatron.early_exit.training.reshardable_optimizer import repair_fully_reshardable_format
from megatron.early_exit.training.resume import Start, clear_way, decide, handles, share
from megatron.early_exit.training.step import ForwardStep, LossFunction


class Session:
    """One training run.

    Args:
        args: checked arguments.
        tokenizer: the one that the data sets use.

    Raises:
        ValueError: flags do not go together, or not with the files that they name.
    """

    def __init__(self, args: Namespace, tokenizer: Any) -> None:
        self.args = args
        self.exits = EarlyExitConfig.from_attributes(args)
        _check(args, self.exits)
        self.objective = ExitObjective(
            self.exits,
            LossNormalization(
                per_token=args.calculate_per_token_loss,
                context_parallel_size=args.context_parallel_size,
            ),
            args.exit_loss_chunk_tokens,
            args.seed,
        )
        self.model_config = self._model_config()
        intervals = (args.save_interval, args.non_persistent_save_interval)
        self.progress = ProgressOnDisk(
            get_tensorboard_writer(),
            tuple(filter(None, intervals)),
            iterations=args.train_iters or 1,
            interval=args.log_interval,
            tokens_per_iteration=lambda: get_current_global_batch_size() * args.seq_length,
        )
        self._provide_datasets = dataset_provider(args, tokenizer)
        self._random_state = LoadedRandomState()
        self._start = self._prepare_files(tokenizer) if args.rank == 0 else None

    def _model_config(self) -> EarlyExitGPTModelConfig:
        config = gpt_config_from_args(self.args, model_config_cls=EarlyExitGPTModelConfig)
        assert isinstance(config, EarlyExitGPTModelConfig)
        config.early_exit = self.exits
        # Megatron's annotation forgets the virtual stage, which it passes.
        config.transformer_layer_spec = gpt_layer_spec  # type: ignore[assignment]
        config.transformer.experimental_attention_variant_loss_scale_func = (
            self.objective.set_loss_scale
        )
        config.transformer.finalize_model_grads_func = finalize_gradients
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, self._before_loading]
        check_backbone(config)
        return config

    def _prepare_files(self, tokenizer: Any) -> Start:
        """On rank 0: decide what to load, and describe what will be saved."""
        args = self.args
        _check_data(args)
        start = Start()
        if handles(args):
            start = decide(args, self.exits, tokenizer.vocab_size)
        for line in start.notes:
            print_rank_0(line)
        for path in remove_unfinished_indices(cache_folders(args)):
            print_rank_0(f"removed {path}: it was cut short, and is built again")
        description = ModelDescription.from_args(
            args, self.exits, tokenizer.vocab_size, getattr(tokenizer, "eod", None)
        )
        if args.save is not None and not args.skip_train:
            write_description(args.save, description)
        return start

    def _before_loading(self, chunks: list[Any]) -> list[Any]:
        """The model exists and so do the process groups: Megatron loads next."""
        for chunk in chunks:
            chunk.exit_tap = self.objective
        if self._start is not None:
            for line in clear_way(self.args, self._start):
                print_rank_0(line)
        self._start = share(self._start)
        self._start.apply_to(self.args)
        load_all_but(chunks, self._start.fresh_exits)
        return chunks

    def run(self) -> None:
        """Train.

        Raises:
            CheckpointError: a checkpoint turned out not to be loadable, or cannot be written.
        """
        log_exits(self.objective, self.progress)
        if self.args.use_distributed_optimizer and self.args.dist_ckpt_optim_fully_reshardable:
            repair_fully_reshardable_format()

        def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
            assert self._start is not None
            if self._start.iteration:
                self._random_state.keep()
            return self._provide_datasets(num_samples)

        datasets.is_distributed = True  # type: ignore[attr-defined]
        with checkpoint_errors():
            pretrain(
                pretrain_cfg_container_from_args(self.args, self.model_config),
                datasets,
                ModelType.encoder_or_decoder,
                self.forward_step,
            )
        self.progress.flush()

    @cached_property
    def _step(self) -> ForwardStep:
        args = self.args
        self._random_state.restore()
        # Known by now with --train-samples too.
        self.progress.iterations = args.train_iters
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


def _check(args: Namespace, exits: EarlyExitConfig) -> None:
    chunk = args.exit_loss_chunk_tokens
    if chunk is not None and chunk < 1:
        raise ValueError(f"--exit-loss-chunk-tokens {chunk} is out of range, allowed: 1 or more")
    if not (args.train_iters or args.train_samples or args.skip_train):
        raise ValueError("nothing says how long to train: give --train-iters or --train-samples")
    if args.async_save and not torch.cuda.is_available():
        raise ValueError("--async-save needs a GPU, which this machine lacks: leave it out")
    if not exits.positions:
        return
    for flag in ("use_torch_fsdp2", "use_megatron_fsdp"):
        if getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} cannot be combined with --exit-layer-nums, allowed: "
                "Megatron's own data parallelism, with or without --use-distributed-optimizer"
            )
    if args.moe_use_upcycling:
        raise ValueError("--moe-use-upcycling cannot be combined with --exit-layer-nums")
    if not handles(args):
        raise ValueError(
            f"--ckpt-format {args.ckpt_format} cannot be combined with --exit-layer-nums, "
            "allowed: torch_dist"
        )


def _check_data(args: Namespace) -> None:
    if args.mock_data:
        return
    prefixes = data_prefixes(args)
    if not prefixes:
        raise ValueError("there is no data: give --data-path, or --mock-data for random tokens")
    for prefix in prefixes:
        for file in (f"{prefix}.idx", f"{prefix}.bin"):
            if "://" not in prefix and not os.path.isfile(file):
                raise ValueError(f"--data-path {prefix}: there is no file {file}")
