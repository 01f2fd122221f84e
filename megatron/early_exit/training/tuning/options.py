"""EE-Tuning's flags (arXiv 2402.00518), and the number of layers that they need."""

from argparse import Namespace
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron.early_exit.config import HEAD_FIELDS, EarlyExitConfig
from megatron.early_exit.errors import as_flag, out_of_range
from megatron.early_exit.flags import FlagFields, refuse_beside
from megatron.early_exit.ranges import ABOVE_ZERO, ZERO_TO_ONE, Range

_NEED_TUNING = (
    "tune_exit_pipeline_parallel_size",
    "freeze_exit_output_weights",
    "random_init",
    "exit_layer_lr",
    "exit_distillation_weight",
)

_REFUSED: dict[str, tuple[object, str]] = {
    "num_layers_per_virtual_pipeline_stage": (None, "a forward pass has no use for chunks"),
    "num_virtual_stages_per_pipeline_rank": (None, "a forward pass has no use for chunks"),
    "pipeline_model_parallel_layout": (None, "layers are divided evenly"),
    "decoder_first_pipeline_num_layers": (None, "layers are divided evenly"),
    "decoder_last_pipeline_num_layers": (None, "layers are divided evenly"),
    "hybrid_layer_pattern": (None, "only plain transformers are tuned"),
    "num_experts": (None, "only dense models are tuned"),
    "overlap_grad_reduce": (False, "exits have few gradients"),
    "overlap_param_gather": (False, "exits have few weights"),
    "check_for_spiky_loss": (False, "there is no final loss"),
    "decoupled_lr": (None, "--exit-layer-lr gives exits their rates"),
    "recompute_granularity": (None, "nothing of the backbone is kept for a backward pass"),
}
"""Megatron's flags that EE-Tuning refuses: the one allowed value, and the reason."""

_REFUSED_LOOKING_AHEAD: dict[str, tuple[object, str]] = {
    "context_parallel_size": (1, "each rank would lack the tokens that the next ones begin with"),
    "use_mup": (False, "it scales the logits of the final head, and those that look ahead are not"),
    "mtp_detach_heads": (False, "no gradient leaves what is trained on a frozen model"),
    "multi_latent_attention": (False, "only plain attention is tuned"),
}
"""Megatron's flags that are refused where a look-ahead head is tuned, likewise."""


@dataclass(frozen=True, kw_only=True)
class TuningOptions(FlagFields):
    """What is tuned, and with which objective.

    Raises:
        ValueError: a field is outside its range; the message names the flag, the value and the
            range.
    """

    tune_exit: bool = False
    """Train only the exits, on the frozen model of --load or --pretrained-checkpoint (EE-Tuning,
    arXiv 2402.00518). Only the exits are saved; layers after the last exit are neither built nor
    run, except those that are needed to make pipeline stages equal, and for gates
    (--use-exit-gate), which learn what the final head says. With --mtp-num-layers K also,
    or without exits only, a head that looks K tokens ahead: Megatron's multi-token-prediction
    module, on the whole frozen model."""

    tune_exit_pipeline_parallel_size: int | None = None
    """Build and run only this many of the first pipeline stages that
    --pipeline-model-parallel-size divides the model into (default: all, of the layers up to the
    last exit). Not with what needs the final head, such as --use-exit-gate."""

    freeze_exit_output_weights: bool = False
    """Do not train the output projections that exits have with --untie-exit-output-weights."""

    random_init: bool = False
    """Initialise new exits, and a new look-ahead head, with random weights; by default they start
    as copies of the model's own modules."""

    exit_layer_lr: tuple[float, ...] = field(
        default=(), metadata={"argparse_meta": {"type": float, "nargs": "+", "default": []}}
    )
    """Largest learning rate of each exit, in the order of --exit-layer-nums (default: --lr);
    --min-lr is scaled by the same factor."""

    exit_distillation_weight: float = 0.0
    """Share of each exit's loss that is the divergence from the model's final head, KL(final ||
    exit); the rest is the plain loss. Requires running the whole model. A look-ahead head learns
    what the final head says at the token that is looked for."""

    exit_distillation_temperature: float = 1.0
    """Divisor of the logits of both heads in the divergence of --exit-distillation-weight, which is
    multiplied by the square of this temperature."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exit_layer_lr", tuple(self.exit_layer_lr or ()))
        if not self.tune_exit:
            self.refuse_changed(*_NEED_TUNING, without="--tune-exit")
        ZERO_TO_ONE.check_flags(self, "exit_distillation_weight")
        ABOVE_ZERO.check_flags(self, "exit_distillation_temperature")
        temperature = self.exit_distillation_temperature
        if temperature != 1 and not self.exit_distillation_weight:
            raise ValueError(
                f"--exit-distillation-temperature {temperature} has no effect without "
                "--exit-distillation-weight"
            )

    @property
    def distills(self) -> bool:
        """Whether heads learn from the final head."""
        return self.exit_distillation_weight > 0


def plan_depth(args: Namespace, options: TuningOptions, exits: EarlyExitConfig) -> None:
    """Restrict the arguments from which Megatron builds a model to the part that tuning needs.

    `num_layers` becomes the depth of the last exit, rounded up to a multiple of the stages;
    `full_num_layers` keeps the depth of the whole model.

    Raises:
        ValueError: the flags do not go together.
    """
    full, stages = args.num_layers, args.pipeline_model_parallel_size
    _check(args, options, exits)
    args.full_num_layers = full
    reason = whole_model_reason(args, options, exits)
    wanted = options.tune_exit_pipeline_parallel_size
    if reason is not None:
        reason.check(stages, wanted)
    if wanted is not None:
        if not 1 <= wanted <= stages or full % stages:
            most = f"--pipeline-model-parallel-size {stages}"
            allowed = f"1 to {most}, which has to divide --num-layers {full}"
            raise out_of_range("--tune-exit-pipeline-parallel-size", wanted, allowed)
        depth = full // stages * wanted
        if exits.positions and exits.positions[-1] > depth:
            raise ValueError(
                f"--tune-exit-pipeline-parallel-size {wanted} is too few: the first {wanted} "
                f"of {stages} stages have {depth} layers, and there is an exit after layer "
                f"{exits.positions[-1]}"
            )
        args.pipeline_model_parallel_size = stages = wanted
    elif reason is not None:
        depth = full
    else:
        depth = min(-(-exits.positions[-1] // stages) * stages, full)
    args.num_layers = depth


class WholeModelReason(NamedTuple):
    """Why the final head is needed.

    Attributes:
        flag: the one because of which it is.
        one_process: it has to be in the same process as all exits.
    """

    flag: str
    one_process: bool

    def check(self, stages: int, built_stages: int | None) -> None:
        """Refuse what builds less than that.

        Args:
            stages: that the whole model is divided into.
            built_stages: how many of them are wanted; None is all that are needed.

        Raises:
            ValueError: naming the flag.
        """
        if built_stages in (None, stages) and (stages == 1 or not self.one_process):
            return
        where, size = (" in each process", 1) if self.one_process else ("", stages)
        raise ValueError(
            f"{self.flag} needs the whole model{where}, allowed: --pipeline-model-parallel-size "
            f"{size} without --tune-exit-pipeline-parallel-size (--tensor-model-parallel-size may "
            "be any)"
        )


def whole_model_reason(
    args: Namespace, options: TuningOptions, exits: EarlyExitConfig
) -> WholeModelReason | None:
    """The flag because of which the final head is needed: what is learned depends on what it says,
    or begins behind the last layer. None where there is none."""
    if options.distills:
        flag = f"--exit-distillation-weight {options.exit_distillation_weight}"
        return WholeModelReason(flag, one_process=True)
    if looks_ahead(args):
        return WholeModelReason(f"--mtp-num-layers {args.mtp_num_layers}", one_process=True)
    if exits.beside_parts:
        return WholeModelReason(as_flag(exits.beside_parts[0].field), one_process=False)
    return None


def looks_ahead(args: Namespace) -> bool:
    """Whether the model has a look-ahead head."""
    return bool(getattr(args, "mtp_num_layers", None))


def _check(args: Namespace, options: TuningOptions, exits: EarlyExitConfig) -> None:
    if looks_ahead(args):
        _check_look_ahead(args)
    elif not exits.positions:
        raise ValueError(
            "--tune-exit needs exits: give --exit-layer-nums, or --mtp-num-layers for a look-ahead "
            "head"
        )
    if exits.positions:
        _check_exits(options, exits, looks_ahead(args))
    elif options.freeze_exit_output_weights:
        raise ValueError("--freeze-exit-output-weights has no effect without --exit-layer-nums")
    rates = options.exit_layer_lr
    if rates and len(rates) != len(exits.exit_layer_nums):
        raise ValueError(
            f"--exit-layer-lr {' '.join(map(str, rates))} has {len(rates)} values, allowed: one "
            f"for each of the {len(exits.exit_layer_nums)} layers of --exit-layer-nums"
        )
    for rate in rates:
        ABOVE_ZERO.check(**{"--exit-layer-lr": rate})
    if rates and not getattr(args, "lr", 1.0):
        raise ValueError("--exit-layer-lr needs a positive --lr, whose schedule it follows")
    refuse_beside("--tune-exit", args, _REFUSED)


def _check_look_ahead(args: Namespace) -> None:
    depths = f"--mtp-num-layers {args.mtp_num_layers}"
    refuse_beside(f"--tune-exit and {depths}", args, _REFUSED_LOOKING_AHEAD)
    ABOVE_ZERO.check_flags(args, "mtp_loss_scaling_factor")
    if args.seq_length is not None:
        most = Range(least=1, most=args.seq_length - 1, most_means="--seq-length less 1")
        most.check_flags(args, "mtp_num_layers")


def _check_exits(options: TuningOptions, exits: EarlyExitConfig, beside_ahead: bool) -> None:
    """Refuse what exits cannot be tuned with; `beside_ahead` a look-ahead head is tuned, too."""
    if exits.pre_exit:
        raise ValueError(
            "--pre-exit cannot be combined with --tune-exit: each exit is run where its layer ends"
        )
    if exits.share_final_head and not exits.head_parts and not beside_ahead:
        raise ValueError(
            "--share-final-head cannot be combined with --tune-exit: exits then have no weights of "
            "their own, and the model's are frozen; train the whole model without --tune-exit, or "
            "give exits gates to train"
        )
    if options.freeze_exit_output_weights and not exits.untie_exit_output_weights:
        raise ValueError(
            "--freeze-exit-output-weights has no effect without --untie-exit-output-weights: tied "
            "projections are the model's own and never tuned"
        )
    frozen = ("output",) if options.freeze_exit_output_weights else ()
    if all(part.tensors in frozen for part in exits.head_parts) and not beside_ahead:
        *flags, last = map(as_flag, HEAD_FIELDS)
        raise ValueError(
            "--tune-exit has nothing to tune: give exits weights of their own with "
            f"{', '.join(flags)} or {last}"
        )
    if exits.beside_parts and all(part.is_beside for part in exits.head_parts):
        _refuse_for_gates_alone(options, exits, beside_ahead)


def _refuse_for_gates_alone(
    options: TuningOptions, exits: EarlyExitConfig, beside_ahead: bool
) -> None:
    """Gates have one loss, which no weight, temperature or teacher is part of."""
    given = {
        # These two are for a look-ahead head as well.
        "random_init": options.random_init and not beside_ahead,
        "exit_distillation_weight": options.distills and not beside_ahead,
        "use_dynamic_exit_layer_weight": exits.use_dynamic_exit_layer_weight,
        "exit_layer_weight_warmup_iters": exits.exit_layer_weight_warmup_iters > 0,
        "exit_layer_weight": any(one.weight != 1 for one in exits.exits),
        "exit_layer_temperature": any(one.temperature != 1 for one in exits.exits),
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{as_flag(name)} has no effect where only gates are tuned: leave it out, or give "
                "exits heads of their own"
            )


def learning_rates(options: TuningOptions, exits: EarlyExitConfig) -> dict[int, float]:
    """The largest learning rate of each exit, by position, if they are set."""
    if not options.exit_layer_lr:
        return {}
    return dict(zip(exits.exit_layer_nums, options.exit_layer_lr, strict=True))
