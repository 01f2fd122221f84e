"""The files of examples/serving: their flags exist, and signals reach the server."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.early_exit.server.bodies.fields import ExitFields
from megatron.early_exit.server.command_line import check_flags, origins_of, settings_of
from megatron.early_exit.server.http.client_address import trusted_networks
from megatron.early_exit.server.model_names import ServedModel
from megatron.early_exit.server.settings import ExitSettings
from tests.helpers.speed import patient
from tools import request_client
from tools.run_early_exit_text_generation_server import build_parser

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "serving"
TOOL = "tools/run_early_exit_text_generation_server.py"
SLURM_VARIABLES = ("LOAD", "TENSOR", "PIPELINE", "PORT", "PYTHON", "PRINT_ONLY")


def read(name: str) -> str:
    return (FOLDER / name).read_text()


def of_dockerfile(kind: str) -> list[str]:
    """The words of an instruction in exec form."""
    (found,) = re.findall(rf"^{kind} (\[.*\])$", read("Dockerfile"), re.MULTILINE)
    words = json.loads(found)
    assert all(isinstance(word, str) for word in words)
    return words


def of_service(name: str) -> str:
    """The value of a setting."""
    text = read("early-exit-server.service").replace("\\\n", " ")
    (value,) = re.findall(rf"^{name}=(.*)$", text, re.MULTILINE)
    return value


def slurm(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, with these of its variables and no others."""
    inherited = {name: value for name, value in os.environ.items() if name not in SLURM_VARIABLES}
    return subprocess.run(
        [FOLDER / "slurm.sh", *flags],
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=patient(30),
        check=False,
    )


def test_docker_starts_the_server():
    program, tool, *flags = of_dockerfile("ENTRYPOINT")
    assert (program, tool) == ("python", TOOL)
    args = build_parser().parse_args([*flags, *of_dockerfile("CMD")])
    assert (args.host, args.port) == ("0.0.0.0", 5000)
    assert args.load == Path("/checkpoint")
    assert f"EXPOSE {args.port}" in read("Dockerfile")
    assert f"ENV EARLY_EXIT_PORT={args.port}\n" in read("Dockerfile")
    assert 'CMD ["python", "health_check.py"]' in read("Dockerfile")


def test_the_port_may_come_from_a_variable(monkeypatch):
    monkeypatch.setenv("EARLY_EXIT_PORT", "8123")
    assert build_parser().parse_args(["--load", "x"]).port == 8123


def test_the_health_check_finds_the_port_of_the_server():
    # Elsewhere only 127.0.0.1 is there.
    host = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
    program = "\n".join(
        (
            "from http.server import BaseHTTPRequestHandler, HTTPServer",
            "class Healthy(BaseHTTPRequestHandler):",
            "    def do_GET(self):",
            "        self.send_response(200 if self.path == '/health' else 404)",
            "        self.end_headers()",
            "import socketserver, threading",
            "class Other(socketserver.BaseRequestHandler):",
            "    def handle(self):",
            "        self.request.sendall(b'no HTTP\\r\\n\\r\\n')",
            "other = socketserver.TCPServer(('127.0.0.1', 0), Other)",
            "threading.Thread(target=other.serve_forever, daemon=True).start()",
            f"server = HTTPServer(('{host}', 0), Healthy)",
            "print('ready', flush=True)",
            "server.serve_forever()",
        )
    )
    check = [sys.executable, FOLDER / "health_check.py"]
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY"), "http://127.0.0.1:9")
        found = subprocess.run(
            [*check, str(server.pid)],
            timeout=patient(30),
            check=False,
            env=os.environ | proxies,
        )
        server.kill()
    assert found.returncode == 0
    with subprocess.Popen(["sleep", "1000"]) as deaf:
        silent = subprocess.run(
            [*check, str(deaf.pid)], capture_output=True, timeout=patient(30), check=False
        )
        deaf.kill()
    assert silent.returncode == 1
    assert silent.stderr == b"the server does not answer yet: no port is open\n"


def test_docker_is_sent_what_it_copies_and_nothing_else():
    ignored = (FOLDER.parents[1] / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    copied = re.findall(r"^COPY (.*) \S+$", read("Dockerfile"), re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert {line[1:] for line in ignored if line.startswith("!")} == sources


def test_origins_are_words_or_a_list():
    def origins(*words: str) -> tuple[str, ...]:
        return origins_of(build_parser().parse_args(["--load", "x", "--allowed-origins", *words]))

    assert origins("https://a.example:8443", "*") == ("https://a.example:8443", "*")
    assert origins('["http://localhost:3000"]') == ("http://localhost:3000",)
    for wrong in ("a.example", "https://a.example/", "https://A.example", "[5]", "[", "null"):
        with pytest.raises(ValueError, match=r"--allowed-origins .* is not an? "):
            origins(wrong)


def test_flags_about_pages_and_proxies_elsewhere_reach_the_server():
    flags = ["--load", "x", "--allowed-origins", "https://a.example", "--api-key", "sesame"]
    args = build_parser().parse_args([*flags, "--forwarded-allow-ips", "10.0.0.0/8"])
    settings = settings_of(args, ())
    assert settings.allowed_origins == ("https://a.example",)
    assert settings.trusted_proxies == trusted_networks("10.0.0.0/8")
    assert settings.api_key == "sesame"


def test_docker_copies_what_there_is():
    root = FOLDER.parents[1]
    for sources in re.findall(r"^COPY (.*) \S+$", read("Dockerfile"), re.MULTILINE):
        assert all((root / source).exists() for source in sources.split())


def test_the_service_starts_the_server_and_waits_for_its_end():
    program, tool, *flags = shlex.split(of_service("ExecStart"))
    assert program.endswith("/bin/python")
    assert tool == TOOL
    args = build_parser().parse_args(flags)
    assert args.load == Path("/srv/early-exit/checkpoint")
    # A key in the command line would be seen by everybody.
    assert args.api_key is None
    assert float(of_service("TimeoutStopSec")) > args.shutdown_timeout + 10


def test_slurm_divides_the_model_over_its_processes(tmp_path):
    variables = {"LOAD": str(tmp_path), "TENSOR": "4", "PIPELINE": "2", "PORT": "7000"}
    done = slurm("--max-batch-size", "32", PRINT_ONLY="1", **variables)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    place = words.index(TOOL)
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert words.index("--nproc-per-node") < place
    args = build_parser().parse_args(words[place + 1 :])
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (4, 2)
    assert (args.port, args.max_batch_size, args.load) == (7000, 32, tmp_path)
    # Less than torchrun's patience.
    assert args.shutdown_timeout < 30


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "error: LOAD is not set, it should be a checkpoint's folder\n"),
        ({"LOAD": "/no/such"}, "error: LOAD=/no/such is no folder\n"),
        ({"LOAD": "/", "TENSOR": "0"}, "error: TENSOR=0 is no number, allowed: 1 or more\n"),
        ({"LOAD": "/", "PIPELINE": "x"}, "error: PIPELINE=x is no number, allowed: 1 or more\n"),
    ],
)
def test_slurm_names_what_is_wrong(variables, message):
    done = slurm(PRINT_ONLY="1", **variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_the_readme_names_flags_and_files_that_exist():
    text = read("README.md")
    known = {option for one in build_parser()._actions for option in one.option_strings}
    for flag in re.findall(r"`(--[a-z-]+)`", text):
        assert flag in known, flag
    (asking,) = re.findall(
        r"^    .venv/bin/python tools/request_client.py (.*)$", text, re.MULTILINE
    )
    assert request_client.build_parser().parse_args(shlex.split(asking)).compare
    for name in re.findall(r"`?([\w-]+\.(?:sh|service))`", text):
        assert (FOLDER / name).is_file(), name


def test_the_operator_chooses_measure_and_thresholds():
    parser = build_parser()
    args = parser.parse_args(["--load", "model"])
    check_flags(args)
    exits = settings_of(args, (1, 3), "entropy").exits
    assert (exits.exit_measure, exits.early_exit_threshold) == ("entropy", 0.8)
    flags = ["--load", "model", "--exit-measure", "margin", "--exit-threshold-decay", "4"]
    args = parser.parse_args([*flags, "--exit-thresholds", "0.5", "0.25"])
    check_flags(args)
    exits = settings_of(args, (1, 3), "entropy").exits
    assert (exits.exit_measure, exits.exit_threshold_decay) == ("margin", 4.0)
    assert exits.exit_thresholds == (0.5, 0.25)
    for words, allowed in ((["0.5"], "1 3"), (["0.5", "0.5", "--exit-layers", "3"], "3")):
        with pytest.raises(ValueError, match=rf"^--exit-thresholds 0.5.* is used \({allowed}\)$"):
            settings_of(parser.parse_args([*flags, "--exit-thresholds", *words]), (1, 3))
    for wrong, message in (
        (["--exit-thresholds", "2"], "--exit-thresholds 2.0 is out of range, allowed: 0 to 1"),
        (["--exit-threshold-decay", "-1"], "--exit-threshold-decay -1.0 is out of range"),
        (
            ["--exit-thresholds", "0.5", "--early-exit-threshold", "0.8"],
            "--early-exit-threshold 0.8 cannot be combined with --exit-thresholds",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_flags(parser.parse_args(["--load", "model", *wrong]))


def test_gates_have_to_be_there():
    args = build_parser().parse_args(["--load", "x", "--exit-measure", "gate"])
    with pytest.raises(ValueError, match="--exit-measure gate: the model's exits have no gates"):
        settings_of(args, (1, 3))
    assert settings_of(args, (1, 3), has_gates=True).exits.exit_measure == "gate"


def test_where_the_operators_thresholds_hold():
    """Unless the request, or the model's name, says which exits are asked or when they answer."""
    settings = ExitSettings(mode="early_exit", exit_thresholds=(0.5, 0.25), exit_measure="margin")
    plain = {"exit_measure": "margin", "exit_threshold_decay": 0.0, "exit_layers": None}
    plain |= {"mode": "early_exit", "exit_details": False, "kv_policy": "exact"}
    plain |= {"exits_pay_at": 0}
    several, one = {"exit_thresholds": (0.5, 0.25)}, {"early_exit_threshold": 0.8}
    for fields, expected in (
        ({}, several),
        ({"exit_thresholds": [0.1, 0.2]}, {"exit_thresholds": (0.1, 0.2)}),
        ({"early_exit_threshold": 0.3}, {"early_exit_threshold": 0.3}),
        ({"exit_layers": [1]}, {**one, "exit_layers": (1,)}),
        ({"exit_measure": "entropy"}, {**several, "exit_measure": "entropy"}),
    ):
        found = ExitFields.model_validate(fields).exit_params(settings, 2)
        assert found == {**plain, **expected}
    decided = ServedModel("m", settings, (1, 3)).settings("m:threshold=0.4")
    assert ExitFields().exit_params(decided, 2) == {**plain, "early_exit_threshold": 0.4}
    usual = ExitSettings(mode="early_exit")
    found = ExitFields(exit_thresholds=[0.1, 0.2]).exit_params(usual, 2)
    assert found == {**plain, "exit_measure": None, "exit_thresholds": (0.1, 0.2)}


def test_the_operator_gives_the_page_its_examples():
    flags = ["--load", "model", "--example-prompt", "def main():", "--example-prompt", "import "]
    settings = settings_of(build_parser().parse_args(flags), exit_layers=())
    assert settings.example_prompts == ("def main():", "import ")
    settings = settings_of(build_parser().parse_args(flags[:2]), exit_layers=())
    assert settings.example_prompts == ()
