"""From a checkpoint to a model."""

import pytest
import torch

from megatron.early_exit.inference import loading
from megatron.early_exit.inference.loading import load_model
from tests.helpers.tiny_models import make_model
from tests.helpers.written_checkpoint import write_model


@pytest.mark.parametrize(
    ("compile_rows", "large", "moves"), [(True, 1, 1), (True, 2**40, 0), (False, 1, 0)]
)
def test_large_compiled_models_move_to_huge_pages(
    monkeypatch, tmp_path, compile_rows, large, moves
):
    calls = []
    monkeypatch.setattr(loading, "use_huge_pages", lambda: calls.append(1))
    monkeypatch.setattr(loading, "_LARGE", large)
    write_model(tmp_path, make_model(exits=(1,)))
    load_model(tmp_path, torch.float32, "cpu", 1, 1, compile_rows, has_driver=False)
    assert len(calls) == moves
