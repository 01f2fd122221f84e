"""Numbers of requests: what they may be, and a refusal that says so."""

from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationError, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

_NAMES = {-(2**63): "-2**63", 2**63 - 1: "2**63 - 1", 2**64 - 1: "2**64 - 1"}


@dataclass(frozen=True, slots=True)
class Range:
    """Annotates an integer or a float: the OpenAPI document and refusals name both ends.

    Attributes:
        least: the lower end.
        most: the upper end.
        above: the lower end itself is not allowed.
    """

    least: int
    most: int
    above: bool = False

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        ends: dict[str, Any] = {"gt" if self.above else "ge": self.least, "le": self.most}
        is_integer = source is int
        if is_integer:
            schema: CoreSchema = core_schema.int_schema(strict=True, **ends)
        else:
            schema = core_schema.float_schema(strict=True, allow_inf_nan=False, **ends)
        kind = "an integer" if is_integer else "a number"
        message = f"allowed: {kind}, {self}"

        def check(value: object, inner: ValidatorFunctionWrapHandler) -> object:
            try:
                return inner(value)
            except ValidationError:
                raise ValueError(message) from None

        return core_schema.no_info_wrap_validator_function(check, schema)

    def __str__(self) -> str:
        least, most = _shown(self.least), _shown(self.most)
        return f"above {least}, up to {most}" if self.above else f"{least} to {most}"


def _shown(end: int) -> str:
    return _NAMES.get(end, str(end))
