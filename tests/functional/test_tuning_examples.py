"""The scripts of examples/ee_tuning: the paper's settings, their checks, their dry runs."""

import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.example_scripts import (
    ENTRY,
    PATHS,
    ROOT,
    ExampleScripts,
    group,
    input_paths,
    table_rows,
)
from tests.helpers.warm_ranks import WarmRanks

EXAMPLES = ExampleScripts(
    ROOT / "examples" / "ee_tuning",
    frozenset({"--save", "--load", "--tensorboard-dir", "--pretrained-checkpoint"}),
)
GPUS = 8
TOKENS = 40_000 * 16 * 2048
A100_FLOPS = 312e12 / 2  # half of the peak


@dataclass(frozen=True, kw_only=True)
class Model:
    """The settings of EE-Tuning (arXiv 2402.00518) for a Llama."""

    name: str
    layers: int
    hidden: int
    mlp: int
    heads: int
    groups: int
    exits: tuple[int, ...]
    stages: int
    microbatch: int
    vocabulary: int = 32_000
    positions: int = 4096
    rotary_base: float | None = None

    @property
    def script(self) -> str:
        return f"{self.name}.sh"

    def layer(self) -> int:
        keys_and_values = 2 * self.hidden * self.hidden // self.heads * self.groups
        attention = 2 * self.hidden**2 + keys_and_values
        return attention + self._mlp() + 2 * self.hidden

    def whole(self) -> int:
        """Parameters of the model."""
        return self.layers * self.layer() + self.hidden + 2 * self._projection()

    def tuned(self) -> int:
        """Parameters of the exits: an MLP with its norm, a norm, a projection each."""
        return len(self.exits) * (self._mlp() + 2 * self.hidden + self._projection())

    def built_layers(self) -> int:
        return self.exits[-1]

    def replicas(self) -> int:
        return GPUS // self.stages

    def frozen_per_gpu(self) -> float:
        """On the first stage, which has the embedding."""
        return self.built_layers() / self.stages * self.layer() + self._projection()

    def state_bytes(self) -> float:
        per_exit_weight = 2 + 4 + 12 / self.replicas()
        return 2 * self.frozen_per_gpu() + per_exit_weight * self.tuned() / self.stages

    def activation_bytes(self) -> float:
        return 12 * self.mlp * 2048 * self.microbatch

    def share_at_work(self) -> float:
        """Of the time; the rest is the filling and emptying of the pipeline."""
        microbatches = 16 // self.microbatch // self.replicas()
        return microbatches / (microbatches + self.stages - 1)

    def gpu_hours(self) -> float:
        work = TOKENS * (2 * self.built_layers() * self.layer() + 6 * self.tuned())
        return work / A100_FLOPS / 3600

    def _mlp(self) -> int:
        return 3 * self.hidden * self.mlp

    def _projection(self) -> int:
        return self.vocabulary * self.hidden


def eighths(layers: int) -> tuple[int, ...]:
    return tuple(layers // 8 * n for n in range(1, 9))


LLAMA_7B = {"layers": 32, "hidden": 4096, "mlp": 11008, "heads": 32, "groups": 32}
LLAMA_13B = {"layers": 40, "hidden": 5120, "mlp": 13824, "heads": 40, "groups": 40}
LLAMA_70B = {"layers": 80, "hidden": 8192, "mlp": 28672, "heads": 64, "groups": 8}
LLAMA_8B = {"layers": 32, "hidden": 4096, "mlp": 14336, "heads": 32, "groups": 8}
LLAMA_8B |= {"vocabulary": 128_256, "positions": 131_072, "rotary_base": 500_000}
# fmt: off
MODELS = (
    Model(name="llama2_7B_1_exit", **LLAMA_7B, exits=(8,), stages=1, microbatch=2),
    Model(name="llama2_7B_8_exits", **LLAMA_7B, exits=eighths(32), stages=4, microbatch=4),
    Model(name="llama2_13B_1_exit", **LLAMA_13B, exits=(10,), stages=1, microbatch=2),
    Model(name="llama2_13B_8_exits", **LLAMA_13B, exits=eighths(40), stages=4, microbatch=4),
    Model(name="llama2_70B_1_exit", **LLAMA_70B, exits=(20,), stages=1, microbatch=2),
    Model(name="llama2_70B_8_exits", **LLAMA_70B, exits=eighths(80), stages=4, microbatch=4),
    Model(name="llama3.1_8B_1_exit", **LLAMA_8B, exits=(8,), stages=1, microbatch=2),
    Model(name="llama3.1_8B_8_exits", **LLAMA_8B, exits=eighths(32), stages=4, microbatch=4),
)
# fmt: on
each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)


def model_paths(folder: Path) -> dict[str, str]:
    """Values of the variables that the checks accept."""
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "latest_checkpointed_iteration.txt").write_text("release")
    return input_paths(folder) | {"BASE_DIR": str(base)}


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    return model_paths(tmp_path)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for the sockets that checkpointing opens there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- the paper's settings --------------------------------------------------------------------


@each_model
def test_script_has_the_settings_of_the_paper(model, paths):
    torchrun, flags, _ = EXAMPLES.printed(model.script, **paths)
    assert torchrun == {"--standalone": (), "--nproc-per-node": (str(GPUS),)}
    assert tuple(map(int, flags["--exit-layer-nums"])) == model.exits
    numbers = {
        "--num-layers": model.layers,
        "--hidden-size": model.hidden,
        "--ffn-hidden-size": model.mlp,
        "--num-attention-heads": model.heads,
        "--norm-epsilon": 1e-5,
        "--seq-length": 2048,
        "--max-position-embeddings": model.positions,
        "--tensor-model-parallel-size": 1,
        "--pipeline-model-parallel-size": 4,
        "--micro-batch-size": model.microbatch,
        "--global-batch-size": 16,
        "--train-iters": 40_000,
        "--lr": 1e-4,
        "--min-lr": 1e-5,
        "--adam-beta1": 0.9,
        "--adam-beta2": 0.95,
        "--adam-eps": 1e-5,
        "--clip-grad": 1.0,
    }
    if model.groups != model.heads:
        numbers["--num-query-groups"] = model.groups
    if model.rotary_base is not None:
        # Llama 3.1's own; Megatron knows the rest of its scaling.
        numbers |= {"--rotary-base": model.rotary_base, "--rope-scaling-factor": 8}
    assert ("--use-rope-scaling" in flags) is (model.rotary_base is not None)
    if model.stages == 1:
        numbers["--tune-exit-pipeline-parallel-size"] = 1
    assert {flag: float(flags[flag][0]) for flag in numbers} == numbers
    heads = ("--use-exit-norm", "--use-exit-mlp", "--untie-exit-output-weights")
    llama = ("--swiglu", "--disable-bias-linear", "--untie-embeddings-and-output-weights")
    for switch in ("--tune-exit", "--bf16", *heads, *llama):
        assert flags[switch] == ()
    assert ("--group-query-attention" in flags) is (model.groups != model.heads)
    assert flags["--pretrained-checkpoint"] == (paths["BASE_DIR"],)
    assert flags["--load"] == flags["--save"] == (paths["CHECKPOINT_DIR"],)


PROBE = f"""
import json, os, sys
# Rank 0 would look at the files as well, which are empty.
os.environ["RANK"] = "1"
sys.path.insert(0, {str(ROOT)!r})
from megatron.early_exit import platform
machine = platform.prepare()
from megatron.training import get_tokenizer
from megatron.early_exit.training.cli.command_line import parse_arguments
from megatron.early_exit.training.session import Session
args = parse_arguments(
    lambda parser: platform.set_argument_defaults(parser, machine),
    lambda args: platform.check_arguments(args, machine),
)
Session(args, get_tokenizer())
names = "num_layers full_num_layers pipeline_model_parallel_size data_parallel_size".split()
print("found", json.dumps({{name: getattr(args, name) for name in names}}))
"""


@pytest.fixture(scope="module")
def accepted(
    ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, int]]:
    """What becomes of each script's flags in one of the eight processes; all run at once."""
    folder = tmp_path_factory.mktemp("accepted")
    probe = folder / "probe.py"
    probe.write_text(PROBE)
    jobs = {}
    for model in MODELS:
        _, flags, _ = EXAMPLES.printed(model.script, **model_paths(folder))
        del flags["--tokenizer-model"]
        flags |= {
            "--tokenizer-type": ("NullTokenizer",),
            "--vocab-size": (str(model.vocabulary - 1),),
        }
        words = [word for flag, values in flags.items() for word in (flag, *values)]
        env = {"WORLD_SIZE": str(GPUS), "LOCAL_WORLD_SIZE": str(GPUS)}
        jobs[model.name] = ranks.start([probe, *words], 1, folder / model.name, env)
    found = {}
    for name, job in jobs.items():
        assert job.wait(250) == 0, job.output()[-3000:]
        (line,) = re.findall(r"^found (.*)", job.output(), re.MULTILINE)
        found[name] = json.loads(line)
    return found


@each_model
def test_flags_are_accepted_for_eight_gpus(model, accepted):
    """By all checks that come before the model is built."""
    assert accepted[model.name] == {
        "num_layers": model.built_layers(),
        "full_num_layers": model.layers,
        "pipeline_model_parallel_size": model.stages,
        "data_parallel_size": model.replicas(),
    }


@each_model
def test_readme_has_the_sizes_that_follow_from_the_flags(model):
    rows = table_rows(EXAMPLES.folder / "README.md", f"`{model.script}`")
    assert len(rows) == 3
    state, activations = model.state_bytes(), model.activation_bytes()
    what, cost, memory = rows
    assert what == [
        ", ".join(map(str, model.exits)),
        f"{model.tuned() / 1e9:.2f} B",
        f"{model.built_layers()} of {model.layers}",
        f"1 x {model.stages}",
        str(model.replicas()),
        str(model.microbatch),
    ]
    assert memory == [
        f"{model.frozen_per_gpu() / 1e9:.2f} B",
        f"{model.tuned() / model.stages / 1e9:.2f} B",
        f"{state / 1e9:.1f} GB",
        f"{activations / 1e9:.1f} GB",
        f"{(state + activations) / 1e9:.1f} GB",
    ]
    hours = model.gpu_hours()
    assert cost == [
        f"{2 * model.whole() / 1e9:.0f} GB",
        f"{14 * model.tuned() / 1e9:.0f} GB",
        f"{2 * (model.whole() + model.tuned()) / 1e9:.0f} GB",
        f"{hours:.0f}",
        f"{model.share_at_work():.0%}".replace("%", " %"),
        f"{hours / GPUS / model.share_at_work():.0f} h",
    ]


# --- dry runs --------------------------------------------------------------------------------


@each_model
def test_dry_run_has_the_flags_of_the_real_run_but_for_what_it_says(model, paths):
    torchrun, remarks = EXAMPLES.assert_dry_run_says_what_it_replaces(model.script, paths)
    assert torchrun == {"--standalone": (), "--nproc-per-node": (str(model.stages),)}
    assert "a temporary model of random weights instead of BASE_DIR" in remarks


@pytest.mark.parametrize("name", ["llama2_70B_1_exit", "llama3.1_8B_1_exit"])
def test_dry_run_tunes_the_exit(ranks, short_folder, name):
    """The two commands that a dry run starts, on ranks that have imported Megatron already."""
    model = next(model for model in MODELS if model.name == name)
    base, tuning = EXAMPLES.recorded_dry_run(model.script, short_folder)

    assert base[0] == str(ENTRY)
    assert not [flag for flag in group(base[1:]) if "exit" in flag]
    made = ranks.run(base, 1, short_folder / "base-log")
    assert made.returncode == 0, made.stdout[-3000:]
    entry = tuning.index(str(ENTRY))
    tuned = ranks.run(tuning[entry:], model.stages, short_folder / "log")
    assert tuned.returncode == 0, tuned.stdout[-3000:]

    expected = {f"exit {p} {kind}" for p in model.exits for kind in ("loss", "accuracy", "weight")}
    lines = re.findall(r"\] iteration +\d+/ +3 .*", tuned.stdout)
    assert len(lines) == 3
    for line in lines:
        values = {k: float(v) for k, v in re.findall(r"((?:lm|exit)[a-z0-9 ]*): (\S+) \|", line)}
        assert values.keys() == expected
        for position in model.exits:
            # An untrained model knows nothing of the 256 words.
            assert values[f"exit {position} loss"] == pytest.approx(math.log(256), rel=0.05)
    assert "successfully saved checkpoint from iteration       3" in tuned.stdout


# --- checks ----------------------------------------------------------------------------------


def test_unset_variables_are_named():
    lines = EXAMPLES.refused("llama2_13B_1_exit.sh")
    found = [line.split(" is not set, it should be ")[0] for line in lines]
    assert found == ["BASE_DIR", *PATHS]


def test_folders_that_are_no_model_are_refused(paths):
    out = paths["CHECKPOINT_DIR"]
    (line,) = EXAMPLES.refused("llama2_13B_1_exit.sh", **paths | {"BASE_DIR": out})
    assert line.startswith(f"BASE_DIR: there is no checkpoint in {out}, it should be the model")
    same = paths | {"CHECKPOINT_DIR": paths["BASE_DIR"]}
    (line,) = EXAMPLES.refused("llama2_13B_1_exit.sh", **same)
    assert line.startswith(f"BASE_DIR and CHECKPOINT_DIR are both {paths['BASE_DIR']}")


def test_replicas_of_the_stages_that_are_run_share_the_batch(paths):
    torchrun, _, _ = EXAMPLES.printed(
        "llama2_13B_1_exit.sh", "--micro-batch-size", "4", **paths, GPUS_PER_NODE="4"
    )
    assert torchrun["--nproc-per-node"] == ("4",)
    assert EXAMPLES.refused("llama2_13B_1_exit.sh", "--micro-batch-size", "4", **paths) == [
        "--global-batch-size 16 is no multiple of --micro-batch-size 4 x 8 replicas: give another "
        "of the two, or other GPUs"
    ]
    (line,) = EXAMPLES.refused("llama2_13B_8_exits.sh", **paths, GPUS_PER_NODE="6")
    assert "is no multiple of the 1 x 4 GPUs that one model takes" in line


@each_model
def test_help_needs_no_variables(model):
    process = EXAMPLES.run(model.script, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("usage: ")
    assert "BASE_DIR" in process.stdout
