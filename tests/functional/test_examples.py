"""The scripts of examples/ee_training: the papers' settings, their checks, their dry runs."""

import itertools
import math
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.example_scripts import (
    ENTRY,
    PATHS,
    ROOT,
    ExampleScripts,
    input_paths,
    parse,
    table_rows,
)
from tests.helpers.speed import patient

EXAMPLES = ExampleScripts(
    ROOT / "examples" / "ee_training", frozenset({"--save", "--load", "--tensorboard-dir"})
)
GPUS = 64
VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One row of the table of configurations in EE-LLM (arXiv 2312.04916)."""

    name: str
    billions: float
    layers: int
    hidden: int
    heads: int
    tensor: int
    pipeline: int
    microbatch: int
    exits: tuple[int, int]
    weights: tuple[float, float]
    tied: bool = False

    def parameters(self) -> int:
        """Of Llama's layers and as many vocabulary projections as the model has."""
        projections = 1 if self.tied else 2 + len(self.exits)
        return self.layers * self._layer() + self.hidden + projections * self._projection()

    def per_gpu(self) -> float:
        """Parameters of a stage: its layers and one projection each, whether embedding or head."""
        layers = self.layers // self.pipeline * self._layer()
        return (layers + self._projection()) / self.tensor

    def replicas(self) -> int:
        return GPUS // (self.tensor * self.pipeline)

    def state_bytes(self) -> float:
        return self.per_gpu() * (2 + 4 + 12 / self.replicas())

    def activation_bytes(self) -> float:
        return self.layers * 32 * 2048 * self.microbatch * self.hidden / self.tensor

    def _layer(self) -> int:
        mlp = int(4 * self.hidden * 2 / 3 / 64) * 64  # Megatron's default with --swiglu
        return 4 * self.hidden**2 + 3 * self.hidden * mlp + 2 * self.hidden

    def _projection(self) -> int:
        multiple = 128 * self.tensor
        return math.ceil(VOCABULARY / multiple) * multiple * self.hidden


# fmt: off
PAPERS = (
    Paper(name="1.3B", billions=1.3, layers=24, hidden=2048, heads=16, tensor=1, pipeline=4,
          microbatch=4, exits=(6, 12), weights=(0.25, 0.5), tied=True),
    Paper(name="7B", billions=7, layers=32, hidden=4096, heads=32, tensor=1, pipeline=4,
          microbatch=2, exits=(8, 16), weights=(0.1, 0.2)),
    Paper(name="13B", billions=13, layers=40, hidden=5120, heads=40, tensor=2, pipeline=4,
          microbatch=1, exits=(10, 20), weights=(0.1, 0.2)),
    Paper(name="30B", billions=32.5, layers=60, hidden=6656, heads=52, tensor=4, pipeline=4,
          microbatch=1, exits=(15, 30), weights=(0.1, 0.2)),
)
# fmt: on
each_model = pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, str]:
    """Values of the variables that the checks accept."""
    return input_paths(tmp_path) | {"GPUS_PER_NODE": "16"}


# --- the papers' settings --------------------------------------------------------------------


@each_model
def test_script_has_the_settings_of_the_paper(paper, paths):
    _, flags, _ = EXAMPLES.printed(f"{paper.name}.sh", **paths)
    assert float(flags["--num-layers"][0]) == paper.layers
    assert float(flags["--hidden-size"][0]) == paper.hidden
    assert float(flags["--num-attention-heads"][0]) == paper.heads
    assert float(flags["--tensor-model-parallel-size"][0]) == paper.tensor
    assert float(flags["--pipeline-model-parallel-size"][0]) == paper.pipeline
    assert float(flags["--micro-batch-size"][0]) == paper.microbatch
    assert "--pre-exit" in flags
    assert tuple(int(number) - 1 for number in flags["--exit-layer-nums"]) == paper.exits
    assert tuple(float(weight) for weight in flags["--exit-layer-weight"]) == paper.weights
    assert ("--untie-exit-output-weights" in flags) is not paper.tied
    assert ("--untie-embeddings-and-output-weights" in flags) is not paper.tied
    assert ("--sequence-parallel" in flags) is (paper.tensor > 1)
    assert not flags.keys() & {"--use-exit-norm", "--use-exit-mlp", "--use-exit-block"}
    for switch in ("--bf16", "--swiglu", "--disable-bias-linear", "--use-distributed-optimizer"):
        assert flags[switch] == ()
    shared = {"--seq-length": "2048", "--global-batch-size": "2048", "--normalization": "RMSNorm"}
    shared |= {"--position-embedding-type": "rope", "--lr-decay-style": "cosine"}
    assert {flag: flags[flag] for flag in shared} == {f: (v,) for f, v in shared.items()}


@each_model
def test_readme_has_the_sizes_and_the_memory_that_follow_from_the_flags(paper):
    assert paper.parameters() / 1e9 == pytest.approx(paper.billions, rel=0.03)
    rows = table_rows(EXAMPLES.folder / "README.md", f"`{paper.name}.sh`")
    assert len(rows) == 2
    model, memory = rows
    assert model[:5] == [
        f"{paper.parameters() / 1e9:.2f} B",
        f"{paper.layers} / {paper.hidden} / {paper.heads}",
        "{}, {}".format(*paper.exits),
        "{}, {}".format(*paper.weights),
        "tied" if paper.tied else "one each",
    ]
    assert model[5:7] == [f"{paper.tensor} x {paper.pipeline}", str(paper.microbatch)]
    state, activations = paper.state_bytes(), paper.activation_bytes()
    assert memory == [
        str(paper.replicas()),
        f"{paper.per_gpu() / 1e9:.2f} B",
        f"{state / 1e9:.1f} GB",
        f"{activations / 1e9:.1f} GB",
        f"{(state + activations) / 1e9:.1f} GB",
    ]


# --- dry runs --------------------------------------------------------------------------------


@each_model
def test_dry_run_has_the_flags_of_the_real_run_but_for_what_it_says(paper, paths):
    torchrun, _ = EXAMPLES.assert_dry_run_says_what_it_replaces(f"{paper.name}.sh", paths)
    assert torchrun == {"--standalone": (), "--nproc-per-node": ("4",)}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A temporary folder whose path leaves room for the sockets that checkpointing opens there."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@each_model
def test_dry_run_trains_every_exit(paper, short_folder, ranks):
    """The command that a dry run starts, on ranks that have imported Megatron already; README.md,
    which is tested as well, has one as it is."""
    (command,) = EXAMPLES.recorded_dry_run(f"{paper.name}.sh", short_folder)
    entry = command.index(str(ENTRY))
    done = ranks.run(command[entry:], 4, short_folder / "log")
    log = done.stdout
    assert done.returncode == 0, log[-6000:]

    expected = {"lm loss"}
    for position, kind in itertools.product(paper.exits, ("loss", "accuracy", "weight")):
        expected.add(f"exit {position} {kind}")
    iterations = [line for line in log.splitlines() if re.search(r"\] iteration +\d+/ +3 ", line)]
    assert len(iterations) == 3
    for line in iterations:
        values = {k: float(v) for k, v in re.findall(r"((?:lm|exit)[a-z0-9 ]*): (\S+) \|", line)}
        assert values.keys() == expected
        assert all(math.isfinite(value) for value in values.values())
        for position, weight in zip(paper.exits, paper.weights, strict=True):
            assert values[f"exit {position} weight"] == pytest.approx(weight)
            # An untrained model knows nothing of the 256 words.
            assert values[f"exit {position} loss"] == pytest.approx(math.log(256), rel=0.05)
    validation = next(line for line in log.splitlines() if "validation loss at iteration 3" in line)
    for name in ("lm loss", *(f"exit {position} loss" for position in paper.exits)):
        assert f"{name} value: " in validation
    assert "successfully saved checkpoint from iteration       3" in log


# --- checks ----------------------------------------------------------------------------------


def test_unset_variables_are_named():
    lines = EXAMPLES.refused("7B.sh")
    assert [line.split(" is not set, it should be ")[0] for line in lines] == list(PATHS)


def test_paths_that_do_not_exist_are_named(paths, tmp_path):
    missing = dict.fromkeys(PATHS, f"{tmp_path}/missing")
    lines = EXAMPLES.refused("7B.sh", **missing)
    assert [line.split(": ")[0] for line in lines] == ["DATA_PATH", *PATHS]
    assert all(f"{tmp_path}/missing" in line for line in lines)
    (tmp_path / "text.idx").unlink()
    mixture = paths | {"DATA_PATH": f"0.5 {tmp_path}/text 0.5 {tmp_path}/text"}
    lines = EXAMPLES.refused("7B.sh", **mixture)
    assert len(lines) == 2
    assert all(f"there is no file {tmp_path}/text.idx" in line for line in lines)


def test_a_mixture_of_data_sets_is_passed_on(paths, tmp_path):
    (tmp_path / "more.bin").touch()
    (tmp_path / "more.idx").touch()
    mixture = ("3e-1", f"{tmp_path}/text", "0.7", f"{tmp_path}/more")
    _, flags, _ = EXAMPLES.printed("7B.sh", **paths | {"DATA_PATH": "\n ".join(mixture)})
    assert flags["--data-path"] == mixture
    assert flags["--tokenizer-model"] == (paths["TOKENIZER_MODEL"],)
    assert flags["--save"] == flags["--load"] == (paths["CHECKPOINT_DIR"],)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"GPUS_PER_NODE": "6"},
            "NNODES x GPUS_PER_NODE = 1 x 6 is no multiple of the 2 x 4 GPUs that one model takes "
            "(tensor x pipeline parallel)",
        ),
        (
            {"GPUS_PER_NODE": "24"},
            "--global-batch-size 2048 is no multiple of --micro-batch-size 1 x 3 replicas: give "
            "another of the two, or other GPUs",
        ),
        ({"GPUS_PER_NODE": "some"}, "GPUS_PER_NODE=some is out of range, allowed: 1 to 1024"),
        ({"NNODES": "0"}, "NNODES=0 is out of range, allowed: 1 to 65536"),
        (
            {"NNODES": "2", "MASTER_ADDR": "node0"},
            "NODE_RANK is not set, it should be the number of this node, 0 to 1, with NNODES=2",
        ),
        (
            {"NNODES": "2", "MASTER_ADDR": "node0", "NODE_RANK": "2"},
            "NODE_RANK=2 is out of range, allowed: 0 to 1",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "0"},
            "MASTER_ADDR is not set, it should be the host name or address of node 0 with NNODES=2",
        ),
    ],
)
def test_machines_that_do_not_fit_are_refused(environment, message, paths):
    assert EXAMPLES.refused("13B.sh", **paths | environment) == [message]


def test_flags_of_the_user_win(paths):
    _, flags, _ = EXAMPLES.printed("7B.sh", "--lr", "1e-4", "--wandb-project", "a b", **paths)
    assert flags["--lr"] == ("1e-4",)
    assert flags["--wandb-project"] == ("a b",)
    lines = EXAMPLES.refused("7B.sh", "--tensor-model-parallel-size", "zero", **paths)
    assert lines == ["--tensor-model-parallel-size zero is out of range, allowed: 1 or more"]
    torchrun, _, _ = EXAMPLES.printed("7B.sh", "--pipeline-model-parallel-size=2", DRY_RUN="1")
    assert torchrun["--nproc-per-node"] == ("2",)


@pytest.mark.parametrize("script", [f"{paper.name}.sh" for paper in PAPERS] + ["slurm.sh"])
def test_help_needs_no_variables(script):
    process = EXAMPLES.run(script, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.startswith("usage: ")


# --- several nodes ---------------------------------------------------------------------------


def test_several_nodes_meet_at_the_first(paths):
    nodes = {"NNODES": "8", "NODE_RANK": "3", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"}
    torchrun, _, _ = EXAMPLES.printed("30B.sh", **paths, **nodes)
    assert torchrun == {
        "--nnodes": ("8",),
        "--node-rank": ("3",),
        "--master-addr": ("node0",),
        "--master-port": ("1234",),
        "--nproc-per-node": ("16",),
    }


def test_slurm_starts_the_script_on_every_node(paths, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    # Stand-ins for Slurm's: srun runs the command once for each of two nodes.
    (programs / "scontrol").write_text(
        '#!/bin/bash\n[[ $* == "show hostnames n[4-5]" ]]\necho n4\n'
    )
    (programs / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for node in 0 1; do SLURM_NODEID=$node "$@"; echo ---; done\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)
    job = {"SLURM_JOB_ID": "30017", "SLURM_JOB_NODELIST": "n[4-5]", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "4", "PRINT_ONLY": "1"}
    del paths["GPUS_PER_NODE"]
    job |= {"PATH": f"{programs}:{os.environ['PATH']}"}
    process = EXAMPLES.run("slurm.sh", "7B", "--lr", "1e-4", **paths, **job)
    assert process.returncode == 0, process.stderr
    commands = [parse(command) for command in process.stdout.split("---\n")[:-1]]
    meeting = {"--nnodes": ("2",), "--master-addr": ("n4",), "--master-port": ("20017",)}
    for rank, (torchrun, flags) in enumerate(commands):
        expected = meeting | {"--node-rank": (str(rank),), "--nproc-per-node": ("4",)}
        assert torchrun == expected
        assert flags["--lr"] == ("1e-4",)
        assert flags["--num-layers"] == ("32",)
    assert len(commands) == 2

    process = EXAMPLES.run("slurm.sh", "8B", **paths, **job)
    assert process.returncode == 2
    assert "examples/ee_training/8B.sh: call sbatch in the project's root" in process.stderr
    assert "error: SLURM_JOB_ID is not set" in EXAMPLES.run("slurm.sh", "7B", **paths).stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_shell_ends_a_dry_run(tmp_path, number, status):
    python, pid, scratch = tmp_path / "python", tmp_path / "pid", tmp_path / "tmp"
    python.write_text(f"#!/bin/bash\necho $$ >{pid}.new; mv {pid}.new {pid}\nexec sleep 600\n")
    python.chmod(0o755)
    scratch.mkdir()
    variables = {"PYTHON": str(python), "DRY_RUN": "1", "TMPDIR": str(scratch)}
    # A shell cannot heed what was ignored when it began.
    script = subprocess.Popen(
        [EXAMPLES.folder / "1.3B.sh"],
        env=os.environ | variables,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    until = time.monotonic() + patient(60)
    while not pid.exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    try:
        script.send_signal(number)
        assert script.wait(patient(60)) == status
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
        assert list(scratch.iterdir()) == []
    finally:
        script.kill()
        script.wait()
