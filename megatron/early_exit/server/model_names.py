"""Names under which a model is served: each may say how exits are used.

`NAME:exit=12`, `NAME:threshold=0.8`, `NAME:full` and `NAME:lossless` let clients choose that have
no field for it, such as evaluation harnesses.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.early_exit.inference.params import DEFAULT_THRESHOLD, DraftMethod
from megatron.early_exit.server.http.errors import ApiError
from megatron.early_exit.server.settings import ExitSettings

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,17})?([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model, by its name and what is written behind it.

    Attributes:
        name: its name alone.
        exits: what applies where a request says nothing.
        exit_layers: its exits.
        num_depths: of its multi-token-prediction module, if it has one.
    """

    name: str
    exits: ExitSettings
    exit_layers: Sequence[int]
    num_depths: int = 0

    @property
    def draft_methods(self) -> tuple[DraftMethod, ...]:
        """The values of a request's `draft_method` with which the model can decode."""
        if not self.num_depths:
            if len(self.exit_layers) > 1:
                return ("exit", "auto")
            return ("exit",) if self.exit_layers else ()
        return ("exit", "mtp", "auto") if self.exit_layers else ("mtp",)

    @property
    def drafter(self) -> str | None:
        """What drafts where a request does not say it: the number of layers in front of an exit,
        `mtp` or `auto`; None where nothing can."""
        methods, exits = self.draft_methods, self.exits
        if not methods:
            return None
        by_itself = methods[-1] if self.num_depths else "exit"
        method = exits.draft_method or ("exit" if exits.draft_exit_layer else by_itself)
        if method not in methods:
            method = by_itself
        return str(exits.draft_exit_layer or self.exit_layers[0]) if method == "exit" else method

    def names(self) -> list[str]:
        """The names that are listed; any threshold from 0 to 1 may be asked for."""
        ends = [":full"]
        if self.exit_layers or self.num_depths:
            ends.append(":lossless")
        if self.exit_layers:
            ends.append(f":threshold={DEFAULT_THRESHOLD}")
            ends += [f":exit={layer}" for layer in self.exit_layers]
        return [self.name, *(self.name + end for end in ends)]

    def settings(self, name: str | None) -> ExitSettings:
        """How exits are used under a name; None is the model's own.

        Raises:
            ApiError: there is no such name.
        """
        if name is None or name == self.name:
            return self.exits
        end = name.removeprefix(f"{self.name}:")
        decided = None if end == name else self._named(end)
        if decided is None:
            allowed = ", ".join(self.names())
            message = f"model {name[:200]!r}: does not exist, allowed: {allowed}"
            raise ApiError(404, message, "model", "model_not_found")
        # A name means the same whatever rule is stored with the model.
        own = self.exits.without_stored(self.exits.stored)
        return replace(own, **decided, model=name, decided=frozenset(decided))

    def _named(self, end: str) -> dict[str, Any] | None:
        """The fields that the end of a name decides; None where it means nothing."""
        if end == "full":
            return {"mode": "full"}
        if end == "lossless" and (self.exit_layers or self.num_depths):
            return {"mode": "self_speculative"}
        if not self.exit_layers:
            return None
        kind, _, value = end.partition("=")
        if kind == "exit" and value in map(str, self.exit_layers):
            layers = (int(value),)
            return {
                "mode": "early_exit",
                "early_exit_threshold": 0.0,
                "exit_layers": layers,
                "exit_threshold_decay": 0.0,
                "exits_pay_at": 0,
            }
        if kind == "threshold" and (threshold := _share(value)) is not None:
            return {"mode": "early_exit", "early_exit_threshold": threshold}
        return None


def _share(text: str) -> float | None:
    if _NUMBER.fullmatch(text) is None:
        return None
    value = float(text)
    return value if value <= 1 else None
