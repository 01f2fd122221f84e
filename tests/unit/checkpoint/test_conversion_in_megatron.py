"""What conversions write is loaded by Megatron itself, and computes the same there."""

from itertools import pairwise

import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402

from megatron.early_exit.checkpoint.exits import add_exits  # noqa: E402
from megatron.early_exit.checkpoint.multi_token_prediction import add_mtp  # noqa: E402
from megatron.early_exit.checkpoint.reader import CheckpointReader  # noqa: E402
from megatron.early_exit.checkpoint.source import (  # noqa: E402
    is_state,
    open_checkpoint,
    stored_names,
)
from megatron.early_exit.checkpoint.weights import stored_weights  # noqa: E402
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


@pytest.mark.parametrize("is_repeated", [False, True])
def test_megatron_loads_an_added_module(tmp_path, is_repeated):
    from megatron.core import dist_checkpointing

    backbone = BACKBONES["llama"]
    base = write_model(tmp_path / "base", make_model(architecture(backbone)))
    add_mtp(open_checkpoint(base), 2, is_repeated).write(tmp_path / "with")
    tokens = torch.randint(VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(0))
    depths = []
    with model_parallel(), torch.no_grad():
        mtp = {"mtp_num_layers": 2, "mtp_use_repeated_layer": is_repeated}
        model = build_model(EarlyExitConfig(), **mtp, **backbone).eval()
        directory = str(tmp_path / "with" / "release")
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, directory)
        model.load_state_dict(loaded["model"])
        assert len(model.mtp.layers) == (1 if is_repeated else 2)
        last = dict(model.decoder.layers[-1].named_parameters())
        for layer in model.mtp.layers:
            own = dict(layer.mtp_model_layer.named_parameters())
            assert all(torch.equal(own[name], weight) for name, weight in last.items())
        model.mtp.register_forward_hook(lambda _, args, output: depths.extend(output.chunk(3)))
        model(tokens[None], torch.arange(SEQUENCE)[None], None)
        # A new layer is the last one again, on what the final norm gives.
        rope = model.rotary_pos_emb(SEQUENCE)
        for before, after in pairwise(depths):
            scaled = model.mtp.layers[0].hnorm(before)
            again, _ = model.decoder.layers[-1](scaled, attention_mask=None, rotary_pos_emb=rope)
            torch.testing.assert_close(after, model.decoder.final_layernorm(again))
        # As training saves it.
        (tmp_path / "saved").mkdir()
        dist_checkpointing.save(model.sharded_state_dict(), str(tmp_path / "saved"))
    written = open_checkpoint(tmp_path / "with")
    reader = CheckpointReader(tmp_path / "saved")
    saved = stored_weights(reader, written.description.architecture, EarlyExitConfig())
    assert saved.keys() == written.weights.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor.read(), written.weights[name].read()), name
    found = {entry for name in saved for entry in stored_names(reader, name)}
    assert not [name for name in reader.tensors if name not in found and not is_state(name)]
