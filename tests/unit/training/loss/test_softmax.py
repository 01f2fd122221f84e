"""What an exit's loss reads and writes of memory for each logit, and that both ways to compute the
softmax agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.training.loss import softmax  # noqa: E402
from megatron.early_exit.training.loss.head_loss import (  # noqa: E402
    HeadLossOptions,
    head_loss,
)
from megatron.early_exit.training.loss.softmax import EagerSoftmax, FusedSoftmax  # noqa: E402
from megatron.early_exit.training.loss.vocabulary import LocalVocabulary  # noqa: E402
from tests.helpers.memory_traffic import EagerTraffic, compiled_traffic  # noqa: E402

TOKENS, HIDDEN, VOCAB = 64, 4, 1024
DTYPES = [torch.float32, torch.bfloat16]
# Bytes for each logit, as in the table of `softmax.py`.
PRODUCTS = {torch.float32: 12, torch.bfloat16: 6}
EAGER = {torch.float32: 32, torch.bfloat16: 44}
FUSED = {torch.float32: 16, torch.bfloat16: 8}


pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_a_loss_and_its_gradients_pass_on_a_cpu(dtype):
    weight = Parameter(torch.randn(VOCAB, HIDDEN).to(dtype))
    weight.main_grad = torch.zeros(VOCAB, HIDDEN)  # type: ignore[attr-defined]
    options = HeadLossOptions(
        temperature=1.0,
        confidence_weighted=False,
        chunk_tokens=TOKENS // 2,
        tp_group=torch.distributed.group.WORLD,
    )
    hidden, labels = torch.randn(TOKENS, HIDDEN).to(dtype), torch.randint(VOCAB, (TOKENS,))
    with EagerTraffic(least=VOCAB * TOKENS // 2) as traffic:
        head_loss(hidden, weight, labels, options, torch.ones(TOKENS))
    assert traffic.bytes / (TOKENS * VOCAB) <= PRODUCTS[dtype] + EAGER[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_it_passes_compiled(dtype):
    logits = torch.randn(TOKENS, VOCAB).to(dtype)
    ones = torch.ones(TOKENS, 1)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (softmax._largest, ()),
        (softmax._sum_of_exponentials, (ones, ones)),
        (softmax._overwrite_with_gradient, (ones, ones, ones, ones.long(), ones)),
    ]
    counted = [compiled_traffic(function, logits, *args) for function, args in calls]
    assert [kernels for _, kernels in counted] == [1, 1, 1]
    # Beside the logits some numbers for each token are read.
    of_tokens = 64 * TOKENS
    assert sum(size for size, _ in counted) <= FUSED[dtype] * TOKENS * VOCAB + of_tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_and_eager_agree(dtype, temperature):
    vocabulary = LocalVocabulary(VOCAB, torch.distributed.group.WORLD, None)
    torch.manual_seed(0)
    logits = (3 * torch.randn(TOKENS, VOCAB)).to(dtype)
    labels = torch.randint(VOCAB, (TOKENS,))
    # bf16 has ties, of which one is the label.
    labels[::2] = logits[::2].argmax(dim=-1)
    eager = EagerSoftmax(logits.float().clone(), labels, temperature, vocabulary)
    fused = FusedSoftmax(logits, labels, temperature, vocabulary)
    torch.testing.assert_close(fused.total, eager.total)
    torch.testing.assert_close(fused.target, eager.target)
    assert torch.equal(fused.is_choice, eager.is_choice)
    by_softmax, by_label = torch.rand(TOKENS), torch.rand(TOKENS)
    expected = eager.gradient(by_softmax, by_label).to(dtype)
    torch.testing.assert_close(fused.gradient(by_softmax, by_label), expected)
    assert fused.gradient(by_softmax, by_label).data_ptr() == logits.data_ptr()
