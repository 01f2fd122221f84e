"""The one typed description of a model's exits.

The command line, checkpoints and engines all use `EarlyExitConfig`. Its fields have the names of
the flags (`exit_layer_nums` is `--exit-layer-nums`), their docstrings are the help texts, and
`exits` is the normalised form that the rest of the package works with: an exit is identified by its
position p, the number of backbone layers that run before it.

`HEAD_PARTS` is the one list of the parts that an exit's head can have.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Literal, get_args

from megatron.early_exit.errors import FieldError, as_flag, out_of_range
from megatron.early_exit.flags import FlagFields
from megatron.early_exit.ranges import ABOVE_ZERO, ZERO_OR_MORE, Range

WarmupStyle = Literal["linear", "cosine"]
ExitMeasure = Literal["max_probability", "margin", "entropy", "similarity", "gate"]
"""How sure an exit is: by its largest probability, by the difference of the two largest ones, by
how far its entropy is below that of a guess, by the cosine of the hidden state and the one at the
exit before, or by its gate."""
KVPolicy = Literal["exact", "propagate"]
"""What later tokens see of a position that has left at an exit: see `SamplingParams`."""
BackboneModule = Literal["mlp", "layer", "norm", "output"]
"""A module of the backbone: an MLP with its norm, a transformer layer, a norm, the output layer."""


@dataclass(frozen=True, slots=True)
class Exit:
    """One exit of a model.

    Attributes:
        position: number of backbone layers run before the exit, 1 <= position <= num_layers.
        weight: final weight of its loss.
        weight_init: weight of its loss at the first iteration.
        temperature: divisor of its logits in the loss.
    """

    position: int
    weight: float
    weight_init: float
    temperature: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPart:
    """A part of an exit's head that a flag adds.

    Attributes:
        field: name of the field of `EarlyExitConfig`, which is its flag.
        module: name of its module in the head and in checkpoints (`exits.{position}.{module}`).
        tensors: the module of the backbone that has the same tensors and costs, or the names and
            shapes of the part's own tensors; a size is a number or the name of a field of the
            model's shape.
        origin: module of the backbone that it is copied from when exits are added to a model:
            `{layer}` is the layer that the exit follows, `{next_layer}` the one after the exit (the
            last layer, if there is none), `{output}` the output layer, or the word embedding that
            is tied to it. None if the backbone has no such module.
        initial: initial value of all entries of its tensors if it has no origin.
        replaces_mlp: it replaces the MLP of the layer that the exit follows.
        is_beside: it judges the hidden state that comes to the exit, beside the branch: the token
            that the exit predicts does not depend on it.
        help_when_added: help text of the flag that adds it to a model.
        help_when_planned: help text of the planner's flag.
    """

    field: str
    module: str
    tensors: BackboneModule | Mapping[str, tuple[int | str, ...]]
    origin: str | None = None
    initial: float = 0.0
    replaces_mlp: bool = False
    is_beside: bool = False
    help_when_added: str
    help_when_planned: str

    @property
    def has_mlp(self) -> bool:
        """Whether it is, or contains, an MLP like the backbone's."""
        return self.tensors in ("mlp", "layer")

    def own_shapes(self, model: object) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that have no counterpart in the backbone.

        Args:
            model: the model's shape, with Megatron's names of sizes.
        """
        if isinstance(self.tensors, str):
            return {}
        return {
            name: tuple(getattr(model, one) if isinstance(one, str) else one for one in sizes)
            for name, sizes in self.tensors.items()
        }


HEAD_PARTS = (
    HeadPart(
        field="use_exit_gate",
        module="gate",
        tensors={"weight": (1, "hidden_size"), "bias": (1,)},
        is_beside=True,
        help_when_added="own gate, to be trained: a linear classifier of the hidden state that "
        "says whether to leave there, before the exit is evaluated; it starts undecided",
        help_when_planned="each exit has a gate, which costs nothing that counts",
    ),
    HeadPart(
        field="use_exit_mlp",
        module="mlp",
        tensors="mlp",
        origin="decoder.layers.{layer}.mlp",
        replaces_mlp=True,
        help_when_added="own MLP, a copy of that of the exit's layer, which it replaces there",
        help_when_planned="each exit has its own MLP; not with --pre-exit",
    ),
    HeadPart(
        field="use_exit_block",
        module="block",
        tensors="layer",
        origin="decoder.layers.{next_layer}",
        help_when_added="own transformer layer, a copy of the one after the exit",
        help_when_planned="each exit has a whole layer",
    ),
    HeadPart(
        field="use_exit_norm",
        module="norm",
        tensors="norm",
        origin="decoder.final_layernorm",
        help_when_added="own norm, a copy of the final one",
        help_when_planned="each exit has its own norm",
    ),
    HeadPart(
        field="untie_exit_output_weights",
        module="projection",
        tensors="output",
        origin="{output}",
        help_when_added="own projection, a copy of the model's output layer; without this flag, "
        "exits project with the word embedding, which is a different matrix if the model does not "
        "tie its output layer to it",
        help_when_planned="each exit has its own projection",
    ),
)
"""All parts, in the order in which a hidden state passes through them."""


def _numbers(kind: type) -> dict[str, Any]:
    return {"argparse_meta": {"type": kind, "nargs": "+", "default": []}}


@dataclass(frozen=True, kw_only=True)
class EarlyExitConfig(FlagFields):
    """Where the exits are, what their heads are made of, and how their losses are weighted.

    Raises:
        ValueError: a field is outside its range; the message names the flag, the value and the
            range. Bounds that depend on the depth of the model are checked by `validate`.
    """

    exit_layer_nums: tuple[int, ...] = field(default=(), metadata=_numbers(int))
    """Layers that have an exit, counted from 1. The exit is after the layer, or before it with
    --pre-exit."""

    pre_exit: bool = False
    """Place each exit before its layer instead of after it: --pre-exit with layer k + 1 is the
    same model as an exit after layer k, but at a stage boundary the head moves to the next
    pipeline stage."""

    use_exit_norm: bool = False
    """Give each exit its own norm before the output projection."""

    use_exit_mlp: bool = False
    """Give each exit its own MLP, which replaces its layer's MLP in the exit's branch."""

    use_exit_block: bool = False
    """Give each exit a whole transformer layer of its own."""

    untie_exit_output_weights: bool = False
    """Give each exit an output projection of its own; the default is one projection for all
    exits, tied to the word embedding."""

    use_exit_gate: bool = False
    """Give each exit a gate: a linear classifier of the hidden state (at unit RMS) that learns
    whether the exit's most probable token is the final head's. Its gradients change nothing but
    itself, and the norm by which --clip-grad clips. Microbatches that --fill-explicit-bubbles ends
    before the final head, and tokens that --exit-propagate-prob freezes, teach it nothing."""

    share_final_head: bool = False
    """Let all exits predict with the model's own final norm and output layer, as LayerSkip does
    (arXiv 2404.16710): they have no weights of their own, except for gates."""

    exit_vocab_size: int | None = None
    """Number of tokens that exits can predict: the first ones of the vocabulary, which are the most
    frequent ones in most tokenizers (default: all). Most of the cost of evaluating an exit is its
    output projection."""

    exit_measure: ExitMeasure = "max_probability"
    """Measure of confidence that inference leaves at exits by, where a request asks for no other
    one. It is stored with the model and changes nothing in training."""

    exit_layer_weight: tuple[float, ...] = field(default=(), metadata=_numbers(float))
    """Weight of each exit's loss in the total loss, in the order of --exit-layer-nums
    (default: 1.0 each)."""

    exit_layer_weight_init: tuple[float, ...] = field(default=(), metadata=_numbers(float))
    """Weight of each exit's loss at the first iteration, if --exit-layer-weight-warmup-iters is
    positive (default: 0.0 each). With a value above the final weight, the weight decreases."""

    exit_layer_weight_warmup_iters: int = 0
    """Number of iterations over which the weights change from their initial to their final
    values."""

    exit_layer_weight_warmup_style: WarmupStyle = "linear"
    """Shape of the change from the initial to the final weights."""

    exit_layer_temperature: tuple[float, ...] = field(default=(), metadata=_numbers(float))
    """Divisor of each exit's logits in its loss (default: 1.0 each)."""

    use_dynamic_exit_layer_weight: bool = False
    """Weight the loss of each token by the exit's own confidence in it, the largest softmax
    probability (held constant in the backward pass)."""

    def __post_init__(self) -> None:
        for name in ("exit_layer_nums", *PER_EXIT_DEFAULTS):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        lowest = 2 if self.pre_exit else 1
        for number in self.exit_layer_nums:
            if isinstance(number, bool) or not isinstance(number, int) or number < lowest:
                raise self._layer_refusal(number, lowest, "the number of layers")
        repeated = {n for n in self.exit_layer_nums if self.exit_layer_nums.count(n) > 1}
        if repeated:
            raise ValueError(
                f"--exit-layer-nums {_join(self.exit_layer_nums)}: layer {min(repeated)} is given "
                "more than once, allowed: one exit for each layer"
            )
        for name, default in PER_EXIT_DEFAULTS.items():
            self._check_per_exit_values(name, default)
        ZERO_OR_MORE.check_flags(self, "exit_layer_weight_warmup_iters")
        if self.exit_layer_weight_warmup_style not in get_args(WarmupStyle):
            raise ValueError(
                f"--exit-layer-weight-warmup-style {self.exit_layer_weight_warmup_style!r} is "
                f"unknown, allowed: {', '.join(get_args(WarmupStyle))}"
            )
        if self.exit_measure not in get_args(ExitMeasure):
            raise out_of_range(
                "--exit-measure", self.exit_measure, ", ".join(get_args(ExitMeasure))
            )
        if self.exit_measure == "gate" and not self.use_exit_gate:
            raise ValueError("--exit-measure gate needs exits with gates: give --use-exit-gate")
        if self.use_exit_mlp and self.pre_exit:
            raise ValueError(
                "--use-exit-mlp cannot be combined with --pre-exit: the exit's MLP replaces the "
                "MLP of the layer that it follows, so the exit must be after that layer "
                "(allowed: one of the two flags)"
            )
        Range(least=2, is_integer=True).check_flags(self, "exit_vocab_size")
        if self.exit_vocab_size is not None and self.untie_exit_output_weights:
            raise ValueError(
                "--exit-vocab-size cannot be combined with --untie-exit-output-weights: it makes "
                "exits project with the first rows of the word embedding"
            )
        if self.share_final_head:
            self._check_shared_head()
        self._refuse_what_has_no_effect()

    def _check_shared_head(self) -> None:
        own = [as_flag(part.field) for part in self.head_parts if not part.is_beside]
        if self.exit_vocab_size is not None:
            own.append(f"--exit-vocab-size {self.exit_vocab_size}")
        if own:
            raise ValueError(
                f"--share-final-head cannot be combined with {own[0]}: exits then predict with the "
                "model's final norm and output layer as they are (allowed: one of the two flags)"
            )

    def _refuse_what_has_no_effect(self) -> None:
        if not self.exit_layer_nums:
            self.refuse_changed(*_NEED_EXITS, without="--exit-layer-nums")
        if self.exit_layer_weight_warmup_iters == 0:
            for name, default in (("weight_init", 0.0), ("weight_warmup_style", "linear")):
                value = getattr(self, f"exit_layer_{name}")
                values = (value,) if isinstance(value, str) else value
                if any(one != default for one in values):
                    raise ValueError(
                        f"{as_flag(f'exit_layer_{name}')} {_join(values)} has no effect without "
                        "--exit-layer-weight-warmup-iters, allowed: 1 or more iterations"
                    )

    def _check_per_exit_values(self, name: str, default: float) -> None:
        flag = as_flag(name)
        values = getattr(self, name)
        if not values:
            object.__setattr__(self, name, (default,) * len(self.exit_layer_nums))
            return
        if len(values) != len(self.exit_layer_nums):
            raise ValueError(
                f"{flag} {_join(values)} has {len(values)} values, allowed: one for each of the "
                f"{len(self.exit_layer_nums)} layers of --exit-layer-nums"
            )
        allowed = ABOVE_ZERO if name == "exit_layer_temperature" else ZERO_OR_MORE
        for value in values:
            allowed.check(**{flag: value})

    def _layer_refusal(self, number: object, lowest: int, highest: object) -> FieldError:
        placement = " with --pre-exit" if self.pre_exit else ""
        return out_of_range("--exit-layer-nums", number, f"{lowest} to {highest}{placement}")

    def validate(self, num_layers: int, vocab_size: int | None = None) -> None:
        """Check the exits against the depth of the model, and its vocabulary where that is given.

        Raises:
            ValueError: a layer of `exit_layer_nums` is beyond `num_layers`, or `exit_vocab_size`
                beyond `vocab_size`.
        """
        lowest = 2 if self.pre_exit else 1
        for number in self.exit_layer_nums:
            if number > num_layers:
                raise self._layer_refusal(number, lowest, num_layers)
        answers = self.exit_vocab_size
        if answers is not None and vocab_size is not None and answers > vocab_size:
            allowed = f"2 to the {vocab_size} tokens of the vocabulary"
            raise out_of_range("--exit-vocab-size", answers, allowed)

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The exits in the order of their positions, whatever the placement."""
        shift = 1 if self.pre_exit else 0
        per_exit = zip(
            self.exit_layer_nums,
            self.exit_layer_weight,
            self.exit_layer_weight_init,
            self.exit_layer_temperature,
            strict=True,
        )
        unsorted = (Exit(n - shift, w, w0, t) for n, w, w0, t in per_exit)
        return tuple(sorted(unsorted, key=lambda one: one.position))

    @property
    def positions(self) -> tuple[int, ...]:
        """Number of backbone layers before each exit, ascending."""
        return tuple(one.position for one in self.exits)

    def placed(self, pre_exit: bool) -> "EarlyExitConfig":
        """The same exits, placed after their layers or, with `pre_exit`, before the next ones.

        Raises:
            ValueError: exits with MLPs of their own can only be placed after their layers.
        """
        shift = int(pre_exit) - int(self.pre_exit)
        numbers = tuple(number + shift for number in self.exit_layer_nums)
        return replace(self, exit_layer_nums=numbers, pre_exit=pre_exit)

    def stages(self, layers_per_stage: Sequence[int]) -> tuple[int, ...]:
        """The pipeline stage of each exit, in the order of their positions: the stage of the layer
        after which, or with `pre_exit` before which, the exit is placed."""
        ends = list(accumulate(layers_per_stage))
        return tuple(
            next(stage for stage, end in enumerate(ends) if layer <= end)
            for layer in sorted(self.exit_layer_nums)
        )

    @property
    def head_parts(self) -> tuple[HeadPart, ...]:
        """The parts of each head, in the order in which a hidden state passes through them."""
        return tuple(part for part in HEAD_PARTS if getattr(self, part.field))

    @property
    def branch_parts(self) -> tuple[HeadPart, ...]:
        """The parts of each head before the output projection."""
        inside = (part for part in self.head_parts if not part.is_beside)
        return tuple(part for part in inside if part.tensors != "output")

    @property
    def beside_parts(self) -> tuple[HeadPart, ...]:
        """The parts that stand beside the branch."""
        return tuple(part for part in self.head_parts if part.is_beside)

    @property
    def replaces_mlp(self) -> bool:
        """Whether exits branch off before the MLP of the layer that they follow."""
        return any(part.replaces_mlp for part in self.head_parts)

    @property
    def head_options(self) -> dict[str, Any]:
        """The fields that determine the parts of exit heads, with their values."""
        names = (*HEAD_FIELDS, "share_final_head", "exit_vocab_size")
        return {name: getattr(self, name) for name in names}

    @property
    def head_words(self) -> list[str]:
        """The flags that determine the parts of exit heads, as words of a command line."""
        switches = (*HEAD_FIELDS, "share_final_head")
        words = [as_flag(name) for name in switches if getattr(self, name)]
        if self.exit_vocab_size is not None:
            words += ["--exit-vocab-size", str(self.exit_vocab_size)]
        return words

    @property
    def head_flags(self) -> str:
        """The flags that say what the heads of exits are made of, for messages."""
        return " ".join(self.head_words) or "no flag of heads"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


PER_EXIT_DEFAULTS = {
    "exit_layer_weight": 1.0,
    "exit_layer_weight_init": 0.0,
    "exit_layer_temperature": 1.0,
}
"""The fields that list a number for each exit, in the order of `exit_layer_nums`."""


HEAD_FIELDS = {
    f.name: part for f in fields(EarlyExitConfig) for part in HEAD_PARTS if part.field == f.name
}
"""All parts by their fields, in the order of the fields: that of help texts and messages."""


_NEED_EXITS = (
    "pre_exit",
    *HEAD_FIELDS,
    "share_final_head",
    "exit_vocab_size",
    "exit_measure",
    "use_dynamic_exit_layer_weight",
    "exit_layer_weight_warmup_iters",
)


def _join(values: Sequence[object]) -> str:
    return " ".join(str(value) for value in values)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
