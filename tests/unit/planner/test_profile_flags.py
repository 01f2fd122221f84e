"""Plans from a profile: what is said of it, and which profiles are refused."""

import json
from dataclasses import replace

import pytest

from tests.helpers.derived_profile import PLANNED, derived_profile
from tools import profile_layers
from tools.plan_pipeline import main


def plan(capsys: pytest.CaptureFixture[str], words: str) -> tuple[int, str, str]:
    status = main(words.split())
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_plans_say_what_times_were_measured_on(capsys, tmp_path):
    path = tmp_path / "profile.json"
    derived_profile((1, 2), factor=2.0).write(path)
    assert [one.name for one in tmp_path.iterdir()] == ["profile.json"]
    status, text, _ = plan(capsys, f"{PLANNED} --profile {path} --micro-batch-size 2")
    assert status == 0
    line = "times measured in bf16 with microbatches of 1, 2 on a machine"
    assert text.splitlines()[1] == line
    _, text, _ = plan(capsys, f"{PLANNED} --profile {path} --micro-batch-size 8")
    assert text.splitlines()[1] == f"{line}; extrapolated to 8"
    _, text, _ = plan(capsys, f"{PLANNED} --profile {path} --micro-batch-size 2 --json")
    slow = json.loads(text)
    assert slow["times"] == line
    _, text, _ = plan(capsys, f"{PLANNED} --micro-batch-size 2 --json")
    fast = json.loads(text)
    assert "times" not in fast
    assert 1.5 < slow["plans"][0]["step_s"] / fast["plans"][0]["step_s"] < 2.0


def test_models_without_exits_need_no_times_of_exits(capsys, tmp_path):
    path = tmp_path / "profile.json"
    derived_profile((1,)).write(path)
    words = PLANNED.replace("--exit-layer-nums 3 6 --use-exit-block", "")
    assert plan(capsys, f"{words} --profile {path}")[0] == 0


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            {},
            "--seq-length 512",
            "--seq-length 1024, allowed: those of the model, --seq-length 512",
        ),
        (
            {},
            "--hidden-size 2048 --num-query-groups 4",
            "was measured with --hidden-size 1024 --ffn-hidden-size 2688 --num-query-groups 16 "
            "--kv-channels 64, allowed: those of the model, --hidden-size 2048 "
            "--ffn-hidden-size 5440 --num-query-groups 4 --kv-channels 128",
        ),
        ({"dtype": "fp32"}, "", "was measured with --fp32, allowed: --bf16, which plans are made"),
        (
            {},
            "--use-exit-norm",
            "was measured with exits with --use-exit-block, allowed: the model's exits, with "
            "--use-exit-norm --use-exit-block",
        ),
        ({}, "--achieved-share 0.4", "--achieved-share 0.4 has no effect with --profile"),
        ({}, "--tflops 400", "--tflops 400 has no effect with --profile"),
    ],
)
def test_other_profiles_are_refused(capsys, tmp_path, change, more, message):
    path = tmp_path / "profile.json"
    replace(derived_profile((1, 2)), **change).write(path)
    status, text, error = plan(capsys, f"{PLANNED} {more} --profile {path}")
    assert (status, text, error.count("\n")) == (2, "", 1)
    assert message in error


def test_profiles_without_exits_are_refused_for_models_with_them(capsys, tmp_path):
    profile = derived_profile((1,))
    times = {part: profile.seconds_by_size[1][part] for part in ("layer", "embedding", "head")}
    path = tmp_path / "profile.json"
    replace(profile, exit_heads=None, seconds_by_size={1: times}).write(path)
    status, _, error = plan(capsys, f"{PLANNED} --profile {path}")
    assert status == 2
    assert "was measured with no exits, allowed: the model's exits, with --use-exit-block" in error


def test_profiles_have_gated_mlps(capsys, tmp_path):
    path = tmp_path / "profile.json"
    derived_profile((1,)).write(path)
    status, _, error = plan(capsys, f"{PLANNED} --no-swiglu --profile {path}")
    assert (status, error.startswith("error: --no-swiglu: profiles have gated MLPs")) == (2, True)
    words = f"--config 1.3b --no-swiglu --output {tmp_path / 'other.json'}"
    assert profile_layers.main(words.split()) == 2
    assert capsys.readouterr().err.startswith("error: --no-swiglu: profiles have gated MLPs")


def test_schedules_of_even_stages_have_no_profile(capsys):
    words = "--schedule 1f1b --pipeline-model-parallel-size 2 --num-microbatches 4"
    status, _, error = plan(capsys, f"{words} --profile profile.json")
    assert status == 2
    assert "--profile profile.json has no effect with --schedule 1f1b" in error


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read: No such"), ("{", "is not")])
def test_what_is_no_file_is_refused(capsys, tmp_path, text, message):
    path = tmp_path / "profile.json"
    if text is not None:
        path.write_text(text)
    status, _, error = plan(capsys, f"{PLANNED} --profile {path}")
    assert status == 2
    assert f"--profile {path} {message}" in error


def test_exits_of_the_papers_need_no_more_flags(capsys, tmp_path):
    """A profile made with a name is one of the model of this name."""
    words = "--config 1.3b --gpus 8 --top 1"
    path = tmp_path / "profile.json"
    derived_profile((1, 4), words=words).write(path)
    assert plan(capsys, f"{words} --profile {path}")[0] == 0
