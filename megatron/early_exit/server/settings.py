"""What the operator of a server decides."""

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.inference.params import DEFAULT_THRESHOLD, DraftMethod, Mode
from megatron.early_exit.server.http.client_address import Network


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitSettings:
    """How exits are used where a request does not say it.

    Attributes:
        mode: see `SamplingParams`, like all of these.
        early_exit_threshold: for mode `early_exit`.
        exit_layers: for mode `early_exit`; None is all.
        exit_measure: for mode `early_exit`; None is what is stored with the model.
        exit_thresholds: for mode `early_exit`, instead of `early_exit_threshold`; they hold for
            `exit_layers`, so where a request says which exits or which threshold they do not.
        exit_threshold_decay: for mode `early_exit`.
        kv_policy: for mode `early_exit`.
        exits_pay_at: for mode `early_exit`.
        draft_method: for mode `self_speculative`; None is what the model has.
        draft_exit_layer: for mode `self_speculative`; None is the first exit.
        num_draft_tokens: for mode `self_speculative`.
        draft_confidence: for mode `self_speculative`; None finds the best one while decoding.
        model: the model's name, where what is written behind it decides.
        decided: the fields that it decides; no request may say otherwise.
        stored: the fields here that are those of the rule that is stored with the model; `mode` is
            among them where neither a flag nor the model's name decides it.
    """

    mode: Mode
    early_exit_threshold: float = DEFAULT_THRESHOLD
    exit_layers: tuple[int, ...] | None = None
    exit_measure: ExitMeasure | None = None
    exit_thresholds: tuple[float, ...] | None = None
    exit_threshold_decay: float = 0.0
    kv_policy: KVPolicy = "exact"
    exits_pay_at: int = 0
    draft_method: DraftMethod | None = None
    draft_exit_layer: int | None = None
    num_draft_tokens: int = 4
    draft_confidence: float | None = None
    model: str | None = None
    decided: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()

    def without_stored(self, names: Collection[str]) -> "ExitSettings":
        """The same with what is built in, instead of what the stored rule says.

        Args:
            names: of the fields for which that is wanted, wherever they come from. Nothing is built
                in for the mode.
        """
        given = self.stored & set(names)
        defaults: dict[str, Any] = {one.name: one.default for one in fields(self)}
        built_in = {name: defaults[name] for name in given - {"mode"}}
        return replace(self, **built_in, stored=self.stored - given)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """A server's name, defaults and limits.

    Attributes:
        model_name: under which the model is served.
        exits: how exits are used where neither a request nor its model's name says it.
        api_key: what clients have to send; None lets everyone in.
        max_waiting: requests under way beyond the sequences that run; more are turned away (429).
        max_sequences: prompts, times answers to each, in one request.
        max_body_bytes: size of a request.
        request_timeout: seconds until an answer is given up.
        log_prompts: put what clients send into the log.
        trusted_proxies: whose `X-Forwarded-For` is believed.
        allowed_origins: of pages elsewhere that may use the server; `*` is all.
        example_prompts: what the server's page offers to begin with; none: what suits any model.
    """

    model_name: str
    exits: ExitSettings
    api_key: str | None = field(default=None, repr=False)
    max_waiting: int = 128
    max_sequences: int = 128
    max_body_bytes: int = 4 * 2**20
    request_timeout: float = 600.0
    log_prompts: bool = False
    trusted_proxies: tuple[Network, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    example_prompts: tuple[str, ...] = ()
