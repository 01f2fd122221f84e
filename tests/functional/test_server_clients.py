"""Clients of other people: OpenAI's, lm-eval's and schemathesis's."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from lm_eval.tasks import TaskManager
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from megatron.early_exit.evaluation import lm_eval_model
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams
from tests.helpers.speed import patient
from tests.helpers.text_checkpoint import save_text_checkpoint
from tests.helpers.text_server import NAME, text_server

PROMPT = "pack my box"
EXAMPLES = 40
TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("clients"))


@pytest.fixture(scope="module")
def server(checkpoint):
    with text_server(checkpoint) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_openai_completions(client):
    whole = client.completions.create(
        model=NAME,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        logprobs=2,
        extra_body={"early_exit_threshold": 0.3, "exit_details": True, "ignore_eos": True},
    )
    (choice,) = whole.choices
    assert len(choice.logprobs.tokens) == 12
    assert whole.usage.completion_tokens == 12
    assert whole.metrics["mode"] == "early_exit"
    assert len(choice.logprobs.exit_layers) == len(choice.logprobs.heads) == 12
    stream = client.completions.create(
        model=NAME,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"early_exit_threshold": 0.3, "ignore_eos": True},
    )
    *pieces, last = stream
    assert "".join(piece.choices[0].text for piece in pieces) == choice.text
    assert last.usage.completion_tokens == 12
    assert last.metrics["num_layers"] == 4


def test_openai_chat(client):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": PROMPT},
    ]
    request = {"model": f"{NAME}:exit=3", "messages": messages, "max_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**request, logprobs=True, top_logprobs=1)
    (choice,) = whole.choices
    assert {token.exit_layer for token in choice.logprobs.content} == {3}
    stream = client.chat.completions.create(**request, stream=True)
    pieces = [piece.choices[0].delta.content or "" for piece in stream]
    assert "".join(pieces) == choice.message.content


def test_openai_models_and_errors(client):
    assert NAME in [model.id for model in client.models.list()]
    assert client.models.retrieve(f"{NAME}:full").id == f"{NAME}:full"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=NAME, prompt=PROMPT, temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model=NAME, prompt=PROMPT, extra_body={"exit_layers": [2]})
    assert raised.value.param == "exit_layers"


def harness(model, model_args, batch_size=2):
    """What lm-eval finds for a model."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=["tiny_choices", "tiny_answers"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    return found["results"], found["samples"]


@pytest.mark.parametrize(
    ("name", "in_process", "params"),
    [
        (f"{NAME}:full", "", {"mode": "full"}),
        (
            f"{NAME}:threshold=0.3",
            ",early_exit_threshold=0.3",
            {"mode": "early_exit", "early_exit_threshold": 0.3},
        ),
        (
            f"{NAME}:exit=1",
            ",early_exit_threshold=0,exit_layers=1",
            {"mode": "early_exit", "early_exit_threshold": 0.0, "exit_layers": (1,)},
        ),
    ],
)
def test_lm_eval_finds_what_the_model_says(
    server, checkpoint, monkeypatch, tmp_path, name, in_process, params
):
    # Its tasks name their data by relative paths.
    monkeypatch.chdir(TASKS)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    engine = EarlyExitEngine.from_checkpoint(checkpoint)
    url = f"base_url={server.url}/v1/completions,model={name},num_concurrent=4,max_length=256"
    tokenizer = checkpoint.parent / "tokenizer"
    results, samples = harness("local-completions", f"{url},tokenizer={tokenizer}")
    arguments = f"load={checkpoint},max_sequence_length=256{in_process}"
    own_results, own_samples = harness(lm_eval_model.NAME, arguments)
    for task, other in samples.items():
        for sample, own in zip(other, own_samples[task], strict=True):
            assert own["arguments"] == sample["arguments"]
            for one, expected in zip(own["filtered_resps"], sample["filtered_resps"], strict=True):
                assert one == pytest.approx(expected, abs=1e-3)
        assert own_results[task] == pytest.approx(results[task])
    right = 0
    for sample in samples["tiny_choices"]:
        found = [one[0] for one in sample["resps"]]
        own = []
        for text, continuation in sample["arguments"]:
            context = engine.tokenizer.encode(text)
            whole = engine.tokenizer.encode(text + continuation)
            scoring = SamplingParams(max_tokens=1, prompt_logprobs=1, **params)
            (result,) = engine.generate([whole], scoring)
            tokens = result.prompt_tokens[len(context) :]
            greedy = all(token.token_id == token.top_logprobs[0][0] for token in tokens)
            own.append((sum(token.logprob for token in tokens), greedy))
        for (score, greedy), (expected, is_greedy) in zip(found, own, strict=True):
            assert score == pytest.approx(expected, abs=1e-3)
            assert greedy == is_greedy
        best = max(range(len(own)), key=lambda place: own[place][0])
        right += best == sample["doc"]["answer"]
    count = len(samples["tiny_choices"])
    assert results["tiny_choices"]["acc,none"] == pytest.approx(right / count)
    for sample in samples["tiny_answers"]:
        ((text, settings),) = sample["arguments"]
        generating = SamplingParams(max_tokens=8, stop=tuple(settings["until"]), **params)
        (result,) = engine.generate(text, generating)
        assert sample["resps"][0][0] == result.text


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_as_documented(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [one.ok() for one in schema.get_all_operations()]
    paths = {operation.path for operation in operations}
    assert {"/v1/completions", "/v1/chat/completions", "/api", "/tokenize", "/health"} <= paths
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            if isinstance(case.body, dict):
                # A long text takes its time, and shows nothing that a short one does not.
                for name in ("max_tokens", "max_completion_tokens", "tokens_to_generate"):
                    if isinstance(case.body.get(name), int):
                        case.body[name] = min(case.body[name], 8)
            # Some bodies of the right shape ask for what this model does not have.
            case.call_and_validate(timeout=patient(60), excluded_checks=[positive_data_acceptance])

        check()
    assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).ok
