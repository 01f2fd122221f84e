"""What the machine says of itself, and what those who ask make of it."""

from __future__ import annotations

import logging
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron.early_exit import platform
from megatron.early_exit.checkpoint.architecture import Architecture
from megatron.early_exit.config import EarlyExitConfig
from megatron.early_exit.hardware import dtypes, resources
from megatron.early_exit.hardware.dtypes import (
    VARIABLE,
    best_training_dtype,
    dtype_speed,
    fastest_times,
)
from megatron.early_exit.inference import dtype as inference_dtype
from megatron.early_exit.inference.dtype import decide_dtype
from megatron.early_exit.inference.model.compiled import LayerCompiler
from megatron.early_exit.patches.messages import CUDA_REMARK
from megatron.early_exit.platform.machine import Platform

CPU = torch.device("cpu")
MACHINE = Platform(
    device="cpu",
    backend="gloo",
    transformer_engine=False,
    apex=False,
    num_devices=8,
    compiled_fusions=False,
)
STORED_IN_BF16 = Architecture(
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=16,
    max_position_embeddings=32,
    normalization="RMSNorm",
    layernorm_epsilon=1e-5,
    activation="silu",
    gated_linear_unit=True,
    add_bias_linear=False,
    position_embedding_type="rope",
    share_embeddings_and_output_weights=True,
    params_dtype="bfloat16",
)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of the machine."""
    said: list[str] = []
    monkeypatch.setattr(inference_dtype, "say_once", said.append)
    return said


@pytest.fixture
def slow_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU whose products in bf16 take 6.1 times as long as in fp32."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(dtypes, "_measured_factor", lambda dtype: 6.1)


# --- number formats --------------------------------------------------------------------------


def test_the_fastest_of_rounds_in_turns_counts_but_for_the_first() -> None:
    order: list[str] = []
    # Seconds of each call: the first round pays for the making of code, one is disturbed.
    durations = iter([9, 0.1, 1, 8, 50, 6, 2, 7])
    now = 0.0

    def clock() -> float:
        return now

    def function(name: str) -> object:
        def call() -> None:
            nonlocal now
            order.append(name)
            now += next(durations)

        return call

    times = fastest_times([function("a"), function("b")], 3, clock)  # type: ignore[list-item]
    assert times == pytest.approx([1, 6])
    assert order == ["a", "b"] * 4


def test_measuring_leaves_threads_and_random_numbers_as_they_are(monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with torch.device("meta"):
        speed = dtype_speed(torch.bfloat16)
    assert speed.factor is not None
    assert speed.factor > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    # Once per process.
    assert dtype_speed(torch.bfloat16) == speed


@pytest.mark.parametrize(("factor", "fast"), [(0.2, True), (1.0, True), (2.5, False)])
def test_a_dtype_is_fast_by_its_factor(monkeypatch, factor: float, fast: bool) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(dtypes, "_measured_factor", lambda dtype: factor)
    assert dtype_speed(torch.bfloat16).is_fast is fast
    assert best_training_dtype("cpu") is (torch.bfloat16 if fast else torch.float32)
    assert dtype_speed(torch.float32).is_fast


def test_the_variable_makes_either_kind_of_machine(monkeypatch) -> None:
    def never(dtype: torch.dtype) -> float:
        raise AssertionError("measured all the same")

    monkeypatch.setattr(dtypes, "_measured_factor", never)
    monkeypatch.setenv(VARIABLE, "fp32, bf16")
    assert dtype_speed(torch.bfloat16).is_fast
    assert not dtype_speed(torch.float16).is_fast
    monkeypatch.setenv(VARIABLE, "fp32")
    assert dtype_speed(torch.bfloat16).finding == (
        "bf16 counts as slow on this CPU (EARLY_EXIT_FAST_DTYPES=fp32)"
    )


@pytest.mark.parametrize("value", ["", "float32", "fp32;bf16", "fp32,,bf16"])
def test_unknown_values_of_the_variable_are_refused(monkeypatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    for ask in (
        lambda: dtype_speed(torch.bfloat16),
        lambda: decide_dtype(torch.float32, STORED_IN_BF16, EarlyExitConfig(), CPU),
    ):
        with pytest.raises(ValueError, match=rf"^{VARIABLE}={value}: .* allowed: a list of fp32"):
            ask()


def _answer(has_bf16: bool, including_emulation: bool) -> bool:
    assert not including_emulation
    return has_bf16


def test_a_gpu_is_asked(monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE)
    for has_bf16 in (True, False):
        answer = partial(_answer, has_bf16)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)
        speed = dtype_speed(torch.bfloat16, "cuda:1")
        assert (speed.is_fast, speed.factor, speed.device) == (has_bf16, None, "GPU")
        assert dtype_speed(torch.float16, "cuda:1").is_fast
    assert dtype_speed(torch.bfloat16, "cuda").finding == "bf16 counts as slow on this GPU"


# --- the engine's ----------------------------------------------------------------------------


def test_a_model_stored_in_a_slow_dtype_is_computed_in_fp32(slow_bf16, lines) -> None:
    assert decide_dtype(None, STORED_IN_BF16, EarlyExitConfig(), CPU) is torch.float32
    assert lines == [
        "computing in fp32, not in bf16 as the model is stored: bf16 products take 6.1 times as "
        "long as fp32 ones on this CPU"
    ]


def test_who_asks_for_a_slow_dtype_gets_it_and_a_line(slow_bf16, lines) -> None:
    exits = EarlyExitConfig()
    assert decide_dtype(torch.bfloat16, STORED_IN_BF16, exits, CPU) is torch.bfloat16
    assert lines == [
        "bf16 products take 6.1 times as long as fp32 ones on this CPU; dtype fp32 may be faster"
    ]
    lines.clear()
    assert decide_dtype(torch.float32, STORED_IN_BF16, exits, CPU) is torch.float32
    assert lines == []


def test_a_fast_dtype_is_kept_without_a_word(monkeypatch, lines) -> None:
    monkeypatch.setenv(VARIABLE, "bf16")
    assert decide_dtype(None, STORED_IN_BF16, EarlyExitConfig(), CPU) is torch.bfloat16
    stored_in_fp32 = replace(STORED_IN_BF16, params_dtype="float32")
    assert decide_dtype(None, stored_in_fp32, EarlyExitConfig(), CPU) is torch.float32
    assert lines == []


def test_what_does_not_fit_in_fp32_stays_as_it_is_stored(slow_bf16, monkeypatch, lines) -> None:
    monkeypatch.setattr(inference_dtype, "available_memory", lambda: 10_000_000_000)
    large = replace(STORED_IN_BF16, vocab_size=200_000_000)  # 1.6 billion numbers
    assert decide_dtype(None, large, EarlyExitConfig(), CPU) is torch.bfloat16
    (line,) = lines
    assert "fp32 needs 12.8 GB of memory, of which 10.0 are left" in line
    assert line.startswith("computing in bf16, as the model is stored, although bf16 products take")


# --- training's ------------------------------------------------------------------------------


def test_training_in_a_slow_dtype_is_remarked(slow_bf16) -> None:
    asked = Namespace(bf16=True, fp16=False)
    assert platform.dtype_remark(asked, MACHINE) == (
        "bf16 products take 6.1 times as long as fp32 ones on this CPU: without --bf16 training "
        "may be faster here"
    )
    assert platform.dtype_remark(Namespace(bf16=False, fp16=False), MACHINE) is None


def test_training_in_a_fast_dtype_is_not(monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "fp32,bf16")
    assert platform.dtype_remark(Namespace(bf16=True, fp16=False), MACHINE) is None


# --- cores, memory ---------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tree of a process in the cgroup /a/b, of either version."""
    original = resources._text

    def text(path: Path) -> str | None:
        if path == Path("/proc/self/cgroup"):
            return "5:cpu,cpuacct:/a/b\n4:memory:/a/b\n0::/a/b"
        return original(path)

    monkeypatch.setattr(resources, "_text", text)
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    return tmp_path / "cgroup"


def test_threads_of_a_core_count_once(cgroups, tmp_path) -> None:
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path / f"cpu{number}" / "topology", core_cpus_list=siblings)
    assert resources.usable_cores(cgroups, tmp_path) == 2
    assert resources.usable_cores(cgroups, tmp_path / "nothing") == 4


def test_quotas_bound_the_cores(cgroups, tmp_path) -> None:
    write(cgroups / "a" / "b", cpu__max="max 100000")
    assert resources.usable_cores(cgroups, tmp_path) == 4
    write(cgroups / "a", cpu__max="250000 100000")
    assert resources.usable_cores(cgroups, tmp_path) == 3
    write(cgroups / "cpu" / "a", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert resources.usable_cores(cgroups, tmp_path) == 3
    write(cgroups / "cpu" / "a" / "b", cpu__cfs_quota_us="20000", cpu__cfs_period_us="100000")
    assert resources.usable_cores(cgroups, tmp_path) == 1


def test_cgroups_bound_the_memory(cgroups) -> None:
    free = resources.available_memory(cgroups)
    assert free > 10_000
    write(cgroups / "a", memory__max="max", memory__current="1")
    assert resources.available_memory(cgroups) > 10_000
    write(cgroups / "a" / "b", memory__max="9000", memory__current="5000")
    assert resources.available_memory(cgroups) == 4000
    write(cgroups / "a" / "b", memory__stat="anon 3000\ninactive_file 1500")
    assert resources.available_memory(cgroups) == 5500
    write(
        cgroups / "memory" / "a",
        memory__limit_in_bytes="6000",
        memory__usage_in_bytes="5000",
        memory__stat="total_inactive_file 10",
    )
    assert resources.available_memory(cgroups) == 1010


def test_this_machine_has_cores_and_memory() -> None:
    assert resources.usable_cores() >= 1
    assert resources.available_memory() > 0


# --- what PyTorch says of the machine --------------------------------------------------------


def test_compiling_says_nothing_of_a_missing_gpu(caplog) -> None:
    """In a process that has not prepared Megatron's platform, as an engine's."""
    logger = logging.getLogger(CUDA_REMARK[0])
    before = logger.filters[:]
    logger.filters.clear()
    try:
        LayerCompiler(STORED_IN_BF16, None, CPU)
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local")
        logger.warning("Something else")
    finally:
        logger.filters[:] = before
    assert [record.getMessage() for record in caplog.records] == ["Something else"]


# --- the engine over several processes ------------------------------------------------------


def test_the_first_rank_decides_for_all_and_says_it(slow_bf16, monkeypatch, lines) -> None:
    said = []

    def broadcast(box, src, group) -> None:
        assert (src, group) == (0, "everyone")
        if box[0] is None:
            box[:] = said
        else:
            said[:] = box

    monkeypatch.setattr(inference_dtype.distributed, "broadcast_object_list", broadcast)
    ranks = [Namespace(rank=rank, num_ranks=2, group="everyone") for rank in range(2)]
    exits = EarlyExitConfig()
    assert decide_dtype(None, STORED_IN_BF16, exits, CPU, ranks[0]) is torch.float32
    assert len(lines) == 1
    # Another one would find otherwise, and is not asked.
    monkeypatch.setattr(dtypes, "_measured_factor", lambda dtype: 0.2)
    assert decide_dtype(None, STORED_IN_BF16, exits, CPU, ranks[1]) is torch.float32
    assert len(lines) == 1
