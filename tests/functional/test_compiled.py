"""Compiled layers give what the plain ones give."""

import os
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch

from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model import compiled as compiled_module
from megatron.early_exit.inference.model import graphs
from megatron.early_exit.inference.model.graphs import GraphedLayers
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.compiler import needs_compiler
from tests.helpers.cpu_recorder import CpuRecorder
from tests.helpers.quantized_models import quantized_model, rounded_model
from tests.helpers.reference_decoder import generate
from tests.helpers.speed import patient
from tests.helpers.tiny_models import ARCHITECTURES, HEADS, LLAMA, make_model

PROMPT = [5, 17, 3, 44, 8]


def shallow(architecture: Architecture, num_layers: int = 2) -> Architecture:
    return replace(architecture, num_layers=num_layers)


SHALLOW = shallow(LLAMA)


AS_USERS_HAVE_THEM = compiled_module._TOGETHER


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch):
    """The compiler takes seconds for each layer of a group, and compiles each size of a group. So
    layers are compiled one by one here, but where a test says that groups are as users have
    them."""
    monkeypatch.setattr(compiled_module, "_TOGETHER", (1,))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Tests that prepare a CPU for training have turned it off for their process."""
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default"):
        yield


def compiled(model):
    return SegmentedModel(model.architecture, model.early_exit, model.weights, compile_rows=True)


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "heads", "exits", "together"),
    [
        ("llama", "all", (1,), AS_USERS_HAVE_THEM),
        ("gpt2", "norm", (1,), (1,)),
        # The second exit's block has to catch up.
        ("nemotron", "block", (1, 2), (1,)),
        ("qwen", "mlp", (1,), (1,)),
    ],
)
def test_same_as_the_oracle(architecture, heads, exits, together, monkeypatch):
    monkeypatch.setattr(compiled_module, "_TOGETHER", together)
    shape = shallow(ARCHITECTURES[architecture], len(exits) + 1)
    model = make_model(shape, exits=exits, **HEADS[heads])
    engine = EarlyExitEngine(compiled(model))
    for threshold in (0.6, None):
        params = SamplingParams(max_tokens=24)
        if threshold is not None:
            params = SamplingParams(
                max_tokens=24, mode="early_exit", early_exit_threshold=threshold
            )
        (result,) = engine.generate([PROMPT], params)
        expected = generate(model, PROMPT, 24, threshold)
        if threshold is not None:
            held = replace(params, kv_policy="propagate")
            results = engine.generate([PROMPT] * 2, [held, params])
            assert results[1].token_ids == result.token_ids
            told = generate(model, PROMPT, 24, threshold, propagates=True)
            assert results[0].token_ids == [token.token_id for token in told]
            assert results[0].exit_layers == [token.exit_layer for token in told]
        assert result.token_ids == [token.token_id for token in expected]
        assert result.exit_layers == [token.exit_layer for token in expected]
        assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=2e-4)


@needs_compiler
def test_alone_and_in_a_batch():
    """Sequences change between the ways for one row, for several, and for many."""
    model = make_model(SHALLOW, exits=(1,), use_exit_norm=True)
    engine = EarlyExitEngine(compiled(model), max_batch_size=9)
    prompts = [PROMPT, [7], [9, 9, 2], [1, 2, 3, 4, 5, 6, 7], *([n] * 9 for n in range(15))]
    params = [
        SamplingParams(max_tokens=n, mode="early_exit", early_exit_threshold=0.5)
        for n in (30, 3, 12, 20, *range(1, 16))
    ]
    together = engine.generate(prompts, params)
    for prompt, one, result in zip(prompts, params, together, strict=True):
        assert engine.generate([prompt], one)[0].token_ids == result.token_ids


@needs_compiler
@pytest.mark.parametrize("heads", ["norm", "block", "mlp"])
def test_verification_and_catch_up(heads):
    """Several positions of a sequence, beside single ones of others."""
    model = make_model(SHALLOW, exits=(1,), **HEADS[heads])
    engine = EarlyExitEngine(compiled(model), max_pending=5)
    speculative = SamplingParams(max_tokens=20, mode="self_speculative", draft_confidence=0.0)
    leaving = SamplingParams(max_tokens=20, mode="early_exit", early_exit_threshold=0.2)
    prompts = [PROMPT, [7], [9, 9, 2]]
    found = engine.generate([PROMPT], speculative)
    found += engine.generate(prompts, [speculative, leaving, speculative])
    for prompt, threshold, result in zip(
        [PROMPT, *prompts], (None, None, 0.2, None), found, strict=True
    ):
        expected = generate(model, prompt, 20, threshold)
        assert result.token_ids == [token.token_id for token in expected]


@needs_compiler
def test_room_for_few_positions():
    """With all places in a cache, the compiler would take their number for a constant."""
    room = 2
    model = make_model(replace(SHALLOW, max_position_embeddings=room), exits=(1,))
    engine = EarlyExitEngine(compiled(model), max_batch_size=2)
    (plain,) = EarlyExitEngine(model.segmented).generate([[7]], SamplingParams(max_tokens=room))
    for result in engine.generate([[7], [7], [7]], SamplingParams(max_tokens=room)):
        assert result.token_ids == plain.token_ids


@pytest.fixture
def replayed(monkeypatch):
    """Makes models whose layers are captured, also those of segments that are fused later."""
    monkeypatch.setattr(SegmentedModel, "_new_recorder", lambda model: CpuRecorder())
    return compiled


@needs_compiler
@pytest.mark.parametrize(("architecture", "heads"), [("llama", "all"), ("gpt2", "mlp")])
def test_captured_layers_serve_batches(architecture, heads, replayed):
    """Rows and lengths are rounded up: what stands in for missing rows changes nothing."""
    model = make_model(shallow(ARCHITECTURES[architecture]), exits=(1,), **HEADS[heads])
    segmented = replayed(model)
    prompts = [PROMPT, [7], [9, 9, 2], [1, 2, 3, 4, 5, 6, 7], [4, 4]]
    for threshold in (0.5, None):
        params = [
            SamplingParams(max_tokens=n)
            if threshold is None
            else SamplingParams(max_tokens=n, mode="early_exit", early_exit_threshold=threshold)
            for n in (24, 3, 12, 20, 7)
        ]
        together = EarlyExitEngine(segmented).generate(prompts, params)
        for prompt, one, result in zip(prompts, params, together, strict=True):
            expected = generate(model, prompt, one.max_tokens, threshold)
            assert result.token_ids == [token.token_id for token in expected]
            assert result.exit_layers == [token.exit_layer for token in expected]
    assert isinstance(segmented.fused(0, 1).compiled, GraphedLayers)


@needs_compiler
@pytest.mark.parametrize("heads", ["norm", "block"])
def test_captured_layers_verify_and_catch_up(heads, replayed, monkeypatch):
    """Several positions of a sequence are captured, too, and nothing is while requests run."""
    model = make_model(SHALLOW, exits=(1,), **HEADS[heads])
    engine = EarlyExitEngine(replayed(model), max_pending=5)
    monkeypatch.delattr(CpuRecorder, "record")
    counts = []
    take = graphs._Graph.take
    monkeypatch.setattr(
        graphs._Graph,
        "take",
        lambda graph, numbers, this: counts.append(this.count) or take(graph, numbers, this),
    )
    speculative = SamplingParams(max_tokens=20, mode="self_speculative", draft_confidence=0.0)
    leaving = SamplingParams(max_tokens=20, mode="early_exit", early_exit_threshold=0.2)
    prompts = [PROMPT, [7], [9, 9, 2]]
    found = engine.generate(prompts, [speculative, leaving, speculative])
    for prompt, threshold, result in zip(prompts, (None, 0.2, None), found, strict=True):
        expected = generate(model, prompt, 20, threshold)
        assert result.token_ids == [token.token_id for token in expected]
    assert max(counts) > len(prompts)


@needs_compiler
def test_no_request_waits_for_the_compiler(monkeypatch):
    """What is compiled at the start serves all layers, modes, batches and lengths."""
    monkeypatch.setattr(compiled_module, "_TOGETHER", AS_USERS_HAVE_THEM)
    model = make_model(SHALLOW, exits=(1,), use_exit_norm=True)
    engine = EarlyExitEngine(compiled(model))
    # One layer, of either segment, and both; for one row, for two, and for several.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6
    for threshold in (0.0, 0.5, 1.0):
        engine.generate(
            [PROMPT],
            SamplingParams(mode="early_exit", early_exit_threshold=threshold, max_tokens=9),
        )
    for prompts in ([PROMPT], [PROMPT, [4]], [[n] for n in range(9)]):
        engine.generate(prompts, SamplingParams(max_tokens=5))
    for length in (1, 2, 9, 30):
        engine.generate([PROMPT * 6], SamplingParams(max_tokens=length))
        engine.generate([PROMPT[:1]], SamplingParams(max_tokens=length))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6


@needs_compiler
def test_machines_of_two_kinds_may_share_a_folder_of_compiled_code(tmp_path):
    """One with wider vectors, where this one has them, then one with narrower ones."""
    code = """
from dataclasses import replace
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.tiny_models import LLAMA, make_model
model = make_model(replace(LLAMA, num_layers=1))
compiled = SegmentedModel(model.architecture, model.early_exit, model.weights, compile_rows=True)
params = SamplingParams(max_tokens=9)
plain, found = (
    EarlyExitEngine(one).generate([[5, 9, 2]], params)[0] for one in (model.segmented, compiled)
)
print(max(abs(a - b) for a, b in zip(plain.logprobs, found.logprobs)) < 1e-4)
"""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": "."}
    environment.pop("TORCHINDUCTOR_FORCE_DISABLE_CACHES", None)
    for kind in ({}, {"ATEN_CPU_CAPABILITY": "avx2"}):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **kind},
            capture_output=True,
            text=True,
            timeout=patient(300),
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == "True"


def test_a_machine_without_a_compiler_is_told_so():
    code = """
from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.model.segmented_model import SegmentedModel
from tests.helpers.tiny_models import make_model
model = make_model()
model = SegmentedModel(model.architecture, model.early_exit, model.weights, compile_rows=True)
try:
    EarlyExitEngine(model)
except ValueError as error:
    print(error)
"""
    environment = {
        **os.environ,
        "CXX": "no-such-compiler",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "PYTHONPATH": ".",
    }
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=patient(120),
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("compile is not possible here: ")
    assert "no-such-compiler" in run.stdout


def test_refused_where_the_compiler_is_off():
    """Preparing a CPU for training turns it off for the process."""
    model = compiled(make_model(SHALLOW, exits=(1,)))
    off = torch.compiler.set_stance("force_eager")
    with off, pytest.raises(ValueError, match=r"the compiler .* is turned off"):
        EarlyExitEngine(model)


@needs_compiler
def test_a_step_touches_no_more_of_the_caches_than_it_needs():
    """What it takes must not grow with the positions that there is room for."""
    room = 2**19
    model = compiled(make_model(replace(SHALLOW, max_position_embeddings=room), exits=(1,)))
    EarlyExitEngine(model, max_batch_size=1).generate([PROMPT], SamplingParams(max_tokens=5))
    process = psutil.Process()
    before = process.memory_info().rss
    # Memory is there when it is touched. Nothing is compiled again.
    engine = EarlyExitEngine(model, max_batch_size=1)
    engine.generate([PROMPT], SamplingParams(max_tokens=5))
    groups, size = LLAMA.num_query_groups, LLAMA.kv_channels
    of_a_layer = room * 2 * groups * size * 4
    assert process.memory_info().rss - before < of_a_layer / 2


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = make_model(SHALLOW, exits=(1,), use_exit_norm=True, dtype=dtype)
    params = SamplingParams(max_tokens=12)
    (plain,) = EarlyExitEngine(model.segmented).generate([PROMPT], params)
    engine = EarlyExitEngine(compiled(model))
    for result in engine.generate([PROMPT], params) + engine.generate([PROMPT] * 3, params):
        assert result.logprobs[:2] == pytest.approx(plain.logprobs[:2], abs=0.1)
        assert result.token_ids[0] == plain.token_ids[0]


@needs_compiler
@pytest.mark.parametrize(("architecture", "heads"), [("llama", "all"), ("gpt2", "norm")])
def test_weights_in_8_bits(architecture, heads):
    """Alone, in a batch and in every mode: the oracle's tokens with the rounded weights."""
    model = make_model(shallow(ARCHITECTURES[architecture]), exits=(1,), **HEADS[heads])
    engine = EarlyExitEngine(quantized_model(model, compile_rows=True))
    kinds = [
        SamplingParams(max_tokens=16),
        SamplingParams(max_tokens=16, mode="early_exit", early_exit_threshold=0.6),
        SamplingParams(max_tokens=16, mode="self_speculative", draft_confidence=0.0),
    ]
    together = engine.generate([PROMPT] * len(kinds), kinds)
    alone = [engine.generate([PROMPT], kind)[0] for kind in kinds]
    for kind, results in zip(kinds, zip(together, alone, strict=True), strict=True):
        threshold = 0.6 if kind.mode == "early_exit" else None
        expected = generate(rounded_model(model), PROMPT, 16, threshold)
        for result in results:
            assert result.token_ids == [token.token_id for token in expected]
            assert result.logprobs == pytest.approx([t.logprob for t in expected], abs=1e-2)
    # For one row, and for several.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
