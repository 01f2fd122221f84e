"""Published runs: their file, what is predicted for them, and when the comparison fails."""

import csv
from pathlib import Path

import pytest

from benchmarks.planner_published import CLOSE, RUNS, Comparison, Verdict, main, table
from megatron.early_exit.planner.published_runs import read_runs

with RUNS.open(encoding="utf-8") as file:
    ROWS = list(csv.DictReader(file))
# One of each source that takes little time to simulate.
QUICK = ("SC21 18.4B", "Kort 22B sel+SP", "ZB 6.2B 1f1b m=24", "dgxc Nemotron4-15B 16")


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def quick_rows(**changes: str) -> list[dict[str, str]]:
    return [row | changes for row in ROWS if row["name"] in QUICK]


def test_runs_are_read_as_they_are_written():
    found, refused = read_runs(RUNS)
    assert refused == []
    runs = {run.name: run for run in found}
    assert len(runs) == len(ROWS) == 34
    for row in ROWS:
        run, layout = runs[row["name"]], runs[row["name"]].candidate.layout
        assert layout.num_accelerators == int(row["num_gpus"])
        assert sum(layout.layers_per_stage) == int(row["num_layers"])
        per_step = layout.data_parallel * layout.microbatch_size * run.candidate.num_microbatches
        assert per_step == int(row["global_batch_size"])
        assert run.step_s == float(row["published_step_s"])
    assert runs["ZB 6.2B zb1p m=24"].candidate.zero_bubble
    assert runs["dgxc Llama3.1-8B CP2 8"].candidate.layout.context_parallel == 2


def test_steps_and_memory_are_predicted(tmp_path, capsys):
    path = written(tmp_path / "runs.csv", quick_rows())
    assert main(["--runs", str(path), "--picture", str(tmp_path / "runs.svg")]) == 0
    printed = capsys.readouterr().out
    for row in quick_rows():
        assert row["source"] in printed
        assert row["name"] in printed
    assert printed.splitlines()[-1].startswith("reached: 4 of 4 steps within 10%")
    assert "<svg" in (tmp_path / "runs.svg").read_text()
    for run in read_runs(path)[0]:
        found = Comparison.of(run)
        assert abs(found.ratio - 1) <= CLOSE
        assert run.peak_bytes is None or abs(found.peak_bytes / run.peak_bytes - 1) <= CLOSE
        assert f"{found.ratio:.3f}" in table([found])


def test_what_is_far_from_what_was_published_fails(tmp_path, capsys):
    rows = quick_rows()
    rows[0]["published_step_s"] = "1.0"
    assert main(["--runs", str(written(tmp_path / "runs.csv", rows))]) == 1
    assert "MISSED: 3 of 4 steps" in capsys.readouterr().out


def test_memory_is_compared_only_where_it_was_published(tmp_path, capsys):
    rows = [row | {"published_peak_memory_gb": ""} for row in quick_rows()]
    assert main(["--runs", str(written(tmp_path / "runs.csv", rows))]) == 0
    printed = capsys.readouterr().out
    assert "memory" not in printed
    assert " GB" not in printed


def test_a_run_that_is_not_modelled_counts_as_one_that_is_far_off(tmp_path, capsys):
    rows = [*quick_rows(), ROWS[0] | {"schedule": "zb2p"}]
    assert main(["--runs", str(written(tmp_path / "runs.csv", rows))]) == 1
    printed = capsys.readouterr().out
    assert "line 6: schedule 'zb2p' is not modelled" in printed
    assert "MISSED: 4 of 5 steps" in printed


@pytest.mark.parametrize(
    ("ratios", "memory", "holds"),
    [
        ([1.0] * 34, [1.0], True),
        ([1.0] * 31 + [1.12] * 3, [], True),
        ([1.0] * 30 + [1.12] * 4, [], False),
        ([1.0] * 33 + [1.16], [], False),
        ([0.91, 1.09] * 17, [], False),
        ([1.0] * 34, [1.11], False),
    ],
)
def test_goals(ratios, memory, holds):
    assert Verdict.of(ratios, memory).holds == holds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "zb2p"}, "line 2: schedule 'zb2p' is not modelled, allowed: 1f1b, 1f1b-i"),
        ({"gpu": "v100"}, "gpu 'v100' is not modelled, allowed: a100-80gb, h100"),
        ({"recompute": "half"}, "recompute 'half' is not modelled, allowed: none, selective, full"),
        ({"num_layers": "many"}, "num_layers is many, allowed: a number"),
        ({"published_step_s": ""}, "published_step_s is missing, allowed: a number"),
        ({"num_layers": "31", "chunks_per_stage": "2"}, "layers_per_stage is missing, allowed:"),
        ({"num_query_groups": "7"}, "num_query_groups 7 is out of range"),
        ({"tensor_parallel": "0"}, "tensor_parallel 0 is out of range, allowed: 1 or more"),
        ({"num_gpus": "9"}, "num_gpus 9 is out of range, allowed: multiples of"),
    ],
)
def test_rows_that_cannot_be_predicted_are_refused(tmp_path, capsys, changes, message):
    path = written(tmp_path / "runs.csv", [quick_rows()[-1] | changes])
    assert main(["--runs", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_files_without_runs_are_refused(tmp_path, capsys):
    for path in (tmp_path / "none.csv", written(tmp_path / "empty.csv", [])):
        assert main(["--runs", str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    assert main(["--picture", "x.gif"]) == 2
    assert "--picture x.gif, allowed: .svg, .png" in capsys.readouterr().err


def test_runs_of_experts_and_of_fp8_are_read():
    found, refused = read_runs(RUNS.with_name("published_experts_and_fp8.csv"))
    layouts = [run.candidate.layout for run in found]
    assert [one.num_accelerators for one in layouts] == [256, 64, 1024]
    assert [one.expert_parallel for one in layouts] == [8, 1, 1]
    assert [run.candidate.options.fp8 is not None for run in found] == [False, True, True]
    mixture = found[0].candidate.shape
    assert (mixture.kv_channels, mixture.experts is not None) == (128, True)
    # Another dispatcher.
    assert len(refused) == 2
    assert all("moe_token_dispatcher 'deepep' is not modelled" in why for why in refused)
