"""A multi-token-prediction module drafts on tensor-parallel ranks and over the stages of a pipeline
what it drafts on one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.early_exit.checkpoint.description import ModelDescription, write_description
from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams
from megatron.early_exit.inference.distributed.parallel_backend import parallel_model
from megatron.early_exit.inference.distributed.process_groups import join, own_part
from megatron.early_exit.inference.engine import mtp_drafting
from megatron.early_exit.inference.engine.cache_pages import PAGE_SIZE
from megatron.early_exit.inference.engine.page_sizes import page_bytes
from megatron.early_exit.inference.modes.draft_choice import DraftChoice
from megatron.early_exit.inference.modes.draft_gain import NO_WAITS
from megatron.early_exit.inference.modes.head_output import NOT_FINITE
from megatron.early_exit.inference.modes.mode import MTP as MTP_HEAD
from tests.helpers.arrivals import CONTEXT, Arrival, Syllables, assert_oracles, examples, play
from tests.helpers.mtp_models import assert_drafts, mtp_model
from tests.helpers.reference_decoder import choices
from tests.helpers.spawn import spawn
from tests.helpers.tiny_models import TinyModel, save_checkpoint
from tests.helpers.turns import drafting_in_turns

COUNT = 14
LONG = [(7 * i * i + i) % 61 for i in range(37)]
PROMPTS = [[5, 17, 3, 44, 8], [9] * 3, LONG[:21]]
MTP = SamplingParams(
    mode="self_speculative", draft_method="mtp", draft_confidence=1e-9, max_tokens=COUNT
)
AUTO = SamplingParams(mode="self_speculative", max_tokens=COUNT)
SAMPLED = replace(MTP, temperature=0.3, seed=5)
ALONE = [(prompt, params) for prompt in PROMPTS[::2] for params in (MTP, AUTO, SAMPLED)]
MIXED = [
    MTP,
    SamplingParams(max_tokens=COUNT),
    replace(AUTO, draft_method="exit"),
    AUTO,
    SamplingParams(mode="early_exit", early_exit_threshold=1.0, max_tokens=COUNT),
    replace(MTP, exit_details=True),
    replace(SAMPLED, seed=6),
]
LAYOUTS = {2: (1, 2), 4: (2, 2)}
"""Number of processes -> tensor and pipeline parallel sizes."""
ARRIVALS = (8, ("mtp", "auto", None, "exit"))


@cache
def model(depths: int = 2, repeated: bool = False) -> TinyModel:
    return mtp_model(depths, repeated, noise=0.2, exits=(1, 3), use_exit_norm=True)


def broken_model() -> TinyModel:
    one, name = model(), "mtp.layers.0.enorm.weight"
    weights = {**one.weights, name: one.weights[name] * float("nan")}
    return TinyModel(one.architecture, one.early_exit, weights)


def few_answers() -> TinyModel:
    """A model whose only exit is behind the first stages, and answers with a part of the
    vocabulary."""
    return mtp_model(2, exits=(3,), use_exit_norm=True, exit_vocab_size=20)


def divided(
    layout: tuple[int, int],
    whole: TinyModel,
    has_driver: bool = False,
    num_pages: int | None = None,
    **options: Any,
) -> EarlyExitEngine:
    """An engine over the processes, which may have memory for some pages only."""
    rank_info, _ = join(*layout, "cpu")
    shape, exits = whole.architecture, whole.early_exit
    parts = {name: own_part(rank_info, shape, exits, name, w) for name, w in whole.weights.items()}
    own = {name: part for name, part in parts.items() if part is not None}
    segmented, backend = parallel_model(rank_info, shape, exits, own, has_driver=has_driver)
    if num_pages is not None:
        options["kv_cache_memory"] = -num_pages * backend.agree(-sum(page_bytes(segmented)))
    return EarlyExitEngine(segmented, Syllables(), backend=backend, **options)


def run(folder: str, arriving: list[list[Arrival]]) -> dict[str, Any]:
    """What each layout answers, and what it refuses."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    layout = LAYOUTS[torch.distributed.get_world_size()]
    if layout == (1, 2):
        found |= of_checkpoint(Path(folder))
    engine = divided(layout, model())
    found["pieces"] = drafted_in_pieces(engine)
    found["alone"] = [engine.generate([prompt], params)[0] for prompt, params in ALONE]
    found["mixed"] = engine.generate([PROMPTS[0]] * len(MIXED), MIXED)
    found["asked"] = questions(engine)
    with drafting_in_turns() as found["drafted"]:
        found["turns"] = engine.generate(PROMPTS, AUTO)
    engine.close()
    sizes = {"max_batch_size": 3, "max_sequence_length": CONTEXT}
    engine = divided(layout, model(), num_pages=3, **sizes)
    found["arrivals"] = [play(engine, drawn) for drawn in arriving]
    found["preemptions"] = engine.pages.counts.preemptions
    engine.close()
    engine = divided(layout, few_answers())
    found["few"] = engine._requests.draft_costs
    engine.close()
    engine = divided(layout, broken_model(), has_driver=True)
    if engine.is_worker:
        engine.work()
    else:
        found["broken"] = engine.generate(PROMPTS[:1] * 2, [MTP, SamplingParams(max_tokens=3)])
        engine.close()
    if layout == (2, 2):
        engine = divided((1, 4), model(3, repeated=True))
        found["four"] = [engine.generate(PROMPTS[:1], MTP)[0]]
        engine.close()
    return found


def questions(engine: EarlyExitEngine) -> list[int]:
    """How often the module is asked for each verification where it is never sure enough to draft;
    known to the first rank."""
    found, add = [], DraftChoice.add

    def noting(self: DraftChoice, num_asked: int, *others: Any) -> int:
        found.append(num_asked)
        return add(self, num_asked, *others)

    with patch.object(DraftChoice, "add", noting):
        engine.generate(PROMPTS[:1], replace(MTP, draft_confidence=1.0))
    return found


def of_checkpoint(path: Path) -> dict[str, Any]:
    """What engines answer that read a checkpoint."""
    found: dict[str, Any] = {}
    engine = EarlyExitEngine.from_checkpoint(path, device="cpu", tensor_parallel=2)
    found["tensor"] = [engine.generate(PROMPTS, params) for params in (MTP, AUTO)]
    engine.close()
    for layout in ("tensor_parallel", "pipeline_parallel"):
        options: dict[str, Any] = {"draft_vocab_size": 31, "weight_dtype": "int8", layout: 2}
        engine = EarlyExitEngine.from_checkpoint(path, device="cpu", **options)
        found[layout] = [engine.generate(PROMPTS, params) for params in (MTP, SamplingParams())]
        found[layout, "costs"] = engine._requests.mtp_costs
        engine.close()
    with pytest.raises(FieldError) as refusal:
        EarlyExitEngine.from_checkpoint(path, pipeline_parallel=2, draft_vocab_size=62)
    found["refused"] = str(refusal.value)
    return found


def drafted_in_pieces(engine: EarlyExitEngine) -> list[int]:
    """Have prompts run in pieces, and rows of the module, with what others have stored; check all
    drafts where they are known. Returns how many tokens were stored of each."""
    other = [*LONG[:PAGE_SIZE], *[(one + 9) % 61 for one in LONG[PAGE_SIZE:]]]
    known = []
    scheduler = getattr(getattr(engine.loop, "loop", None), "scheduler", None)
    if scheduler is not None:
        scheduler.max_rows = 7
    with patch.object(mtp_drafting, "_MOST_ROWS", 5):
        for prompt in (LONG, other, [*other[:34], 3], LONG[: PAGE_SIZE + 2]):
            request, seen = engine.submit(prompt, MTP), set()
            sequence = request.sequence
            while not request.is_finished:
                engine.step()
                text = (*prompt, *sequence.generated)
                if sequence.drafts and not request.is_finished and text not in seen:
                    seen.add(text)
                    assert_drafts(model(), text, sequence.drafts)
            # Other ranks do not know the drafts.
            assert len(seen) >= COUNT // 3 or scheduler is None
            known.append(request.result().statistics.num_cached_tokens)
    return known


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_checkpoint(model(), path)
    write_description(path, ModelDescription(model().architecture, model().early_exit, None))
    return str(path)


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def ranks(request, folder) -> list[dict[str, Any]]:
    """What every rank has got."""
    return spawn(run, request.param, folder, examples(*ARRIVALS))


def assert_full_models(results: list[GenerationResult], prompts: list[list[int]]) -> None:
    for prompt, result in zip(prompts, results, strict=True):
        expected = choices(model(), prompt, result.token_ids, None)
        assert result.token_ids == [token.token_id for token in expected]
        assert len(result.token_ids) == COUNT


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_ranks_that_share_layers(ranks):
    for found in ranks:
        for results in found["tensor"]:
            assert_full_models(results, PROMPTS)
        assert sum(one.statistics.drafts.mtp_accepted for one in found["tensor"][0]) > 0


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_a_part_of_the_vocabulary_and_weights_in_8_bits(ranks):
    for found in ranks:
        layouts = ("tensor_parallel", "pipeline_parallel")
        for layout in layouts:
            drafting, full = found[layout]
            for one, other in zip(drafting, full, strict=True):
                assert one.token_ids == other.token_ids[:COUNT]
        # What drafts cost is known where the module is not; over stages messages come to that.
        tensor, pipeline = (found[layout, "costs"] for layout in layouts)
        assert tensor == replace(pipeline, waits=NO_WAITS)
        assert pipeline.waits.order == pipeline.waits.verify == pipeline.waits.full > 0
        assert pipeline == ranks[0]["pipeline_parallel", "costs"]
        assert found["refused"].startswith("draft_vocab_size 62 is out of range")
    for layout in layouts:
        assert sum(one.statistics.drafts.mtp_accepted for one in ranks[0][layout][0]) > 0


def test_one_sequence_has_the_drafts_of_one_device(ranks):
    engine = EarlyExitEngine(model().segmented, Syllables())
    for number, (prompt, params) in enumerate(ALONE):
        (expected,) = engine.generate([prompt], params)
        for found in ranks:
            result = found["alone"][number]
            assert result.token_ids == expected.token_ids
            # What messages take, and depths that are computed in vain, decide how to draft.
            assert params is AUTO or result.exit_layers == expected.exit_layers
        # The first rank alone keeps the account.
        drafts = ranks[0]["alone"][number].statistics.drafts
        assert params is AUTO or drafts == expected.statistics.drafts
        assert params is AUTO or drafts.mtp_drafted > 0
    greedy = [one.statistics.drafts for one in ranks[0]["alone"][::3]]
    assert sum(one.mtp_accepted for one in greedy) > 0


def test_depths_that_are_computed_in_vain_count(ranks):
    """The last stage does not know that the first draft is not made."""
    *asked, last = ranks[0]["asked"]
    assert asked[0] == 0, "the prompt has none behind it"
    assert set(asked[1:-1]) == {2}
    assert last == 0


def test_what_an_exit_costs_is_known_where_it_is_not(ranks):
    (expected,) = EarlyExitEngine(few_answers().segmented)._requests.draft_costs
    for found in ranks:
        (costs,) = found["few"]
        assert replace(costs, waits=NO_WAITS) == expected
        assert costs.waits.ask > costs.waits.verify > 0


def test_exits_of_all_stages_and_the_module_draft_in_turns(ranks):
    for found in ranks:
        assert_full_models(found["turns"], PROMPTS)
    assert ranks[0]["drafted"] == {0, 1, MTP_HEAD}


def test_prompts_in_pieces_and_shared_prefixes(ranks):
    assert ranks[0]["pieces"] == [0, PAGE_SIZE, 2 * PAGE_SIZE, PAGE_SIZE]


def test_all_modes_in_one_batch(ranks):
    (sampled,) = EarlyExitEngine(model().segmented, Syllables()).generate(PROMPTS[:1], MIXED[-1])
    for found in ranks:
        *greedy, last = found["mixed"]
        assert_full_models(greedy, PROMPTS[:1] * len(greedy))
        assert last.token_ids == sampled.token_ids
    by_module, _, by_exit, *_, detailed, _ = ranks[0]["mixed"]
    assert by_module.statistics.drafts.accepted > 0
    assert by_exit.statistics.drafts.drafted > by_exit.statistics.drafts.mtp_drafted == 0
    told = {tuple(head.layer for head in heads) for heads in detailed.heads}
    assert told == {(0, 4), (4,)}


def test_requests_that_come_and_go_get_the_oracles_tokens(ranks):
    plays = [found["arrivals"] for found in ranks]
    for drawn, *ended in zip(examples(*ARRIVALS), *plays, strict=True):
        for arrival, *results in zip(drawn, *ended, strict=True):
            assert_oracles(model(), arrival, *results)
    assert ranks[0]["preemptions"] > 0


def test_weights_that_are_not_finite_end_the_request_alone(ranks):
    failed, other = ranks[0]["broken"]
    assert (failed.finish_reason, failed.error) == ("error", NOT_FINITE)
    assert other.token_ids == ranks[0]["mixed"][1].token_ids[:3]


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_a_stage_for_each_layer(ranks):
    one = model(3, repeated=True)
    (expected,) = EarlyExitEngine(one.segmented, Syllables()).generate(PROMPTS[:1], MTP)
    for found in ranks:
        assert [result.token_ids for result in found["four"]] == [expected.token_ids]
    drafts = ranks[0]["four"][0].statistics.drafts
    assert drafts == expected.statistics.drafts
    assert drafts.drafted > 2 * drafts.verifications - 4
