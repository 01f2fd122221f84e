"""What a training run is made of, put together from the command line.

This is where Megatron's arguments are read, once, into the objects that the rest is given.
"""

from argparse import Namespace
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import get_tensorboard_writer, pretrain, print_rank_0
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from torch import Tensor

from megatron.early_exit.checkpoint.base import BaseReference
from megatron.early_exit.checkpoint.description import (
    ModelDescription,
    read_saved_description,
    write_description,
)
from megatron.early_exit.checkpoint.exits import RandomInit
from megatron.early_exit.checkpoint.stored_rule import dropped
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.model.gpt_builder import EarlyExitGPTModelConfig, check_backbone
from megatron.early_exit.model.layer_specs import gpt_layer_spec
from megatron.early_exit.model.tied_weights import finalize_gradients
from megatron.early_exit.patches.distributed_optimizer import repair_fully_reshardable_format
from megatron.early_exit.patches.forward_backward import train_by
from megatron.early_exit.patches.optimizer_config import set_learning_rates
from megatron.early_exit.training.cli.checks import check_arguments, check_data
from megatron.early_exit.training.cli.misuse import explain
from megatron.early_exit.training.loop.bubble_filling import FilledBubbles
from megatron.early_exit.training.loop.data import BatchReader, dataset_provider
from megatron.early_exit.training.loop.exit_stages import exit_stages
from megatron.early_exit.training.loop.filling_options import FillingOptions
from megatron.early_exit.training.loop.held_draws import HeldDraws
from megatron.early_exit.training.loop.holding_options import (
    HoldingOptions,
    freezing_positions,
)
from megatron.early_exit.training.loop.index_cache import cache_folders, remove_unfinished_indices
from megatron.early_exit.training.loop.logging import log_exits
from megatron.early_exit.training.loop.progress import Progress
from megatron.early_exit.training.loop.step import (
    ForwardStep,
    LossChecks,
    LossFunction,
    rejected_results,
)
from megatron.early_exit.training.loop.training_schedule import ScheduledSteps
from megatron.early_exit.training.loss.curriculum import CurriculumOptions, LossCurriculum
from megatron.early_exit.training.loss.exit_loss import ExitObjective, LossNormalization
from megatron.early_exit.training.loss.final_tokens import FinalTokens
from megatron.early_exit.training.loss.look_ahead_loss import LookAheadOptions
from megatron.early_exit.training.resume.loading import (
    CheckpointError,
    LoadedRandomState,
    checkpoint_errors,
    load_all_but,
)
from megatron.early_exit.training.resume.plan import (
    ResumePlan,
    is_torch_dist,
    move_conflicting,
    plan_resume,
    share_plan,
)
from megatron.early_exit.training.tuning.base_model import load_base, starting_weights
from megatron.early_exit.training.tuning.objective import (
    DistillingObjective,
    LocalObjective,
    TuningPlan,
    TuningStep,
)
from megatron.early_exit.training.tuning.options import (
    TuningOptions,
    learning_rates,
    looks_ahead,
    whole_model_reason,
)
from megatron.early_exit.training.tuning.start import decide_tuning


class SetupError(Exception):
    """Megatron refuses flags once it builds the model from them, or lacks a package for them; the
    text says which."""


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
        self.tuning = TuningOptions.from_attributes(args)
        self.filling = FillingOptions.from_attributes(args)
        self.holding = HoldingOptions.from_attributes(args)
        self.holding.check(args, self.exits)
        self.curriculum = CurriculumOptions.from_attributes(args)
        self.curriculum.check(args, self.exits)
        check_arguments(args, self.exits)
        self.exits.validate(args.num_layers, tokenizer.vocab_size)
        self.objective = self._objective()
        self.model_config = self._model_config()
        intervals = (args.save_interval, args.non_persistent_save_interval)
        self.progress = Progress(
            iterations=args.train_iters or 1,
            interval=args.log_interval,
            tokens_per_iteration=lambda: get_current_global_batch_size() * args.seq_length,
            writer=get_tensorboard_writer(),
            save_intervals=tuple(filter(None, intervals)),
        )
        self._provide_datasets = dataset_provider(args, tokenizer)
        self._random_state = LoadedRandomState()
        self._has_model = False
        self._start = self._prepare_files(tokenizer) if args.rank == 0 else None

    def _objective(self) -> ExitObjective:
        args = self.args
        normalization = LossNormalization(
            per_token=args.calculate_per_token_loss,
            context_parallel_size=args.context_parallel_size,
        )
        common = (self.exits, normalization, args.exit_loss_chunk_tokens, args.seed)
        if self.tuning.distills:
            return DistillingObjective(self.tuning, *common, ahead=self._ahead())
        if self.tuning.tune_exit:
            return LocalObjective(*common, ahead=self._ahead())
        if not self.curriculum.is_used:
            return ExitObjective(*common)
        curriculum = LossCurriculum(
            options=self.curriculum,
            positions=self.exits.positions,
            num_layers=args.num_layers,
            iterations=lambda: self.progress.iterations,
        )
        return ExitObjective(*common, curriculum)

    def _ahead(self) -> LookAheadOptions | None:
        if not looks_ahead(self.args):
            return None
        return LookAheadOptions(
            depths=self.args.mtp_num_layers,
            weight=self.args.mtp_loss_scaling_factor,
            chunk_tokens=self.args.exit_loss_chunk_tokens,
            vocab_size=self.exits.exit_vocab_size,
        )

    def _model_config(self) -> EarlyExitGPTModelConfig:
        config = gpt_config_from_args(self.args, model_config_cls=EarlyExitGPTModelConfig)
        assert isinstance(config, EarlyExitGPTModelConfig)
        config.early_exit = self.exits
        config.holds_rows = self.holding.is_used
        # Megatron hands over --use-rope-scaling without it, and would always scale by 8.
        config.rope_scaling_factor = self.args.rope_scaling_factor
        # Megatron's annotation forgets the virtual stage, which it passes.
        config.transformer_layer_spec = gpt_layer_spec  # type: ignore[assignment]
        config.transformer.experimental_attention_variant_loss_scale_func = (
            self.objective.set_loss_scale
        )
        config.transformer.finalize_model_grads_func = finalize_gradients
        if self.tuning.tune_exit:
            config.tunes_exits = True
            config.freezes_projections = self.tuning.freeze_exit_output_weights
            is_whole = whole_model_reason(self.args, self.tuning, self.exits) is not None
            config.has_final_head = is_whole
            config.share_embeddings_and_output_weights &= config.has_final_head
            # What is tied is frozen.
            config.transformer.finalize_model_grads_func = finalize_model_grads
        config.pre_wrap_hooks = [*config.pre_wrap_hooks, self._before_loading]
        check_backbone(config)
        return config

    def _prepare_files(self, tokenizer: Any) -> ResumePlan:
        """On rank 0: decide what to load, and describe what will be saved."""
        args = self.args
        # NullTokenizer stands for any that the data were made with.
        is_known = args.tokenizer_type != "NullTokenizer"
        check_data(args, tokenizer.vocab_size if is_known else args.padded_vocab_size)
        start = ResumePlan()
        if self.tuning.tune_exit:
            start = decide_tuning(args, self.tuning, self.exits, tokenizer.vocab_size)
        elif is_torch_dist(args):
            start = plan_resume(args, self.exits, tokenizer.vocab_size)
        for line in start.notes:
            print_rank_0(line)
        for path in remove_unfinished_indices(cache_folders(args)):
            print_rank_0(f"removed {path}: it was cut short, and is built again")
        description = ModelDescription.from_args(
            args, self.exits, tokenizer.vocab_size, getattr(tokenizer, "eod", None)
        )
        if args.save is not None and not args.skip_train:
            stored = read_saved_description(Path(args.save))
            rule = None if stored is None else stored.rule
            for line in dropped(rule, None, "training changes the model"):
                print_rank_0(line)
            write_description(args.save, replace(description, base=start.base))
        return start

    def _before_loading(self, chunks: list[Any]) -> list[Any]:
        """The model exists and so do the process groups: Megatron loads next."""
        self._has_model = True
        for chunk in chunks:
            chunk.exit_tap = self.objective
            if isinstance(self.objective, LocalObjective):
                chunk.look_ahead_tap = self.objective
        if self.exits.use_exit_gate and self.args.pipeline_model_parallel_size > 1:
            groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["pp"])
            self.objective.connect(FinalTokens.of(chunks, groups.pp))
        if self._start is not None:
            for line in move_conflicting(self.args, self._start):
                print_rank_0(line)
        self._start = share_plan(self._start)
        self._start.apply_to(self.args)
        if self._start.base is not None:
            self._fill(chunks, self._start.base)
        if self._start.base is None or self._start.checkpoint is not None:
            load_all_but(chunks, self._start.fresh_exits)
        return chunks

    def _fill(self, chunks: list[Any], base: BaseReference) -> None:
        random_init = None
        if self.tuning.random_init:
            random_init = RandomInit(self.args.seed, self.args.init_method_std)
        try:
            mtp = (self.args.mtp_num_layers or 0, self.args.mtp_use_repeated_layer)
            weights = starting_weights(base, self.exits, random_init, *mtp)
            for chunk in chunks:
                load_base(chunk, weights)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def run(self) -> None:
        """Train.

        Raises:
            CheckpointError: a checkpoint turned out not to be loadable, or cannot be written.
            SetupError: Megatron refuses a flag while it builds the model, or lacks a package.
        """
        log_exits(self.objective, self.progress)
        stages = self.args.pipeline_model_parallel_size
        if self.filling.fill_explicit_bubbles:
            own = exit_stages(self.args, self.exits)
            bubbles = FilledBubbles(self.filling, stages, own, self.args)
            train_by(ScheduledSteps(self.objective, bubbles))
        if self.tuning.tune_exit:
            own = exit_stages(self.args, self.exits)
            plan = TuningPlan(stages, own, has_gates=self.exits.use_exit_gate)
            train_by(ScheduledSteps(self.objective, plan))
            if rates := learning_rates(self.tuning, self.exits):
                set_learning_rates({f"*exits.{exit}.*": rate for exit, rate in rates.items()})
        if self.args.use_distributed_optimizer and self.args.dist_ckpt_optim_fully_reshardable:
            repair_fully_reshardable_format()

        def datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
            assert self._start is not None
            if self._start.iteration:
                self._random_state.keep()
            return self._provide_datasets(num_samples)

        datasets.is_distributed = True  # type: ignore[attr-defined]
        try:
            with checkpoint_errors(), rejected_results():
                pretrain(
                    pretrain_cfg_container_from_args(self.args, self.model_config),
                    datasets,
                    ModelType.encoder_or_decoder,
                    self.forward_step,
                )
        except (AssertionError, ValueError, ImportError) as error:
            if self._has_model and not isinstance(error, ImportError):
                raise
            raise SetupError(explain(error)) from error
        self.progress.flush()

    @cached_property
    def _step(self) -> ForwardStep | TuningStep:
        args = self.args
        self._random_state.restore()
        # Known by now with --train-samples too.
        self.progress.iterations = args.train_iters or 1
        groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp", "dp"])
        reader = BatchReader(
            groups=groups,
            micro_batch_size=args.micro_batch_size,
            eval_micro_batch_size=args.eval_micro_batch_size,
            seq_length=args.seq_length,
        )
        if isinstance(self.objective, LocalObjective):
            return TuningStep(reader, self.objective, lambda: _iteration(args))
        checks = LossChecks(
            finite=args.check_for_nan_in_loss_and_grad, spikes=args.check_for_spiky_loss
        )
        return ForwardStep(
            reader,
            self.objective,
            lambda: _iteration(args),
            checks,
            draws=self._draws(groups) if self.holding.is_used else None,
        )

    def _draws(self, groups: ProcessGroupCollection) -> HeldDraws:
        args = self.args
        return HeldDraws(
            options=self.holding,
            num_layers=args.num_layers,
            positions=freezing_positions(self.exits, args.num_layers),
            seed=args.seed,
            iterations=lambda: self.progress.iterations,
            micro_batch_size=args.micro_batch_size,
            seq_length=args.seq_length,
            data_parallel_rank=groups.dp.rank(),
            data_parallel_size=groups.dp.size(),
        )

    def forward_step(self, data: Any, model: Any) -> tuple[Tensor, LossFunction]:
        """The forward step of Megatron's schedules; process groups exist when it is called.

        Returns:
            [s, b, h] for the next stage, or the losses [b, s] of the last one; and what reduces
            them.
        """
        return self._step(data, model)


def _iteration(args: Any) -> int:
    """The iteration that a run is in. Megatron counts none in a run that only evaluates."""
    iteration: int = args.curr_iteration if hasattr(args, "curr_iteration") else args.iteration
    return iteration
