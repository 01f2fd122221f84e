"""The benchmarks that `run_all.py` runs: with which flags, and how long they take."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Area = Literal["training", "planning", "decoding", "caches", "peers", "serving", "stability"]
FOLDER = Path(__file__).resolve().parent
SHAPE, QUICK_TEXT = "--model shape --rounds 5", "--model shape --quick"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A benchmark with its flags.

    Attributes:
        name: by which it is chosen and recorded.
        area: of the project, all of whose figures are in one picture.
        script: in the folder of the benchmarks.
        flags: of the full run.
        quick_flags: of the quick one.
        minutes: that the full run takes on two slow cores: an estimate, in place of which the
            recorded time is used where there is a record.
        quick_minutes: the same of the quick one.
    """

    name: str
    area: Area
    script: str
    flags: str = ""
    quick_flags: str = ""
    minutes: float
    quick_minutes: float

    def arguments(self, is_quick: bool, extra: Sequence[str] = ()) -> list[str]:
        """The flags of a run, and those that depend on the machine, as arguments."""
        return [*(self.quick_flags if is_quick else self.flags).split(), *extra]

    def estimate_s(self, is_quick: bool) -> float:
        """Seconds that it takes, by the estimate."""
        return 60 * (self.quick_minutes if is_quick else self.minutes)


CATALOGUE = (
    Benchmark(
        name="training-1-stage",
        area="training",
        script="training_overhead.py",
        flags="--stages 1",
        quick_flags="--stages 1 --steps 2 --layers 4 --exits 2 --hidden 64 --vocab 2048",
        minutes=3,
        quick_minutes=2,
    ),
    Benchmark(
        name="training-2-stages",
        area="training",
        script="training_overhead.py",
        flags="--stages 2",
        quick_flags="--stages 2 --steps 2 --layers 4 --exits 2 --hidden 64 --vocab 2048",
        minutes=4,
        quick_minutes=2,
    ),
    Benchmark(
        name="tuning",
        area="training",
        script="tuning_cost.py",
        quick_flags="--layers 4 --hidden 128 --vocab 2048 --exits 2 --steps 2 --rounds 1",
        minutes=8,
        quick_minutes=3,
    ),
    Benchmark(
        name="paper",
        area="planning",
        script="pipeline_paper.py",
        minutes=0.5,
        quick_minutes=0.5,
    ),
    Benchmark(
        name="published-runs",
        area="planning",
        script="planner_published.py",
        minutes=2,
        quick_minutes=2,
    ),
    Benchmark(
        name="schedules",
        area="planning",
        script="pipeline_schedules.py",
        quick_flags="--layers 1 --hidden 64 --vocab 512 --microbatches 4 --rounds 2",
        minutes=4,
        quick_minutes=2,
    ),
    Benchmark(
        name="decode-demo",
        area="decoding",
        script="decode.py",
        flags="--model demo --rounds 5",
        quick_flags="--model demo --batch 1 --quick",
        minutes=15,
        quick_minutes=3,
    ),
    Benchmark(
        name="decode-batch-1",
        area="decoding",
        script="decode.py",
        flags=f"{SHAPE} --batch 1",
        quick_flags=f"{QUICK_TEXT} --batch 1",
        minutes=20,
        quick_minutes=8,
    ),
    Benchmark(
        name="decode-batch-8",
        area="decoding",
        script="decode.py",
        flags=f"{SHAPE} --batch 8",
        quick_flags=f"{QUICK_TEXT} --batch 8",
        minutes=20,
        quick_minutes=8,
    ),
    Benchmark(
        name="decode-batch-32",
        area="decoding",
        script="decode.py",
        flags=f"{SHAPE} --batch 32",
        quick_flags=f"{QUICK_TEXT} --batch 32",
        minutes=50,
        quick_minutes=20,
    ),
    Benchmark(
        name="decode-int8",
        area="decoding",
        script="decode.py",
        flags=f"{SHAPE} --weight-dtype int8 --dtype fp32 --batch 1 8",
        quick_flags=f"{QUICK_TEXT} --weight-dtype int8 --dtype fp32 --batch 1",
        minutes=30,
        quick_minutes=10,
    ),
    Benchmark(
        name="huge-pages",
        area="decoding",
        script="huge_pages.py",
        flags="--rounds 5",
        quick_flags="--rounds 1 --tokens 8 --batch 1",
        minutes=8,
        quick_minutes=3,
    ),
    Benchmark(
        name="decode-2-stages",
        area="decoding",
        script="pipeline_decode.py",
        quick_flags="--quick",
        minutes=8,
        quick_minutes=4,
    ),
    Benchmark(
        name="caches",
        area="caches",
        script="kv_cache.py",
        quick_flags="--layers 4 --prefix 300 --rounds 1",
        minutes=5,
        quick_minutes=1,
    ),
    Benchmark(
        name="peers",
        area="peers",
        script="peers.py",
        flags="--rounds 7",
        quick_flags="--rounds 1 --tokens 8 --formats fp32 --no-compile",
        minutes=20,
        quick_minutes=3,
    ),
    Benchmark(
        name="serving",
        area="serving",
        script="serve_load.py",
        quick_flags="--model tiny --seconds 10 --rounds 1",
        minutes=12,
        quick_minutes=2,
    ),
    Benchmark(
        name="soak",
        area="stability",
        script="soak.py",
        flags="--kills 10 --requests 2000 --seconds 600 --connections 1000 --hold 60",
        quick_flags="--kills 1 --steps 9 --requests 60 --clients 6 --seconds 5 --connections 30 "
        "--hold 3",
        minutes=20,
        quick_minutes=4,
    ),
)
