"""What rounded weights change, against plain forward passes without an engine."""

import math
from dataclasses import replace

import pytest
import torch

from megatron.early_exit.inference import EarlyExitEngine
from megatron.early_exit.inference.quantization_loss import quantization_loss
from tests.helpers.quantized_models import rounded_model
from tests.helpers.reference_decoder import all_logits
from tests.helpers.text_checkpoint import CONTEXT, VOCAB_SIZE, save_text_checkpoint
from tests.helpers.tiny_models import LLAMA, make_model

TEXT = "the quick brown foxes jump over lazy dogs, zZyYxX. " * 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize("heads", [True, False])
def test_perplexities_and_agreement(path, heads):
    architecture = replace(LLAMA, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT)
    model = make_model(architecture, exits=(1, 3), use_exit_norm=True)
    tokens = EarlyExitEngine.from_checkpoint(path).tokenizer.encode(TEXT)
    pieces = [tokens[start : start + CONTEXT] for start in range(0, len(tokens), CONTEXT)]
    logits = [
        torch.cat([all_logits(one, piece)["final"][:-1] for piece in pieces]).double()
        for one in (model, rounded_model(model, heads))
    ]
    targets = torch.tensor([token for piece in pieces for token in piece[1:]])
    expected = [math.exp(torch.nn.functional.cross_entropy(one, targets).item()) for one in logits]
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean().item()
    loss = quantization_loss(path, TEXT, heads)
    assert len(pieces) > 1
    assert loss.num_tokens == len(targets)
    assert [loss.perplexity, loss.quantized_perplexity] == pytest.approx(expected, rel=5e-4)
    assert loss.agreement == pytest.approx(same, abs=1.5 / len(targets))
    assert loss.quantized_perplexity != pytest.approx(loss.perplexity, rel=5e-4)


def test_too_short_a_text(path):
    with pytest.raises(ValueError, match="the text has 1 tokens, allowed: 2 or more"):
        quantization_loss(path, "t")
