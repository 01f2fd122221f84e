"""Someone comes from EE-LLM with text, a tokenizer and a checkpoint, and goes on with them here.

EE-LLM appends five tokens to a SentencePiece model's; one of them ends documents. The ends must be
the same token everywhere: in the data, in training and tuning, and where the answer to a prompt is
over."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron.early_exit import platform

platform.prepare()

from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

from megatron.early_exit.inference import EarlyExitEngine, SamplingParams  # noqa: E402
from tests.helpers.ee_llm_format import save_ee_llm, with_shared_norms  # noqa: E402
from tests.helpers.text_server import text_server  # noqa: E402
from tests.helpers.tiny_models import HEADS, LLAMA, make_model  # noqa: E402
from tests.helpers.warm_ranks import ENTRY, WarmRanks, tails  # noqa: E402
from tools import checkpoint as checkpoint_tool  # noqa: E402
from tools import preprocess_data  # noqa: E402

PIECES, APPENDED = 56, 5
END_OF_DOCUMENT = PIECES + 2
TEXT = "the quick brown foxes jump over lazy dogs"
STEPS = 40
SCHEDULE = [
    *("--micro-batch-size", 4, "--global-batch-size", 8, "--seq-length", 64),
    *("--lr", 1e-2, "--lr-decay-style", "constant", "--train-iters", STEPS),
    *("--num-workers", 0, "--log-interval", 10, "--eval-interval", 1000, "--eval-iters", 0),
]


@dataclass(frozen=True)
class Kept:
    """What somebody has from EE-LLM, and the ranks to train on.

    Attributes:
        tokenizer: a SentencePiece model.
        data: flags that train on what the text has become.
    """

    ranks: WarmRanks
    folder: Path
    tokenizer: Path
    data: list[object]

    def train(self, *flags: object) -> None:
        """On two pipeline stages."""
        layout = ["--pipeline-model-parallel-size", 2, "--use-checkpoint-args"]
        command = [ENTRY, *SCHEDULE, *self.data, *layout, *flags]
        done = self.ranks.run([str(one) for one in command], 2, self.folder / "output")
        assert done.returncode == 0, tails(done.stdout)


@pytest.fixture(scope="module")
def kept(ranks: WarmRanks, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    folder = tmp_path_factory.mktemp("ee_llm")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{TEXT}, {n} boxes of five dozen liquor jugs" for n in range(99)]),
        model_prefix=f"{folder}/words",
        vocab_size=PIECES,
        minloglevel=2,
    )
    tokenizer = folder / "words.model"
    flags = ["--input", text, "--output-prefix", folder / "data", "--append-eod"]
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer]
    own = [*flags, *kind, "--tokenizer-sentencepiece-legacy"]
    assert preprocess_data.main([str(one) for one in own]) == 0
    old = with_shared_norms(make_model(LLAMA, exits=(1, 3), **HEADS["all"]))
    save_ee_llm(old, folder / "old", tensor=2, pipeline=2)
    arguments = ("import-ee-llm", folder / "old", folder / "imported")
    assert run_tool(*arguments, "--tokenizer-model", tokenizer) == 0
    data = ["--data-path", folder / "data_text_document", "--split", "98,2,0"]
    return Kept(ranks, folder, tokenizer, data)


def run_tool(*arguments: object) -> int:
    return checkpoint_tool.main([str(one) for one in arguments])


def test_documents_end_with_ee_llms_token(kept: Kept) -> None:
    data = IndexedDataset(str(kept.folder / "data_text_document"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(kept.tokenizer))
    assert LLAMA.vocab_size == PIECES + APPENDED
    assert data[0].tolist() == [*pieces.encode(TEXT), END_OF_DOCUMENT]


def answer(path: Path, **options: Any) -> str:
    """How the model goes on, to its end of the document."""
    engine = EarlyExitEngine.from_checkpoint(path)
    (result,) = engine.generate("the quick brown", SamplingParams(max_tokens=40, **options))
    assert result.finish_reason == "stop"
    return str(result.text)


def test_training_tuning_and_serving_go_on(kept: Kept) -> None:
    trained, tuned = kept.folder / "trained", kept.folder / "tuned"
    rest = TEXT.removeprefix("the quick brown")
    kept.train("--load", kept.folder / "imported", "--save", trained, "--save-interval", STEPS)
    assert answer(trained) == rest
    assert run_tool("strip-exits", trained, kept.folder / "base") == 0
    exits = ["--exit-layer-nums", 2, "--use-exit-norm", "--use-exit-mlp"]
    saved = ["--load", kept.folder / "base", "--save", tuned, "--save-interval", STEPS]
    kept.train("--tune-exit", *exits, *saved)
    assert answer(tuned) == rest
    assert answer(tuned, mode="early_exit", early_exit_threshold=0.5) == rest
    with text_server(tuned) as server:
        body = {"prompt": "the quick brown", "max_tokens": 40, "temperature": 0}
        (choice,) = server.post("/v1/completions", body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (rest, "stop")


def test_data_with_its_tokens_need_its_tokenizer(kept: Kept) -> None:
    """Rows that pad the vocabulary have room for the token, which no text would ever end with."""
    model = ["--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4]
    fresh = [*model, "--max-position-embeddings", 64, "--make-vocab-size-divisible-by", 64]
    kind = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", kept.tokenizer]
    command = [ENTRY, *SCHEDULE, *kept.data, *fresh, *kind]
    done = kept.ranks.run([str(one) for one in command], 1, kept.folder / "refused")
    assert done.returncode == 2
    refusal = f"the token {END_OF_DOCUMENT} is out of range, allowed: 0 to {PIECES - 1};"
    assert refusal in done.stdout
    assert "--tokenizer-sentencepiece-legacy" in done.stdout
