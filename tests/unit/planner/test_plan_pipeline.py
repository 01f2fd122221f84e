"""tools/plan_pipeline.py: models by name, by file and by flags; what is printed and written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.planner.command_line.model_flags import read_model
from megatron.early_exit.planner.named_models import NAMED_MODELS
from megatron.early_exit.schedules.check import check
from megatron.early_exit.schedules.schedule import Schedule
from tests.helpers.speed import patient
from tools.plan_pipeline import build_parser, main

BY_FLAGS = (
    "--num-layers 12 --hidden-size 512 --num-attention-heads 8 --vocab-size 1000 "
    "--seq-length 512 --global-batch-size 64"
)
LLAMA = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
PAPER = "--pipeline-model-parallel-size 4 --num-microbatches 6 --exit-stages 1 2"


def model_of(words: str):
    return read_model(build_parser().parse_args(words.split()))


def answer(capsys: pytest.CaptureFixture[str], words: str) -> str:
    status = main(words.split())
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


# --- the model -----------------------------------------------------------------------------------


def test_models_have_names():
    model = model_of("--config 30B")
    assert model.shape == NAMED_MODELS["30b"].shape
    assert [one.exit_layer_nums for one in model.placements] == [(15, 30), (16, 31)]
    assert model.global_batch_size == 2048


def test_flags_win_over_names():
    model = model_of(
        "--config 1.3b --seq-length 4096 --global-batch-size 512 --exit-layer-nums 3 6 9 "
        "--untie-embeddings-and-output-weights --use-exit-norm --hidden-size 1024"
    )
    assert model.shape.seq_length == 4096
    assert not model.shape.share_embeddings_and_output_weights
    # Megatron's width for a gated MLP.
    assert model.shape.ffn_hidden_size == 2688
    assert model.global_batch_size == 512
    assert model.placements[0].exit_layer_nums == (3, 6, 9)
    assert model.placements[0].use_exit_norm


def test_exits_can_be_left_out_or_placed():
    (plain,) = model_of("--config 7b --exit-layer-nums").placements
    assert plain.positions == ()
    (placed,) = model_of("--config 7b --pre-exit").placements
    assert (placed.exit_layer_nums, placed.untie_exit_output_weights) == ((9, 17), True)
    (given,) = model_of("--config 7b --exit-layer-nums 5 --pre-exit").placements
    assert given.positions == (4,)


def test_models_have_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    for path in (tmp_path, tmp_path / "config.json"):
        shape = model_of(f"--config {path}").shape
        assert (shape.num_layers, shape.num_query_groups, shape.seq_length) == (16, 8, 131072)
        assert shape.share_embeddings_and_output_weights
    assert model_of(f"--config {tmp_path} --seq-length 8192").shape.seq_length == 8192


def test_heads_may_have_a_size_of_their_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"head_dim": 128}))
    shape = model_of(f"--config {tmp_path}").shape
    assert (shape.query_size, shape.qkv_size) == (32 * 128, 48 * 128)
    assert model_of(f"--config {tmp_path} --kv-channels 64").shape.query_size == 2048
    # Megatron's, if only the width is given.
    assert model_of(f"--config {tmp_path} --hidden-size 1024").shape.kv_channels == 32
    assert model_of("--config 7b --kv-channels 256").shape.kv_channels == 256


def test_plans_need_no_more_than_sizes(tmp_path):
    """A model may be one that is not imported, with whatever is not in its costs."""
    odd = {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu", "rope_theta": 1e6}
    odd |= {"num_experts": 0, "num_key_value_heads": None, "head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | odd))
    shape = model_of(f"--config {tmp_path}").shape
    assert (shape.num_layers, shape.num_query_groups) == (16, 32)


def test_models_have_flags():
    model = model_of(BY_FLAGS)
    assert (model.shape.num_query_groups, model.shape.ffn_hidden_size) == (8, 1344)
    assert model.shape.share_embeddings_and_output_weights
    untied = model_of(f"{BY_FLAGS} --untie-embeddings-and-output-weights")
    assert not untied.shape.share_embeddings_and_output_weights


def test_mlps_need_no_gate(tmp_path):
    plain, gated = model_of(f"{BY_FLAGS} --no-swiglu").shape, model_of(BY_FLAGS).shape
    assert (plain.gated_linear_unit, gated.gated_linear_unit) == (False, True)
    # Megatron's width without a gate.
    assert plain.ffn_hidden_size == 2048
    assert plain.mlp_weights == 2 * 512 * 2048
    assert not model_of("--config 7b --no-swiglu").shape.gated_linear_unit
    for kind, has_gate in (("nemotron", False), ("llama", True)):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": kind}))
        assert model_of(f"--config {tmp_path}").shape.gated_linear_unit == has_gate


# --- plans ---------------------------------------------------------------------------------------


def test_table_and_flags(capsys):
    text = answer(capsys, f"{BY_FLAGS} --gpus 8 --exit-layer-nums 3 --top 3")
    lines = text.splitlines()
    assert lines[0].startswith("model on 8 x a100-80gb: 64 sequences of 512 tokens a step;")
    assert lines[2].split()[:8] == ["#", "TP", "PP", "VPP", "layers", "DP", "size", "number"]
    assert [line.split()[0] for line in lines[3:6]] == ["1", "2", "3"]
    assert "    --pipeline-model-parallel-size 1 \\" in lines
    assert lines[-1] == "    --exit-layer-nums 3"


def test_json(capsys):
    text = answer(
        capsys,
        f"{BY_FLAGS} --gpus 8 --exit-layer-nums 3 6 --pipeline-model-parallel-size 4 --json "
        "--fill-explicit-bubbles --max-fill-cost 0.2 --top 2",
    )
    plans = json.loads(text)["plans"]
    assert plans[0]["step_s"] <= plans[1]["step_s"]
    assert plans[0]["num_fill_cooldown_microbatches"] > 0
    assert "--fill-explicit-bubbles" in plans[0]["flags"]
    assert len(plans[0]["peak_bytes"]) == 4
    # The schedule is made for what the stages cost, and training is told so.
    ratios = plans[0]["backward_forward_ratio_of_stages"]
    assert min(ratios) < plans[0]["backward_forward_ratio"] < max(ratios)
    given = float(plans[0]["flags"][-1])
    assert given == pytest.approx(plans[0]["backward_forward_ratio"], abs=0.005)


def test_faster_links_and_gpus_make_faster_plans(capsys):
    def step(more: str) -> float:
        given = "--gpus 64 --pipeline-model-parallel-size 4 --micro-batch-size 1"
        words = f"--config 13b {given} --top 1 --json {more}"
        return json.loads(answer(capsys, words))["plans"][0]["step_s"]

    plain = step("")
    assert step("--gpu h100") < plain
    assert step("--network-gb-per-s 5") > plain
    assert step("--achieved-share 0.4") > plain
    assert step("--tflops 400") < plain
    assert step("--gpus-per-node 4") > plain
    # Less memory needs more tensor parallelism.
    assert step("--memory-gb 40") > plain
    assert step("--no-overlap-grad-reduce") > plain > step("--overlap-param-gather")


def test_layers_are_computed_again_where_memory_is_short(capsys):
    def plans(more: str) -> list[dict]:
        words = f"--config 13b --gpus 8 --top 3 --json {more}"
        return json.loads(answer(capsys, words))["plans"]

    assert plans("--memory-gb 40 --seq-length 8192")[0]["recompute"] == "full"
    wide, again = plans("--gpu b200")[0], plans("--gpu b200 --recompute-granularity full")[0]
    assert (wide["recompute"], again["recompute"]) == ("none", "full")
    assert again["step_s"] > 1.1 * wide["step_s"]
    # What is computed again is in the ratio, but not in the model's operations.
    assert again["backward_forward_ratio"] > wide["backward_forward_ratio"] + 0.5
    assert 1.5 < wide["backward_forward_ratio"] < 2.3
    assert again["model_flops_utilization"] < wide["model_flops_utilization"] < 0.7
    per_gpu = wide["model_flops_utilization"] * 2250e12
    assert wide["model_flops_per_s_per_gpu"] == pytest.approx(per_gpu)
    assert wide["tokens_per_s"] == pytest.approx(8 * wide["tokens_per_s_per_gpu"])


@pytest.mark.parametrize("ending", ["svg", "png", "html"])
def test_the_first_plan_is_drawn_and_written(capsys, tmp_path, ending):
    picture, actions = tmp_path / f"plan.{ending}", tmp_path / "plan.csv"
    answer(
        capsys,
        f"--config 7b --gpus 16 --pipeline-model-parallel-size 4 --timeline {picture} "
        f"--num-virtual-stages-per-pipeline-rank 2 --schedule-csv {actions} "
        "--micro-batch-size 4 --top 1 --timeline-microbatches 6",
    )
    schedule = Schedule.from_csv(actions.read_text())
    check(schedule)
    assert (schedule.num_ranks, schedule.num_stages) == (4, 8)
    text = picture.read_bytes()
    if ending == "html":
        # Whole groups of microbatches are drawn, and how many.
        assert b"4 of 128 microbatches" in text
        assert b"0F3" in text
        assert b"0F4" not in text


def test_a_whole_run_takes_days(capsys):
    words = "--config 7b --gpus 64 --pipeline-model-parallel-size 2 --micro-batch-size 2 --top 1"
    run = answer(capsys, f"{words} --train-tokens 0.5T --mtbf-hours 1000")
    begin = run.index("500B tokens with the first take ")
    lines = run[begin:].splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["steps", "checkpoints", "failures"]
    days = float(lines[0].split()[-2].replace(",", ""))
    assert sum(float(line.split()[1]) for line in lines[2:5]) == pytest.approx(days, abs=0.02)
    assert "119,210 of " in lines[2]
    assert "one each 15.6 hours, with 600 s to restart" in lines[4]
    found = json.loads(answer(capsys, f"{words} --train-tokens 500e9 --mtbf-hours 1000 --json"))
    assert found["plans"][0]["run"]["days"] == pytest.approx(days, abs=0.01)
    assert f"--save-interval {found['plans'][0]['run']['save_interval']}" in lines[3]


def test_a_plan_with_which_a_run_hardly_ends_leaves_the_others(capsys):
    words = f"{BY_FLAGS} --gpus 8 --micro-batch-size 1 --recompute-granularity none --json --top 2"
    first, second = (one["step_s"] for one in json.loads(answer(capsys, words))["plans"])
    # A step of the second is longer than 20 times the mean time between failures.
    hours = 8 * (first + second) / 2 / 20 / 3600
    seconds = "--checkpoint-seconds 1e-9 --restart-seconds 0"
    words = f"{words} --train-tokens 1B {seconds} --mtbf-hours"
    plans = json.loads(answer(capsys, f"{words} {hours!r}"))["plans"]
    assert plans[0]["run"]["days"] > 0
    assert plans[1]["run"]["error"].startswith(f"--mtbf-hours {hours:g} is a failure each ")
    assert main(f"{words} {hours / 2!r}".split()) == 2


def test_a_picture_needs_no_list_of_the_whole_step(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.plan_pipeline.build_proved", lambda _: pytest.fail("was built"))
    words = f"{BY_FLAGS} --gpus 2 --pipeline-model-parallel-size 2 --micro-batch-size 1 --top 1"
    answer(capsys, f"{words} --timeline {tmp_path / 'plan.html'}")
    assert (tmp_path / "plan.html").stat().st_size


@pytest.mark.parametrize("text", ["many", "T", "0", "1e30", "-3B", "nanB"])
def test_tokens_are_a_number(capsys, text):
    with pytest.raises(SystemExit):
        build_parser().parse_args([f"--train-tokens={text}"])
    assert f"{text} is not a number of tokens, allowed: 1 to 1e+18" in capsys.readouterr().err


# --- one schedule --------------------------------------------------------------------------------


def test_the_papers_figure_is_drawn(capsys, tmp_path):
    """Exits and stages 1:2, forward and backward 1:2: two exits and all fills, and no more time."""
    plain = json.loads(answer(capsys, f"--schedule 1f1b {PAPER} --json"))
    path = tmp_path / "filled.html"
    filled = json.loads(answer(capsys, f"--schedule filled {PAPER} --json --timeline {path}"))
    assert plain["step_s"] == filled["step_s"] == pytest.approx(39e-3)
    assert filled["bubble_fraction"] < 0.6 * plain["bubble_fraction"]
    assert "1Bw0" in path.read_text()
    assert "0Bw1" not in path.read_text()


@pytest.mark.parametrize(
    "words",
    [
        "interleaved --num-virtual-stages-per-pipeline-rank 2 --num-microbatches 8",
        "zb-h1 --num-microbatches 6",
        "tuning --num-microbatches 6 --exit-stages 0 2",
    ],
)
def test_each_schedule_is_drawn(capsys, tmp_path, words):
    path = tmp_path / "schedule.csv"
    text = answer(
        capsys, f"--schedule {words} --pipeline-model-parallel-size 4 --schedule-csv {path}"
    )
    assert text.startswith("step ")
    assert "rank 3" in text
    check(Schedule.from_csv(path.read_text()))


def test_stages_that_take_different_times(capsys):
    """Tuning goes at the pace of the slowest stage, which waits for none once it has begun."""
    words = "--schedule tuning --pipeline-model-parallel-size 3 --num-microbatches 5 --json"
    found = json.loads(answer(capsys, f"{words} --exit-stages 1 2 --stage-ratios 2 1.5 0.5"))
    # A forward on the first stage; five on the second, each with both passes of an exit; and what
    # is left of the last microbatch on the third.
    one_exit = 0.5 * (1 + 2)
    assert found["step_s"] == pytest.approx(1e-3 * (2 + 5 * 1.5 + 4 * one_exit + 0.5 + one_exit))
    assert found["busy_s"] == pytest.approx([10e-3, 15e-3, 10e-3])


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config 7b", "--gpus is missing"),
        ("--gpus 8", "--num-layers --hidden-size --num-attention-heads --vocab-size --seq-length"),
        ("--config 8b --gpus 8", "--config 8b is neither a model nor a file, allowed: 1.3b, 7b"),
        (
            "--config {folder} --gpus 8",
            "folder/config.json cannot be read: No such file or directory",
        ),
        ("--config {no_json} --gpus 8", "is not a JSON file"),
        ("--config {ahead} --gpus 8", "num_nextn_predict_layers 1, allowed: 0: what a multi-token"),
        ("--config 7b --gpus 8 --mtp-num-layers 2", "--mtp-num-layers 2 is out of range, allowed"),
        ("--config {experts} --gpus 8", "num_experts_per_tok None is out of range"),
        ("--config {less} --gpus 8", "vocab_size None is out of range, allowed: 1 or more"),
        ("--config {llama} --gpus 8", "--global-batch-size is missing"),
        ("--config 7b --gpus 8 --num-attention-heads 7", "--num-attention-heads 7 is out of range"),
        ("--config 7b --gpus 8 --exit-layer-nums 40", "--exit-layer-nums 40 is out of range"),
        (
            "--config 7b --gpus 8 --use-exit-mlp --pre-exit",
            "--use-exit-mlp cannot be combined with --pre-exit",
        ),
        (
            "--config 7b --gpus 7 --pipeline-model-parallel-size 1",
            "--global-batch-size 2048 cannot be divided over replicas",
        ),
        (
            "--config 7b --gpus 8 --context-parallel-size 3",
            "--context-parallel-size 3 is out of range, allowed: divisors of half of --seq-length",
        ),
        ("--config 7b --gpus 8 --top 0", "--top 0 is out of range, allowed: 1 or more"),
        ("--config 7b --gpus 8 --memory-headroom 1", "--memory-headroom 1.0 is out of range"),
        ("--config 7b --gpus 8 --tflops 0", "--tflops 0.0 is out of range, allowed: above 0"),
        ("--config 7b --gpus 8 --gpus-per-node 0", "--gpus-per-node 0 is out of range"),
        (
            "--config 7b --gpus 8 --gpus-per-node 1000000007",
            "--gpus-per-node 1000000007 is out of range, allowed: 1 to 4096",
        ),
        (
            "--config 7b --gpus 1000000000000007",
            "--gpus 1000000000000007 is out of range, allowed: 1 to 1048576",
        ),
        (
            "--config 7b --gpus 8 --num-experts 1000000007",
            "--num-experts 1000000007 is out of range, allowed: 1 to 65536",
        ),
        ("--config 7b --gpus 8 --timeline x.gif", "allowed: .png, .svg, .html"),
        ("--config 7b --gpus 8 --timeline {folder}/no/x.svg", "there is no folder"),
        ("--config 7b --gpus 8 --schedule-csv {folder}/no/x.csv", "there is no folder"),
        (
            "--config 7b --gpus 8 --num-fill-warmup-microbatches 1",
            "--num-fill-warmup-microbatches 1 has no effect without --fill-explicit-bubbles",
        ),
        (
            "--config 7b --gpus 8 --fill-explicit-bubbles --num-virtual-stages-per-pipeline-rank 2",
            "--fill-explicit-bubbles cannot be combined with",
        ),
        ("--config 7b --gpus 8 --fill-explicit-bubbles --max-fill-cost -1", "--max-fill-cost -1"),
        (
            "--config 7b --gpus 8 --exit-stages 1",
            "--exit-stages 1 has no effect without --schedule",
        ),
        (
            "--config 7b --gpus 8 --exit-stage-ratio 1",
            "--exit-stage-ratio 1.0 has no effect without --schedule",
        ),
        (
            "--config 7b --gpus 8 --backward-forward-ratio 1.6",
            "--backward-forward-ratio 1.6 has no effect without --fill-explicit-bubbles",
        ),
        ("--config 7b --gpus 8 --timeline-microbatches 9", "has no effect without --timeline"),
        (
            "--config 7b --gpus 8 --mtbf-hours 1000",
            "--mtbf-hours 1000.0 has no effect without --train-tokens",
        ),
        (
            "--config 7b --gpus 8 --train-tokens 1T --mtbf-hours 0",
            "--mtbf-hours 0.0 is out of range, allowed: above 0",
        ),
        (
            "--config 1.3b --gpus 8 --pipeline-model-parallel-size 1 --micro-batch-size 4 "
            "--train-tokens 1T --mtbf-hours 1e-3",
            "--mtbf-hours 0.001 is a failure each 0.45 s with 8 GPUs, allowed: 30 s or more",
        ),
        (
            "--config 7b --gpus 8 --train-tokens 1T --mtbf-hours 1e308",
            "--mtbf-hours 1e+308 is out of range, allowed: above 0, up to 1000000000000.0",
        ),
        (
            f"--schedule 1f1b {PAPER} --num-fill-warmup-microbatches 1",
            "--num-fill-warmup-microbatches 1 has no effect with --schedule 1f1b",
        ),
        ("--schedule 1f1b", "--pipeline-model-parallel-size is missing"),
        (f"--schedule 1f1b {PAPER} --config 7b", "--config 7b has no effect with --schedule 1f1b"),
        (
            f"--schedule filled {PAPER} --num-fill-cooldown-microbatches 9",
            "--num-fill-cooldown-microbatches 9 is out of range",
        ),
        (f"--schedule 1f1b {PAPER} --num-layers 8", "--num-layers 8 has no effect with --schedule"),
        (
            f"--schedule 1f1b {PAPER} --exit-layer-nums 2 4",
            "--exit-layer-nums 2 4 has no effect with --schedule 1f1b",
        ),
        (f"--schedule 1f1b {PAPER} --gpu h100", "--gpu h100 has no effect with --schedule 1f1b"),
        (f"--schedule 1f1b {PAPER} --top 3", "--top 3 has no effect with --schedule 1f1b"),
        (f"--schedule 1f1b {PAPER} --no-swiglu", "--no-swiglu has no effect with --schedule 1f1b"),
        (f"--schedule 1f1b {PAPER} --exit-stages 4", "--exit-stages 4 is out of range"),
        (
            f"--schedule 1f1b {PAPER} --stage-ratios 1 2 1.5",
            "--stage-ratios: has 3 numbers, allowed: 4, one for each stage",
        ),
        (
            f"--schedule 1f1b {PAPER} --stage-ratios 1 0 1 1",
            "--stage-ratios 0.0 is out of range, allowed: above 0",
        ),
        (
            "--config 7b --gpus 8 --stage-ratios 1 2",
            "--stage-ratios 1.0 2.0 has no effect without --schedule",
        ),
        (
            f"--schedule 1f1b {PAPER} --exit-stage-ratio -1",
            "--exit-stage-ratio -1.0 is out of range",
        ),
        (
            f"--schedule 1f1b {PAPER} --num-virtual-stages-per-pipeline-rank 2",
            "has no effect with --schedule 1f1b",
        ),
        (
            f"--schedule interleaved {PAPER} --num-virtual-stages-per-pipeline-rank 2",
            "--num-microbatches 6 is out of range, allowed: multiples of the 4 ranks",
        ),
        (
            "--schedule tuning --pipeline-model-parallel-size 2 --num-microbatches 2",
            "--exit-stages: there is none",
        ),
    ],
)
def test_refusals_are_one_sentence(capsys, tmp_path, words, message):
    files = {
        "folder": {},
        "llama": LLAMA,
        "experts": LLAMA | {"num_local_experts": 8},
        "ahead": LLAMA | {"num_nextn_predict_layers": 1},
        "less": {name: value for name, value in LLAMA.items() if name != "vocab_size"},
    }
    paths = {name: tmp_path / name for name in files} | {"no_json": tmp_path / "no_json"}
    for name, content in files.items():
        paths[name].mkdir()
        if content:
            (paths[name] / "config.json").write_text(json.dumps(content))
    paths["no_json"].write_text("{")
    assert main(words.format(**paths).split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_it_ends_quietly_where_nobody_reads_on():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        words = ["tools/plan_pipeline.py", "--schedule", "1f1b", *PAPER.split()]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=Path(__file__).parents[3],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=patient(60),
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_needs_neither_torch_nor_matplotlib():
    command = [sys.executable, "-X", "importtime", "tools/plan_pipeline.py", "--config", "1.3b"]
    done = subprocess.run(
        [*command, "--gpus", "8", "--top", "1"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=patient(60),
    )
    assert done.returncode == 0, done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "matplotlib", "numpy"} & imported
