"""Fields that several kinds of request have in common, and what they ask of the engine."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from megatron.early_exit.checkpoint.stored_rule import meaningless_beside
from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.inference.params import (
    ASKS_FOR_NOTHING,
    MODE_FIELDS,
    RANGES,
    DraftMethod,
    Mode,
    modes_of,
)
from megatron.early_exit.ranges import INDEX, ZERO_TO_ONE, Range
from megatron.early_exit.server.bodies.ranges import InRange
from megatron.early_exit.server.bodies.unsupported import Unsupported, drop_unsupported, schema_of
from megatron.early_exit.server.http.errors import ApiError
from megatron.early_exit.server.settings import ExitSettings

MEASURES = (
    "What an exit's confidence is: max_probability, margin (of the two largest ones), entropy (1 "
    "less its share of the most that it can be), similarity (of hidden states at neighbouring "
    "exits) or gate (what the exit's gate says, which is asked before the exit; for models that "
    "have gates)."
)
STORED = "Default: the server's, else the model's."
PAYS = (
    "Ask exits only while they make decoding faster than mode full would be in a batch of this "
    "many sequences, by the costs of the model's parts and by how often they have given the text's "
    "tokens. 0 is off."
)
_ABOUT = {"title", "default", "description"}
"""What a JSON schema says of a field whatever its kind is."""


class RequestModel(BaseModel):
    """A body that a client sends: nothing is converted to what it is not, nothing is ignored.

    `null` is the same as nothing, for whatever field is not required.
    """

    unsupported: ClassVar[Mapping[str, Unsupported]] = {}
    """The fields that are known, but not supported."""

    within: ClassVar[str | None] = None
    """The field that such objects are in; None for a whole body."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = drop_unsupported(body, cls.unsupported, cls.within)
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        # An unknown field stays, and is refused, whatever its value is.
        return {
            name: value for name, value in body.items() if value is not None or name not in optional
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema.get("properties", {}).items():
            kinds = field.get("anyOf", ())
            is_nullable = {"type": "null"} in kinds or field.get("type") == "null"
            if name not in schema.get("required", ()) and not is_nullable:
                about = {key: field.pop(key) for key in _ABOUT & field.keys()}
                own = dict(field)
                field.clear()
                field.update(about, anyOf=[own, {"type": "null"}])
        for name, unsupported in cls.unsupported.items():
            schema.setdefault("properties", {})[name] = schema_of(unsupported)
        return schema


def _as_texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None,
    BeforeValidator(_as_texts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 16},
                {"type": "null"},
            ]
        }
    ),
]
"""One text, several, or none."""

Natural = Annotated[int, InRange(INDEX)]
Share = Annotated[float, InRange(ZERO_TO_ONE)]
BatchSize = Annotated[int, InRange(RANGES["exits_pay_at"])]
Decay = Annotated[float, InRange(RANGES["exit_threshold_decay"])]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,18}$")]


def not_supported(value: bool) -> bool:
    """Refuse a switch that is on, and return one that is off.

    Raises:
        ValueError: the switch is on.
    """
    if value:
        raise ValueError("is not supported, allowed: false")
    return value


class ExitFields(RequestModel):
    """How a request uses the exits."""

    mode: Mode | None = Field(
        None,
        description="full: all layers for every token. early_exit: a token from the first exit "
        "that is sure enough. self_speculative: an exit drafts, the whole model corrects. Default: "
        "what the model's name says, else the server's.",
    )
    use_early_exit: bool | None = Field(
        None, description="EE-LLM's name: true is mode early_exit, false is mode full."
    )
    early_exit_threshold: Share | None = Field(
        None, description="Least confidence with which an exit may give a token."
    )
    early_exit_thres: Share | None = Field(None, description="EE-LLM's name of the threshold.")
    exit_layers: list[Natural] | None = Field(
        None, description="The exits that are asked, each named by the layers before it."
    )
    exit_measure: ExitMeasure | None = Field(None, description=f"{MEASURES} {STORED}")
    exit_thresholds: list[Share] | None = Field(
        None,
        description="A threshold for each exit that is asked, from the shallowest to the deepest, "
        "instead of early_exit_threshold.",
    )
    exit_threshold_decay: Decay | None = Field(
        None,
        description="Let thresholds decay: that of token i of at most n is 0.9 of itself, plus "
        "0.1 exp(-decay i / n). 0 is off.",
    )
    kv_policy: KVPolicy | None = Field(
        None,
        description="exact: later tokens see of a position that left early what the whole model "
        "computes there. propagate: what each skipped layer makes of its hidden state at the exit, "
        "which is cheap, and may change texts. Default: the server's.",
    )
    exits_pay_at: BatchSize | None = Field(None, description=f"{PAYS} Default: the server's.")
    draft_method: DraftMethod | None = Field(
        None,
        description="What drafts: exit; mtp, a multi-token-prediction module; or auto, that one of "
        "the module and of all exits which makes the text faster. Default: the server's, or that "
        "of draft_exit_layer.",
    )
    draft_exit_layer: Natural | None = Field(None, description="The exit that drafts.")
    num_draft_tokens: Annotated[int, InRange(RANGES["num_draft_tokens"])] | None = Field(
        None, description="Most drafts before the whole model looks at them."
    )
    draft_confidence: Annotated[float, InRange(RANGES["draft_confidence"])] | None = Field(
        None,
        description="Least product of the exit's confidences of a draft and of those before it. "
        "Default: the server's; that of a server without one is found while decoding, which does "
        "without drafts for some time where they make it slower.",
    )
    exit_details: bool = Field(
        False, description="Tell what each head on the way to a token found best."
    )

    def exit_params(
        self, settings: ExitSettings, num_exits: int, num_depths: int = 0, only_scores: bool = False
    ) -> dict[str, Any]:
        """The fields of `SamplingParams` that are about exits.

        Args:
            settings: what applies where the request says nothing.
            num_exits: of the model.
            num_depths: of its multi-token-prediction module, which can draft instead of an exit.
            only_scores: nothing is generated.

        Raises:
            ApiError: what the request says contradicts itself, or needs exits where none are.
        """
        thresholds = self.exit_thresholds
        given = {
            "early_exit_threshold": self._threshold(),
            "exit_layers": None if self.exit_layers is None else tuple(self.exit_layers),
            "exit_measure": self.exit_measure,
            "exit_thresholds": None if thresholds is None else tuple(thresholds),
            "exit_threshold_decay": self.exit_threshold_decay,
            "kv_policy": self.kv_policy,
            "exits_pay_at": self.exits_pay_at,
            "draft_method": self.draft_method,
            "draft_exit_layer": self.draft_exit_layer,
            "num_draft_tokens": self.num_draft_tokens,
            "draft_confidence": self.draft_confidence,
        }
        given = {name: value for name, value in given.items() if value is not None}
        settings = settings.without_stored(meaningless_beside(given, settings.exit_measure))
        mode = self._mode(given) or _default_mode(given, settings, only_scores)
        self._check_name(given if mode == settings.mode else {**given, "mode": mode}, settings)
        if mode not in modes_of(num_exits, num_depths):
            allowed = " or ".join(modes_of(num_exits, num_depths))
            raise ApiError(400, f"mode {mode}: the model has no exits, allowed: {allowed}", "mode")
        defaults = {name: getattr(settings, name) for name in MODE_FIELDS[mode]}
        if given.get("draft_method") == "mtp":
            defaults["draft_exit_layer"] = None
        elif given.get("draft_method") == "auto" and settings.draft_method != "auto":
            # All exits, where the request does not name one itself.
            defaults["draft_exit_layer"] = None
        elif "draft_exit_layer" in given and settings.draft_method == "mtp":
            defaults["draft_method"] = None
        if mode == "early_exit":
            # One threshold or several, whichever the request or the model's name says.
            said = {*given, *settings.decided}
            is_one = bool(said & {"early_exit_threshold", "exit_layers"})
            if "exit_thresholds" in given or (settings.exit_thresholds and not is_one):
                del defaults["early_exit_threshold"]
            else:
                del defaults["exit_thresholds"]
        return {**defaults, **given, "mode": mode, "exit_details": self.exit_details}

    def _check_name(self, given: dict[str, Any], settings: ExitSettings) -> None:
        """Refuse what the model's name decides otherwise."""
        if "mode" in given and "mode" in settings.decided:
            # The field that asks for the mode, be it by its name or by being there.
            switches = ("mode", "use_early_exit")
            names: list[str] = [name for name in switches if name in self.model_fields_set]
            names += [name for name in MODE_FIELDS["early_exit"] if name in given]
            self._contradicts(names[0], given, f"means mode {settings.mode}", settings)
        if "exit_thresholds" in given and "early_exit_threshold" in settings.decided:
            meaning = f"means early_exit_threshold {settings.early_exit_threshold}"
            self._contradicts("exit_thresholds", given, meaning, settings)
        for name in given.keys() & settings.decided:
            decided = getattr(settings, name)
            if given[name] != decided:
                value = list(decided) if isinstance(decided, tuple) else decided
                self._contradicts(name, given, f"means {value}", settings)

    def _contradicts(
        self, name: str, given: dict[str, Any], meaning: str, settings: ExitSettings
    ) -> None:
        if name == "early_exit_threshold" and self.early_exit_threshold is None:
            name = "early_exit_thres"
        value = json.dumps(getattr(self, name))
        message = f"{name} {value}: contradicts model {settings.model!r}, which {meaning}"
        raise ApiError(400, message, name)

    def _threshold(self) -> float | None:
        names = (self.early_exit_threshold, self.early_exit_thres)
        if None not in names and names[0] != names[1]:
            message = f"early_exit_thres {names[1]}: contradicts early_exit_threshold {names[0]}"
            raise ApiError(400, message, "early_exit_thres")
        return names[0] if names[1] is None else names[1]

    def _mode(self, given: dict[str, Any]) -> Mode | None:
        switched: Mode | None = None
        if self.use_early_exit is not None:
            switched = "early_exit" if self.use_early_exit else "full"
        if self.mode is not None and switched not in (None, self.mode):
            value = json.dumps(self.use_early_exit)
            message = f"use_early_exit {value}: contradicts mode {self.mode}"
            raise ApiError(400, message, "use_early_exit")
        wanted = given.keys() & MODE_FIELDS["early_exit"]
        wanted = {name for name in wanted if given[name] != ASKS_FOR_NOTHING.get(name)}
        if self.mode is None and switched is None and wanted:
            return "early_exit"
        return self.mode or switched


def _default_mode(given: Mapping[str, Any], settings: ExitSettings, only_scores: bool) -> Mode:
    """The mode of a request that asks for none, by what it says and by the server."""
    if "mode" in settings.stored:
        # That of a stored rule is for those who say nothing of how to decode.
        if only_scores:
            return "full"
        if given.keys() & MODE_FIELDS["self_speculative"]:
            return "self_speculative"
    return settings.mode


class SamplingFields(ExitFields):
    """How tokens are chosen, and when a text ends: OpenAI's fields and the usual extras."""

    temperature: Annotated[float, InRange(RANGES["temperature"])] | None = Field(
        None, description="Default: 1; 0 takes the most probable token."
    )
    top_p: Share | None = Field(None, description="0 takes the most probable token.")
    top_k: Annotated[int, InRange(Range(least=-1))] | None = Field(
        None, description="0 and -1: no limit."
    )
    min_p: Annotated[float, InRange(RANGES["min_p"])] | None = None
    top_p_decay: Annotated[float, InRange(RANGES["top_p_decay"])] | None = None
    top_p_bound: Annotated[float, InRange(RANGES["top_p_bound"])] | None = None
    repetition_penalty: Annotated[float, InRange(RANGES["repetition_penalty"])] | None = None
    seed: Annotated[int, InRange(Range(least=-(2**63), most=2**64 - 1))] | None = Field(
        None, description="Modulo 2**63; -1 draws one, as none does."
    )
    stop: Stops = None
    stop_token_ids: Annotated[list[Natural], Field(max_length=64)] | None = None
    min_tokens: Natural | None = None
    ignore_eos: bool = False
    frequency_penalty: Annotated[float, InRange(RANGES["frequency_penalty"])] | None = None
    presence_penalty: Annotated[float, InRange(RANGES["presence_penalty"])] | None = None
    logit_bias: dict[TokenName, Annotated[float, InRange(RANGES["logit_bias"])]] | None = Field(
        None, description="What is added to the logits of tokens."
    )
    user: str | None = Field(None, description="Of the client's own use.")
    safety_identifier: str | None = Field(None, description="Of the client's own use.")
    metadata: dict[str, str] | None = Field(None, description="Of the client's own use.")
    prompt_cache_key: str | None = Field(None, description="Of the client's own use.")
    prompt_cache_retention: str | None = Field(None, description="Of the client's own use.")
    prompt_cache_options: dict[str, Any] | None = Field(
        None, description="Of the client's own use."
    )
    cache_salt: str | None = Field(None, description="Requests share no caches here in any case.")

    def sampling_params(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that are about the choice of tokens.

        Raises:
            ApiError: a field has no effect.
        """
        if self.top_p_bound and self.top_p_decay in (None, 1):
            message = f"top_p_bound {self.top_p_bound}: has no effect without top_p_decay"
            raise ApiError(400, message, "top_p_bound")
        names = (
            *("top_p", "top_k", "min_p", "top_p_decay", "top_p_bound", "repetition_penalty"),
            *("seed", "min_tokens", "presence_penalty", "frequency_penalty"),
        )
        given = {name: getattr(self, name) for name in names}
        temperature = 1.0 if self.temperature is None else self.temperature
        if self.top_p == 0:
            temperature, given["top_p"] = 0.0, None
        if self.top_k == -1:
            given["top_k"] = None
        if self.seed is not None:
            given["seed"] = None if self.seed == -1 else self.seed % 2**63
        return {
            "temperature": temperature,
            "stop": tuple(self.stop or ()),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": self.ignore_eos,
            "logit_bias": {int(token): value for token, value in (self.logit_bias or {}).items()},
            **{name: value for name, value in given.items() if value is not None},
        }
