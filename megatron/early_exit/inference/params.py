"""What a request may ask for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.errors import FieldError, out_of_range
from megatron.early_exit.ranges import INDEX, ZERO_TO_ONE, Range

Mode = Literal["full", "early_exit", "self_speculative"]
DraftMethod = Literal["exit", "mtp", "auto"]
DEFAULT_THRESHOLD = 0.8


def modes_of(num_exits: int, num_depths: int) -> tuple[Mode, ...]:
    """The modes in which a model can decode.

    Args:
        num_exits: of the model.
        num_depths: of its multi-token-prediction module, if it has one.
    """
    if num_exits:
        return get_args(Mode)
    return ("full", "self_speculative") if num_depths else ("full",)


MODE_FIELDS: dict[Mode, tuple[str, ...]] = {
    "full": (),
    "early_exit": (
        "early_exit_threshold",
        "exit_layers",
        "exit_measure",
        "exit_thresholds",
        "exit_threshold_decay",
        "kv_policy",
        "exits_pay_at",
    ),
    "self_speculative": (
        "draft_method",
        "draft_exit_layer",
        "num_draft_tokens",
        "draft_confidence",
    ),
}
"""The fields that have an effect in one mode alone. With `exit_details`, `exit_layers` also has one
in mode `full`."""

ASKS_FOR_NOTHING: dict[str, Any] = {
    "kv_policy": "exact",
    "exit_threshold_decay": 0,
    "exits_pay_at": 0,
}
"""Values of fields of mode `early_exit` with which every mode decodes as it does without them."""

RANGES: dict[str, Range] = {
    "max_tokens": Range(least=0, is_integer=True, least_means="only with echo or prompt_logprobs"),
    "min_tokens": Range(least=0, is_integer=True),
    "temperature": Range(least=0, most=100),
    "repetition_penalty": Range(least=0, most=100, excludes_least=True),
    "presence_penalty": Range(least=-2, most=2),
    "frequency_penalty": Range(least=-2, most=2),
    "logit_bias": Range(least=-100, most=100),
    "min_p": Range(least=0, most=1, least_means="no limit"),
    "top_k": Range(least=0, is_integer=True, least_means="no limit"),
    "top_p": Range(least=0, most=1, excludes_least=True),
    "top_p_decay": Range(least=0, most=1, excludes_least=True, most_means="off"),
    "top_p_bound": ZERO_TO_ONE,
    "seed": Range(least=0, most=2**63 - 1, is_integer=True),
    "stop_token_ids": INDEX,
    "logprobs": INDEX,
    "prompt_logprobs": INDEX,
    "early_exit_threshold": ZERO_TO_ONE,
    "exit_layers": INDEX,
    "exit_thresholds": ZERO_TO_ONE,
    "exit_threshold_decay": Range(least=0, most=100, least_means="off"),
    "exits_pay_at": Range(least=0, most=1024, is_integer=True, least_means="off"),
    "num_draft_tokens": Range(least=1, most=1024, is_integer=True),
    "draft_exit_layer": INDEX,
    "draft_confidence": Range(least=0, most=1, least_means="off"),
}
"""The numbers that fields may have, or the items of those that are lists. The server's bodies and
the flags of the command line have these, too, where their protocols do not say otherwise."""
_LISTS = ("logit_bias", "stop_token_ids", "exit_layers", "exit_thresholds")
_NO_MORE_THAN = {"min_tokens": "max_tokens", "top_p_bound": "top_p"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue a prompt, and what to say of it.

    Raises:
        FieldError: a field is of the wrong type, outside its range or without effect in the mode;
            the message names the field, the value and the range. What depends on the model is
            checked when the request reaches an engine.
    """

    max_tokens: int = 16
    """Most tokens to generate; the context of the model may end a sequence earlier. 0 scores the
    prompt alone, with `echo` or `prompt_logprobs`."""

    min_tokens: int = 0
    """Before this many tokens, those that end the sequence cannot be chosen, and no stop string
    ends it."""

    temperature: float = 0.0
    """Divisor of the logits before sampling; 0 takes the most probable token."""

    repetition_penalty: float = 1.0
    """Divisor of the positive logits, and factor of the negative ones, of tokens in the prompt or
    generated before (arXiv 1909.05858); 1 is off."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens generated before, -2 to 2; 0 is off."""

    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated before, -2 to 2; 0 is off."""

    logit_bias: tuple[tuple[int, float], ...] = ()
    """Tokens, and what is added to their logits: -100 to 100. A mapping will do as well."""

    min_p: float = 0.0
    """Sample among tokens with at least this share of the largest probability; 0 is no limit."""

    top_k: int = 0
    """Sample among this many most probable tokens; 0 is no limit."""

    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this probability."""

    top_p_decay: float = 1.0
    """Factor of `top_p` after each generated token; 1 is off."""

    top_p_bound: float = 0.0
    """Where `top_p` stops to decay."""

    seed: int | None = None
    """Seed of the sampling; None draws one."""

    stop: tuple[str, ...] = ()
    """Texts that end the sequence; the text is cut before the one that is complete first."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence, besides the tokenizer's end of document."""

    ignore_eos: bool = False
    """Do not stop at the tokenizer's end of document."""

    logprobs: int | None = None
    """Give the log-probabilities of this many best tokens at each generated one; None and 0 give
    the generated token's alone."""

    prompt_logprobs: int | None = None
    """Give the log-probability of each prompt token behind those before it, and of this many best
    tokens in its place; None does not score the prompt. In mode `early_exit` they are those of the
    exit that would have given a token there, else of the final head; an exit that answers with
    some tokens only gives the others a probability of 0."""

    echo: bool = False
    """Put the prompt in front of the text."""

    exit_details: bool = False
    """Give for each token what each head on its way found best, and how sure that head was: the
    enabled exits that it passed, and the final head if it got there. Mode `full` asks the exits for
    this alone. Mode `self_speculative` tells of the two heads that it asks for every token in any
    case: the exit that drafts, whether its token was drafted, accepted or neither, and the final
    head. Where a multi-token-prediction module drafts, it tells of that for the tokens that it was
    asked about."""

    mode: Mode | None = None
    """`full` runs all layers for every token; `early_exit` takes a token from the first exit that
    is confident enough; `self_speculative` drafts tokens at one exit and lets the full model
    correct them, which changes nothing in the text (arXiv 2404.16710). None is `early_exit` by the
    rule that is stored with the model (`tools/choose_threshold.py`), else `full`."""

    early_exit_threshold: float | None = None
    """Least confidence to leave at an exit, 0 to 1; in mode `early_exit` None is that of the stored
    rule, else 0.8."""

    exit_layers: tuple[int, ...] | None = None
    """The exits to use, each named by the number of backbone layers before it; None is those of
    the stored rule, else all. In mode `full`, those that `exit_details` tells of."""

    exit_measure: ExitMeasure | None = None
    """What confidence is, a number from 0 to 1: `max_probability`, the largest softmax probability;
    `margin`, its distance from the second largest one; `entropy`, 1 - H / ln(n), where H is the
    entropy and n the number of tokens that the head can answer with; `similarity`, the cosine of
    the residual stream and the one at the exit before (CALM, arXiv 2207.07061, compares
    neighbouring layers), or the embedding's output before the first one, where negative values
    count as 0; `gate`, the probability by the exit's gate that the exit agrees with the final head,
    for models that have gates. A gate is asked before the exit, which is evaluated only where it
    gives the token; the final head's confidence is then the largest probability. None is that of
    the stored rule, else the measure that is stored with the model. In mode `early_exit` all
    confidences that are told are these."""

    exit_thresholds: tuple[float, ...] | None = None
    """A threshold for each exit that is used, from the shallowest to the deepest, instead of one
    `early_exit_threshold` for all."""

    exit_threshold_decay: float = 0.0
    """Let thresholds decay: in the place of token i of at most N, from 0, a threshold t becomes
    clip(0.9 t + 0.1 exp(-decay i / N), 0, 1) (CALM, arXiv 2207.07061, where it is 4); N is
    `max_tokens`. Where a prompt is scored, i is the token's place in it, and N its length. 0 is
    off."""

    kv_policy: KVPolicy | None = None
    """What later tokens see, in deeper layers, of a position that has left at an exit. `exact`:
    what the full model computes there, which is done when it is needed. `propagate`: keys and
    values that each layer makes of the hidden state at the exit; nothing else of the layers behind
    it is ever computed there, so later tokens may be other ones (arXiv 2207.07061). Positions of
    the prompt leave where `prompt_logprobs` are asked for; else but the last one they do not.
    None is that of the stored rule, else `exact`."""

    exits_pay_at: int = 0
    """Ask exits only while they make decoding faster than mode `full` in a batch of this many
    sequences, by the costs of the model's parts and by how often they have given this sequence's
    tokens: where they have lost about two steps of the full model, the final head gives 150 tokens
    or more without them, and then they are tried again. So other tokens come out than with the
    exits alone, but they do not depend on the other sequences. Prompts are scored with all exits.
    0 is off."""

    num_draft_tokens: int = 4
    """Most tokens to draft before the full model looks at them; a multi-token-prediction module
    drafts as many as it has depths at most."""

    draft_method: DraftMethod | None = None
    """What drafts: `exit`; `mtp`, Megatron's multi-token-prediction module, which runs no layer of
    the model for a draft; or `auto`, that one of the module and of all exits, or of the exit of
    `draft_exit_layer`, which makes the text faster, by what they cost and by how many of their
    drafts have been accepted in it. Of exits that have whole layers of their own it considers the
    first one. None is `exit` where `draft_exit_layer` is given or the model has no such module,
    else `auto`."""

    draft_exit_layer: int | None = None
    """The exit that drafts, named like `exit_layers`; None is the first one, or with
    `draft_method="auto"` whichever drafts best."""

    draft_confidence: float | None = None
    """A token is drafted where the exit's confidences of it and of the drafts in front of it have a
    product of this or more; else the drafts so far are verified. 0 is off: then the number of
    drafts follows how many are accepted. None finds the best value from the costs of the model's
    parts and from the drafts that were accepted, and stops drafting for some time where that makes
    decoding slower."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "exit_layers", "exit_thresholds"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        bias = self.logit_bias
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        object.__setattr__(self, "logit_bias", _as_tuple(map(_as_tuple, pairs)))
        for field in fields(self):
            if field.name in RANGES and field.name not in _LISTS:
                self._check_number(field.name, may_be_none=field.default is None)
        biases = f"pairs of a token and a number, {RANGES['logit_bias']}"
        self._check_items("logit_bias", _is_bias, biases)
        self._check_items("stop", _is_text, "texts of 1 character or more")
        self._check_items("stop_token_ids", INDEX.__contains__, f"integers, {INDEX}")
        if self.exit_layers is not None:
            self._check_items("exit_layers", INDEX.__contains__, f"None, or integers, {INDEX}")
        self._check_exit_thresholds()
        if self.exit_measure is not None:
            measures = get_args(ExitMeasure)
            self._check("exit_measure", self.exit_measure in measures, " or ".join(measures))
        for name in ("ignore_eos", "echo", "exit_details"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        for name, allowed in (("mode", get_args(Mode)), ("kv_policy", get_args(KVPolicy))):
            self._check(name, getattr(self, name) in (None, *allowed), " or ".join(allowed))
        if self.draft_method is not None:
            methods = get_args(DraftMethod)
            self._check("draft_method", self.draft_method in methods, " or ".join(methods))
        if self.draft_method == "mtp" and self.draft_exit_layer is not None:
            problem = "has no effect with draft_method='mtp'"
            allowed_methods = "with draft_method='exit' or 'auto'"
            raise FieldError(
                "draft_exit_layer", problem, allowed_methods, value=self.draft_exit_layer
            )
        self._check_effects()

    @property
    def threshold(self) -> float:
        """The threshold that applies in mode `early_exit`."""
        return DEFAULT_THRESHOLD if self.early_exit_threshold is None else self.early_exit_threshold

    @property
    def takes_largest_logit(self) -> bool:
        """Whether each token is that of the largest logit, as the model gives it."""
        return self.temperature == 0 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        """Whether penalties or biases change the logits that the model gives."""
        changes = self.presence_penalty or self.frequency_penalty or self.logit_bias
        return self.repetition_penalty != 1 or bool(changes)

    @property
    def needs_logits(self) -> bool:
        """Whether a token, or what is said of it, depends on more than the largest logit."""
        return not self.takes_largest_logit or self.min_tokens > 0 or bool(self.logprobs)

    def _check_number(self, name: str, may_be_none: bool) -> None:
        value, allowed = getattr(self, name), RANGES[name]
        if name in _NO_MORE_THAN:
            other = _NO_MORE_THAN[name]
            allowed = replace(allowed, most=getattr(self, other), most_means=other)
        if value is None and not may_be_none:
            raise allowed.refusal(name, value)
        allowed.check(**{name: value})

    def _check_effects(self) -> None:
        scores = self.echo or self.prompt_logprobs is not None
        self._check("max_tokens", self.max_tokens > 0 or scores, str(RANGES["max_tokens"]))
        defaults = {field.name: field.default for field in fields(self)}
        mode = self.mode or "full"
        asks_exits = mode == "full" and self.exit_details
        for needed, names in MODE_FIELDS.items():
            for name in names if needed != mode else ():
                value = getattr(self, name)
                if value in (defaults[name], ASKS_FOR_NOTHING.get(name, defaults[name])):
                    continue
                if not (name == "exit_layers" and asks_exits):
                    problem = f"has no effect with mode={mode!r}"
                    raise FieldError(name, problem, f"with mode={needed!r}", value=value)

    def _check_exit_thresholds(self) -> None:
        if self.exit_thresholds is None:
            return
        allowed = RANGES["exit_thresholds"]
        self._check_items("exit_thresholds", allowed.__contains__, f"None, or numbers, {allowed}")
        if self.early_exit_threshold is not None:
            problem = f"cannot be combined with early_exit_threshold {self.early_exit_threshold}"
            one = "one of the two"
            raise FieldError("exit_thresholds", problem, one, value=self.exit_thresholds)

    def _check_items(self, name: str, valid: Callable[[object], bool], allowed: str) -> None:
        items = getattr(self, name)
        self._check(name, isinstance(items, tuple) and all(map(valid, items)), allowed)

    def _check(self, name: str, in_range: bool, allowed: str) -> None:
        if not in_range:
            raise out_of_range(name, getattr(self, name), allowed)


def _as_tuple(value: object) -> object:
    """A tuple of what is one text or many items; what is neither is left as it is."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, Iterable) else value


def _is_bias(value: object) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2):
        return False
    return value[0] in INDEX and value[1] in RANGES["logit_bias"]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""
