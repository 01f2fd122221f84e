"""What conversions write is loaded by Megatron itself, and computes the same there."""

import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402

from megatron.early_exit.checkpoint.exits import add_exits  # noqa: E402
from megatron.early_exit.checkpoint.source import open_checkpoint  # noqa: E402
from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.inference import EarlyExitEngine, SamplingParams  # noqa: E402
from tests.helpers.exit_models import SEQUENCE, VOCAB, build_model  # noqa: E402
from tests.helpers.megatron_model import BACKBONES, architecture, megatron_logits  # noqa: E402
from tests.helpers.single_process import model_parallel  # noqa: E402
from tests.helpers.tiny_models import make_model  # noqa: E402
from tests.helpers.written_checkpoint import write_model  # noqa: E402


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES.keys())
def test_megatron_loads_added_exits(tmp_path, backbone):
    from megatron.core import dist_checkpointing

    exits = EarlyExitConfig(
        exit_layer_nums=(2, 4),
        use_exit_norm=True,
        use_exit_mlp=True,
        use_exit_block=True,
        untie_exit_output_weights=True,
    )
    base = write_model(tmp_path / "base", make_model(architecture(backbone)))
    add_exits(open_checkpoint(base), exits).write(tmp_path / "with")
    tokens = torch.randint(VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(0))
    with model_parallel(), torch.no_grad():
        model = build_model(exits, **backbone)
        directory = str(tmp_path / "with" / "release")
        # Strict about all keys, as Megatron's own loading is.
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, directory)
        model.load_state_dict(loaded["model"])
        logits = megatron_logits(model.eval(), tokens)
    engine = EarlyExitEngine.from_checkpoint(tmp_path / "with")
    for layer, name in ((2, 2), (4, 4), (None, "final")):
        exits_only = {"mode": "early_exit", "early_exit_threshold": 0.0, "exit_layers": [layer]}
        params = SamplingParams(max_tokens=1, logprobs=0, **(exits_only if layer else {}))
        (result,) = engine.generate([tokens.tolist()[:-1]], params)
        expected = torch.log_softmax(logits[name][-2], dim=0)
        assert result.token_ids == [int(expected.argmax())]
        assert result.logprobs == pytest.approx([float(expected.max())], abs=1e-4)
