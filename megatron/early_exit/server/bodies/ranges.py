"""Numbers of requests: what they may be, and a refusal that says so."""

import math
from dataclasses import dataclass, replace
from typing import Any

from pydantic import GetCoreSchemaHandler, ValidationError, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, core_schema

from megatron.early_exit.ranges import Range


@dataclass(frozen=True, slots=True)
class InRange:
    """Annotates an integer or a float: the OpenAPI document and refusals name both ends.

    Attributes:
        range: what is allowed; integers without an upper end have that of 64 bits.
    """

    range: Range

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        is_integer, allowed = source is int, self.range
        if is_integer and allowed.most == math.inf:
            allowed = replace(allowed, most=2**63 - 1)
        least = "gt" if allowed.excludes_least else "ge"
        most = "lt" if allowed.excludes_most else "le"
        ends: dict[str, Any] = {least: allowed.least, most: allowed.most}
        if is_integer:
            schema: CoreSchema = core_schema.int_schema(strict=True, **ends)
        else:
            schema = core_schema.float_schema(strict=True, allow_inf_nan=False, **ends)
        kind = "an integer" if is_integer else "a number"
        message = f"allowed: {kind}, {allowed}"

        def check(value: object, inner: ValidatorFunctionWrapHandler) -> object:
            try:
                return inner(value)
            except ValidationError:
                raise ValueError(message) from None

        return core_schema.no_info_wrap_validator_function(check, schema)
