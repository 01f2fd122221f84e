"""What a request asks for where it does not say it: the rule that is stored with the model."""

from dataclasses import fields, replace

from megatron.early_exit.checkpoint.stored_rule import StoredRule
from megatron.early_exit.inference.params import Mode, SamplingParams


def with_stored_rule(params: SamplingParams, rule: StoredRule | None) -> SamplingParams:
    """A request with its mode, and with what a stored rule says of the fields that it leaves out.

    Args:
        params: of the request.
        rule: of the model; None where it has none.
    """
    mode = params.mode or _default_mode(params, rule)
    stored = {}
    if rule is not None and mode == "early_exit":
        given = {field.name: getattr(params, field.name) for field in fields(params)}
        stored = rule.defaults_beside(given)
    return params if mode == params.mode and not stored else replace(params, mode=mode, **stored)


def _default_mode(params: SamplingParams, rule: StoredRule | None) -> Mode:
    # A request that names exits without a mode wants to be told of them (`exit_details`), by the
    # full model; and one that generates nothing wants scores, which are the full model's.
    is_full = rule is None or params.exit_layers is not None or params.max_tokens == 0
    return "full" if is_full else "early_exit"
