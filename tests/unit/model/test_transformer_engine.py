"""Exits on Transformer Engine's layers, with a stand-in for it: gradients, checkpoint keys, number
formats and random numbers.

One process observes everything; the tests say what it should have seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.model.rng import seeded_rng  # noqa: E402
from megatron.early_exit.training.loss.exit_loss import (  # noqa: E402
    ExitObjective,
    LossNormalization,
)
from tests.helpers.exit_models import (  # noqa: E402
    LAYERS,
    Microbatch,
    PlainExits,
    build_model,
    gradients,
)
from tests.helpers.plain_loss import relative_error  # noqa: E402
from tests.helpers.single_process import model_parallel  # noqa: E402
from tests.helpers.stand_in_process import under_transformer_engine  # noqa: E402
from tests.helpers.tiny_models import HEADS as HEADS_OF_ALL_KINDS  # noqa: E402

# What parts a head has matters here, not what it answers with.
KINDS = ("projection", "norm", "final head", "mlp", "block", "all")
HEADS = {name: HEADS_OF_ALL_KINDS[name] for name in KINDS}
NORMS = ["RMSNorm", "LayerNorm"]

FP8 = {"fp8": "e4m3", "fp8_recipe": "tensorwise"}
FIRST_IN_BF16 = {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0}
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "delayed": {"fp8": "hybrid", "fp8_recipe": "delayed"},
    "tensorwise": FP8,
    "first layer in bf16": {**FP8, **FIRST_IN_BF16, "num_layers_at_start_in_bf16": 1},
    "last layers in bf16": {
        **FP8,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 0,
        "num_layers_at_end_in_bf16": 2,
    },
    "fp4": {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
    "recomputed": {
        **FP8,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "parameters in fp8": {**FP8, "fp8_param": True},
}
EXITS_AFTER = (1, 3)
CASES = [(name, pre_exit) for name in FORMATS for pre_exit in (False, True)]


def observe() -> dict[str, Any]:
    """Everything that is tested here; for a process with Transformer Engine."""
    from megatron.core.fp8_utils import HAVE_TE

    assert HAVE_TE
    with model_parallel():
        return {
            "gradients": {
                f"{head} {norm}": _gradient_error(head, norm) for head in HEADS for norm in NORMS
            },
            "keys": {impl: _keys(impl) for impl in ("transformer_engine", "local")},
            "formats": {f"{name} {pre}": _formats(FORMATS[name], pre) for name, pre in CASES},
            "precision file": _formats({**FP8, "quant_recipe": _bf16_for_exit_mlps()}, False),
            "random numbers": _random_numbers(),
        }


def _exits(head: str, pre_exit: bool = False) -> EarlyExitConfig:
    # An exit MLP replaces that of the layer before the exit.
    head = "block" if pre_exit else head
    numbers = tuple(position + pre_exit for position in EXITS_AFTER)
    return EarlyExitConfig(exit_layer_nums=numbers, pre_exit=pre_exit, **HEADS[head])


def _model(exits: EarlyExitConfig, **backbone: Any) -> Any:
    model = build_model(exits, **{"transformer_impl": "transformer_engine", **backbone})
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    model.exit_tap = ExitObjective(exits, normalization, chunk_tokens=5)
    model.exit_tap.set_loss_scale(torch.ones(1))
    return model


def _train(model: Any, batch: Microbatch) -> None:
    (batch.final_loss(model) / batch.tokens_that_count).backward()


def _gradient_error(head: str, norm: str) -> float:
    """The largest relative error of a parameter's gradient, against plain autograd."""
    exits, batch = _exits(head), Microbatch(0)
    model = _model(exits, normalization=norm)
    _train(model, batch)
    found = gradients(model)
    model.exit_tap = None
    PlainExits(model, exits).objective(batch).backward()
    expected = gradients(model)
    assert found.keys() == expected.keys()
    return max(relative_error(found[name], expected[name]) for name in found)


def _keys(impl: str) -> list[str]:
    """The checkpoint's keys of a model that has everything."""
    state = _model(_exits("all"), transformer_impl=impl).sharded_state_dict()
    return sorted({entry.key for entry in state.values()})


def _formats(backbone: dict[str, Any], pre_exit: bool) -> dict[str, Any]:
    """The formats in which modules run once in training and once in evaluation, and in which their
    weights were built, by the names of the modules; and the exits' losses."""
    exits, batch = _exits("all", pre_exit), Microbatch(0)
    model = _model(exits, params_dtype=torch.bfloat16, bf16=True, **backbone)
    linears = {name: one for name, one in model.named_modules() if hasattr(one, "formats")}
    seen: dict[str, Any] = {"built": {name: one.built_in for name, one in linears.items()}}
    for phase in ("training", "evaluation"):
        model.train(phase == "training")
        for one in linears.values():
            one.formats.clear()
        if model.training:
            _train(model, batch)
            sums = model.exit_tap.training_metrics._sums
        else:
            with torch.no_grad():
                batch.final_loss(model)
            sums = model.exit_tap.validation_metrics._sums
        formats = {name: sorted({*map(str, one.formats)}) for name, one in linears.items()}
        seen[phase] = {"formats": formats, "losses": sums[:, 0].tolist()}
    return seen


def _bf16_for_exit_mlps() -> Any:
    """What Megatron makes of a `--te-precision-config-file` that computes exits' MLPs in bf16."""
    from megatron.core.quantization.quant_config import GlobMatcher, RecipeConfig

    plain = {
        "transformer_engine_config_type": "TEQuantizationParams",
        "training_recipe": {},
    }
    return RecipeConfig([GlobMatcher("exits.[0-9].mlp.*", "plain")], {"plain": plain})


def _random_numbers() -> dict[str, Any]:
    """What is drawn inside a seeded block by Megatron's tracker and by Transformer Engine's, and
    what the latter draws afterwards, and would have drawn without it."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            return torch.rand(3).tolist()

    seen = {}
    for name, te_rng_tracker in {"megatron": False, "transformer_engine": True}.items():
        for block in (True, False):
            tensor_parallel.model_parallel_cuda_manual_seed(
                1, te_rng_tracker=te_rng_tracker, force_reset_rng=True
            )
            first = draw()
            if block:
                with seeded_rng(5, tp_rank=0):
                    seen[f"{name} inside"] = [draw(), draw()]
            seen[f"{name} with {block}"] = [first, draw()]
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return under_transformer_engine(observe)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_autograd(seen, head, norm):
    assert seen["gradients"][f"{head} {norm}"] < 1e-5


def test_checkpoint_keys_are_those_of_local_layers(seen):
    keys = {
        impl: [key for key in keys if "_extra_state" not in key]
        for impl, keys in seen["keys"].items()
    }
    assert keys["transformer_engine"] == keys["local"]
    assert any("_extra_state" in key for key in seen["keys"]["transformer_engine"])


@pytest.mark.parametrize(("name", "pre_exit"), CASES)
def test_exits_run_in_the_format_of_their_layer_in_training_and_evaluation(seen, name, pre_exit):
    found = seen["formats"][f"{name} {pre_exit}"]
    training, evaluation = found["training"], found["evaluation"]
    assert training["formats"] == evaluation["formats"]
    assert training["losses"] == evaluation["losses"]
    for position in EXITS_AFTER:
        in_layer, built_in_layer = (
            _of_modules(formats, f"decoder.layers.{position - 1}.")
            for formats in (training["formats"], found["built"])
        )
        in_exit, built_in_exit = (
            _of_modules(formats, f"exits.{position}.")
            for formats in (training["formats"], found["built"])
        )
        assert in_exit == in_layer
        assert built_in_exit == built_in_layer


def _of_modules(formats: dict[str, Any], prefix: str) -> list[Any]:
    found = [one for name, one in formats.items() if name.startswith(prefix)]
    assert found
    return [one for i, one in enumerate(found) if one not in found[:i]]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("bf16", [None] * LAYERS),
        ("delayed", ["TEDelayedScaling"] * LAYERS),
        ("tensorwise", ["Float8CurrentScaling"] * LAYERS),
        ("first layer in bf16", [None, *["Float8CurrentScaling"] * (LAYERS - 1)]),
        ("last layers in bf16", [*["Float8CurrentScaling"] * (LAYERS - 2), None, None]),
        ("fp4", ["NVFP4BlockScaling"] * LAYERS),
    ],
)
def test_the_stand_in_sees_the_formats_of_the_backbone(seen, name, layers):
    formats = seen["formats"][f"{name} False"]["training"]["formats"]
    found = [_of_modules(formats, f"decoder.layers.{i}.") for i in range(LAYERS)]
    assert found == [[[str(one)]] for one in layers]


def test_fp8_changes_the_losses_of_exits(seen):
    plain, rounded = (seen["formats"][f"{name} False"] for name in ("bf16", "tensorwise"))
    assert plain["training"]["losses"] != rounded["training"]["losses"]


def test_a_precision_file_applies_to_exits(seen):
    formats = seen["precision file"]["training"]["formats"]
    for position in EXITS_AFTER:
        assert _of_modules(formats, f"exits.{position}.mlp.") == [["None"]]
        assert _of_modules(formats, f"exits.{position}.block.") == [["Float8CurrentScaling"]]
    assert seen["precision file"]["evaluation"]["formats"] == formats


def test_both_trackers_of_random_states_draw_the_same(seen):
    found = seen["random numbers"]
    assert found["transformer_engine inside"] == found["megatron inside"]
    for name in ("megatron", "transformer_engine"):
        assert found[f"{name} with True"] == found[f"{name} with False"]
