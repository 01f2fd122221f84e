"""Plans from a measured step: the share of the peak that explains it, and given layouts."""

import json

import pytest

from megatron.early_exit.planner.command_line.layout_notation import layout_text, parse_layout
from tools.plan_pipeline import main

MODEL = (
    "--num-layers 12 --hidden-size 2048 --num-attention-heads 16 --vocab-size 1000 "
    "--seq-length 1024 --global-batch-size 64 --gpus 8 --exit-layer-nums 4"
)
TP, PP, SIZE = (
    *("--tensor-model-parallel-size", "--pipeline-model-parallel-size"),
    "--micro-batch-size",
)
LAYOUT, MAPPING = "--pipeline-model-parallel-layout", "--use-tp-pp-dp-mapping"
PER_CHUNK = "--num-layers-per-virtual-pipeline-stage"
GIVEN = f"{TP} 2 {PP} 2 {SIZE} 2"


def answer(capsys: pytest.CaptureFixture[str], words: str) -> dict:
    status = main(f"{MODEL} {words} --json".split())
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_a_measured_step_ranks_all_layouts_with_the_share_that_explains_it(capsys):
    slow = "--achieved-share 0.4"
    given = f"{GIVEN} --num-virtual-stages-per-pipeline-rank 1 --recompute-granularity none"
    plans = answer(capsys, f"{given} {slow} --top 99 --every-variant")["plans"]
    (measured,) = [
        one for one in plans if not one["pre_exit"] and one["layers_per_stage"] == [6, 6]
    ]
    found = answer(capsys, f"{GIVEN} --measured-step {measured['step_s']!r} --top 3")
    told = found["measured_step"]
    assert told["achieved_share"] == pytest.approx(0.4, rel=1e-4)
    assert told["plan"]["step_s"] == pytest.approx(measured["step_s"], rel=1e-5)
    assert told["uncalibrated_s"] < 0.8 * measured["step_s"]
    expected = answer(capsys, f"{slow} --top 3")["plans"]
    for one, other in zip(found["plans"], expected, strict=True):
        assert one["flags"] == other["flags"]
        assert one["step_s"] == pytest.approx(other["step_s"], rel=1e-4)
    assert len({tuple(one["flags"]) for one in found["plans"]}) == 3


def test_a_step_that_ran_fits_whatever_is_thought_of_its_memory(capsys):
    experts = "--num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 2048 --exit-layer-nums"
    given = f"{experts} {TP} 1 {PP} 1 {SIZE} 8 --measured-step 1.5"
    planned = answer(capsys, f"{given} --memory-gb 18 --top 1")
    measured = planned["measured_step"]["plan"]
    assert measured["step_s"] == pytest.approx(1.5, rel=1e-5)
    assert max(measured["peak_bytes"]) > 0.9 * 18e9
    assert max(planned["plans"][0]["peak_bytes"]) < 0.9 * 18e9


def test_a_measured_context_parallel_size_is_not_kept(capsys):
    found = answer(capsys, f"{GIVEN} --context-parallel-size 2 --measured-step 1 --top 1")
    assert found["measured_step"]["plan"]["context_parallel"] == 2
    assert found["plans"][0]["context_parallel"] == 1


def test_what_it_was_compared_with_is_said(capsys):
    assert main(f"{MODEL} {GIVEN} --measured-step 1 --top 1".split()) == 0
    line, more = capsys.readouterr().out.splitlines()[1:3]
    assert line.startswith("measured: 1 s with tensor 2 x pipeline 2 x data 2 parallel, predicted")
    assert line.endswith("of the peak, not 0.8")
    assert more.startswith("(--achieved-share 0.")
    assert "% faster than it" in more


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{GIVEN} --measured-step 1e-3", "TFLOP/s) to "),
        (f"{GIVEN} --measured-step 1e4", "--measured-step 10000.0 is out of range, allowed: 0."),
        (f"{GIVEN} --measured-step -1", "--measured-step -1.0 is out of range, allowed: above 0"),
        (f"{TP} 2 {PP} 2 --measured-step 1", f"{SIZE} is missing, allowed: that of the layout of"),
        (
            f"{GIVEN} --measured-step 1 --achieved-share 0.5",
            "--achieved-share 0.5 cannot be combined with --measured-step",
        ),
        (
            f"{GIVEN} --measured-step 1 --fill-explicit-bubbles",
            "--measured-step cannot be combined with --fill-explicit-bubbles",
        ),
        (f"{TP} 1 {PP} 8 {SIZE} 1 --measured-step 1", f"{PP} 8 times 1 chunks does not divide 12"),
        (f"{PP} 2 {LAYOUT} Et*5|t*6L", "has 11 layers, allowed: the 12 of the model"),
        (f"{PP} 4 {LAYOUT} Et*6|t*6L", f"has 2 stages, allowed: multiples of {PP} 4"),
        (f"{LAYOUT} Et*6|t*6L", f"{LAYOUT} Et*6|t*6L needs {PP}, which is missing"),
        (f"{PP} 2 {LAYOUT} Et*6|t*6mL", "is out of range, allowed: stages of t (a layer)"),
        (f"{PP} 2 {LAYOUT} Et*12|L", "has a stage without a layer, which is not modelled"),
        (f"{PP} 2 {LAYOUT} E((t*999)*999)*999L", "is out of range, allowed: "),
        (f"{PP} 2 {PER_CHUNK} 4", f"{PER_CHUNK} 4 is out of range, allowed: numbers of which"),
        (f"{PP} 2 {PER_CHUNK} 0", f"{PER_CHUNK} 0 is out of range, allowed: 1 or more"),
        (
            f"{PP} 2 {PER_CHUNK} 3 {LAYOUT} Et*6|t*6L",
            f"{PER_CHUNK} 3 cannot be combined with {LAYOUT}",
        ),
        (
            f"{PP} 2 {PER_CHUNK} 3 --fill-explicit-bubbles",
            "--fill-explicit-bubbles cannot be combined with",
        ),
    ],
)
def test_refusals_name_the_flag_and_what_is_allowed(capsys, words, message):
    assert main(f"{MODEL} {words}".split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_only_given_layouts_are_planned(capsys):
    uneven = answer(capsys, f"{TP} 1 {PP} 2 {LAYOUT} Et*5|t*7L {MAPPING} --every-variant")["plans"]
    assert {tuple(one["layers_per_stage"]) for one in uneven} == {(5, 7)}
    assert {one["use_tp_pp_dp_mapping"] for one in uneven} == {True}
    chunks = answer(capsys, f"{PP} 2 {PER_CHUNK} 2 --every-variant")["plans"]
    assert {one["virtual_stages_per_rank"] for one in chunks} == {3}


@pytest.mark.parametrize("layers", [(3, 4, 4, 4, 3), (1, 1), (2, 1, 1, 3, 3, 2), (5, 5, 5, 2)])
def test_layouts_that_are_printed_can_be_given(layers):
    assert parse_layout(layout_text(layers)) == layers


def test_layouts_have_groups_and_commas():
    assert parse_layout("Et*3,|(tt|)*2, t|(t|tt|)*2tL") == (3, 2, 2, 1, 1, 2, 1, 2, 1)
