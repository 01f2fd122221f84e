"""Where the tokens of one request came from, and how long they took."""

from collections import Counter
from collections.abc import Sequence

from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.results import GenerationResult
from megatron.early_exit.server.bodies.answer_models import (
    PromptTokensDetails,
    RequestMetrics,
    SpeculativeDecoding,
    Usage,
)


def usage(prompts: int, generated: int, cached: int) -> Usage:
    """The tokens of a request.

    Args:
        prompts: tokens of its prompts, each of which counts once.
        generated: tokens of all answers.
        cached: tokens of its prompts that were not computed.
    """
    return Usage(
        prompt_tokens=prompts,
        completion_tokens=generated,
        total_tokens=prompts + generated,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def request_metrics(
    results: Sequence[GenerationResult], params: SamplingParams, num_layers: int
) -> RequestMetrics:
    """The figures of a request, by the results of all its sequences; `num_layers` is that of the
    whole model."""
    layers = Counter(layer for one in results for layer in one.exit_layers)
    count = layers.total()
    times = [one.statistics for one in results if one.token_ids]
    start = min((one.started for one in times), default=0.0)
    first = min((one.started + one.prefill_seconds for one in times), default=start)
    ends = (one.started + one.prefill_seconds + one.decode_seconds for one in times)
    seconds = max(ends, default=first) - first
    is_early, thresholds = params.mode == "early_exit", params.exit_thresholds
    return RequestMetrics(
        mode=params.mode or "full",
        early_exit_threshold=params.threshold if is_early and thresholds is None else None,
        exit_measure=params.exit_measure,
        exit_thresholds=None if thresholds is None else list(thresholds),
        exit_threshold_decay=params.exit_threshold_decay if is_early else None,
        kv_policy=params.kv_policy if is_early else None,
        exits_pay_at=params.exits_pay_at if is_early else None,
        num_unasked_tokens=sum(one.num_unasked_tokens for one in times) if is_early else None,
        num_layers=num_layers,
        mean_exit_layer=sum(layer * n for layer, n in layers.items()) / count if count else None,
        exit_tokens={str(layer): layers[layer] for layer in sorted(layers)},
        time_to_first_token_seconds=first - start,
        decode_seconds=seconds,
        tokens_per_second=(count - 1) / seconds if seconds > 0 else 0.0,
        speculative_decoding=_speculation(results) if params.mode == "self_speculative" else None,
    )


def _speculation(results: Sequence[GenerationResult]) -> SpeculativeDecoding:
    counts = [one.statistics.drafts for one in results if one.statistics.drafts is not None]
    steps = sum(one.verifications for one in counts)
    drafted = sum(one.drafted for one in counts)
    accepted = sum(one.accepted for one in counts)
    return SpeculativeDecoding(
        num_spec_steps=steps,
        num_draft_tokens=drafted,
        num_accepted_draft_tokens=accepted,
        mean_acceptance_length=1 + accepted / steps if steps else 0.0,
        draft_acceptance_rate=accepted / drafted if drafted else 0.0,
        num_mtp_draft_tokens=sum(one.mtp_drafted for one in counts),
        num_accepted_mtp_draft_tokens=sum(one.mtp_accepted for one in counts),
        num_undrafted_tokens=sum(one.undrafted for one in counts),
    )
