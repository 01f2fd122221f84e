"""The engine against the Megatron model that training builds: same checkpoint, same logits."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron.early_exit import platform

platform.prepare()

import torch  # noqa: E402

from megatron.early_exit.checkpoint.reader import CheckpointReader  # noqa: E402
from megatron.early_exit.checkpoint.weights import load_weights, stored_weights  # noqa: E402
from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.inference.model.mtp_rows import MtpRows  # noqa: E402
from megatron.early_exit.inference.model.passes import Span  # noqa: E402
from megatron.early_exit.inference.model.runner import SegmentRunner  # noqa: E402
from megatron.early_exit.inference.model.segmented_model import SegmentedModel  # noqa: E402
from tests.helpers.exit_models import SEQUENCE, VOCAB, build_model  # noqa: E402
from tests.helpers.megatron_model import BACKBONES, architecture, megatron_logits  # noqa: E402
from tests.helpers.single_process import model_parallel  # noqa: E402

EXITS = {
    "bare": EarlyExitConfig(exit_layer_nums=(1, 3)),
    "all": EarlyExitConfig(
        exit_layer_nums=(2, 4),
        use_exit_norm=True,
        use_exit_mlp=True,
        use_exit_block=True,
        untie_exit_output_weights=True,
    ),
    "pre": EarlyExitConfig(
        exit_layer_nums=(2, 4), pre_exit=True, use_exit_norm=True, use_exit_block=True
    ),
}


def randomize(model) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def save(model, directory: Path) -> None:
    from megatron.core import dist_checkpointing

    directory.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(directory))


@pytest.mark.parametrize("exits", EXITS.values(), ids=EXITS.keys())
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES.keys())
def test_logits_of_every_head(tmp_path, backbone, exits):
    tokens = torch.randint(VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(0))
    with model_parallel(), torch.no_grad():
        model = build_model(exits, **backbone)
        randomize(model)
        expected = megatron_logits(model.eval(), tokens)
        save(model, tmp_path / "iter_0000001")

    shape = architecture(backbone)
    reader = CheckpointReader(tmp_path / "iter_0000001")
    stored = stored_weights(reader, shape, exits)
    weights = load_weights(stored, torch.float32, torch.device("cpu"))
    segmented = SegmentedModel(shape, exits, weights)
    with torch.inference_mode():
        runner = SegmentRunner(segmented, num_slots=1, capacity=SEQUENCE)
        for index, token in enumerate(tokens.tolist()):
            spans = [Span(0, index, index + 1)]
            for segment, exit_ in enumerate(segmented.exits):
                runner.run(segment, spans, [token])
                found = runner.exit_logits(segment, spans)[0]
                torch.testing.assert_close(found, expected[exit_.position][index], **CLOSE)
            found = runner.final_logits(runner.run(len(segmented.exits), spans, [token]))[0]
            torch.testing.assert_close(found, expected["final"][index], **CLOSE)


MODULES = {
    "layers": {"mtp_num_layers": 2},
    "a repeated layer": {"mtp_num_layers": 3, "mtp_use_repeated_layer": True},
}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES.keys())
@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES.keys())
def test_logits_of_every_depth_of_multi_token_prediction(tmp_path, backbone, module):
    tokens = torch.randint(VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(0))
    with model_parallel(), torch.no_grad():
        model = build_model(EarlyExitConfig(), **backbone, **module)
        randomize(model)
        hidden: list[torch.Tensor] = []
        model.mtp.register_forward_hook(lambda _, __, output: hidden.append(output))
        model.eval()(tokens[None], torch.arange(SEQUENCE)[None], None, labels=tokens[None])
        words, output = model.embedding.word_embeddings.weight, model.output_layer.weight
        output = words if backbone["tied"] else output
        expected = hidden[0][:, 0].chunk(1 + module["mtp_num_layers"])[1:]
        expected = [one @ output.T for one in expected]
        save(model, tmp_path / "iter_0000001")

    shape = replace(architecture(backbone), **module)
    stored = stored_weights(CheckpointReader(tmp_path / "iter_0000001"), shape, EarlyExitConfig())
    weights = load_weights(stored, torch.float32, torch.device("cpu"))
    segmented = SegmentedModel(shape, EarlyExitConfig(), weights)
    ids = tokens.tolist()
    with torch.inference_mode():
        runner = SegmentRunner(segmented, num_slots=1, capacity=SEQUENCE)
        rows = MtpRows(runner)
        for start, end in ((0, 5), (5, 6), (6, SEQUENCE)):
            runner.run(0, [Span(0, start, end)], ids[start:end])
            for depth, logits in enumerate(expected, start=1):
                first = rows.count(depth, 0)
                span = Span(0, first, end - depth)
                found = rows.run(depth, [span], ids[first + depth : end])
                found = segmented.mtp_head.logits(found)
                torch.testing.assert_close(found, logits[first : end - depth], **CLOSE)


CLOSE = {"rtol": 1e-4, "atol": 1e-4}
