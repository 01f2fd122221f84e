"""Attention on a GPU never builds a plan for a shape."""

import torch
from torch import Tensor

from megatron.early_exit.inference.model.segment import Segment


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def test_attention_is_not_cudnns_on_a_gpu():
    seen: list[bool] = []

    def step(hidden: Tensor, this: object) -> Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return hidden

    segment = Segment((step, step), range(1))  # type: ignore[arg-type]
    before = torch.backends.cuda.cudnn_sdp_enabled()
    rows = torch.ones(2, 3)
    assert segment(rows, None) is rows  # type: ignore[arg-type]
    assert seen == [before, before]
    seen.clear()
    segment(rows.as_subclass(OnGpu), None)  # type: ignore[arg-type]
    assert seen == [False, False]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    assert before
