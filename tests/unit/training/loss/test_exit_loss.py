"""The deferred loss gives every parameter the gradient of plain autograd over the summed losses."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.training.loss.curriculum import (  # noqa: E402
    CurriculumOptions,
    LossCurriculum,
)
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

BOUND = 1e-5


pytestmark = pytest.mark.usefixtures("process_groups")


def exits(*positions: int, pre_exit: bool = False, **options: Any) -> EarlyExitConfig:
    """Exits after `positions` layers, by default with weights that differ."""
    values = {"exit_layer_weight": tuple(0.3 * (i + 1) for i in range(len(positions)))}
    numbers = tuple(p + 1 for p in positions) if pre_exit else positions
    return EarlyExitConfig(exit_layer_nums=numbers, pre_exit=pre_exit, **(values | options))


class Training:
    """A model that trains with the deferred loss, and its reference that does with plain autograd.

    `recompute` holds options of activation recomputation, for the first alone."""

    def __init__(
        self,
        config: EarlyExitConfig,
        chunk_tokens: int | None = 5,
        per_token: bool = False,
        recompute: dict[str, Any] | None = None,
        **backbone: Any,
    ) -> None:
        self.per_token = per_token
        recompute = {f"recompute_{name}": value for name, value in (recompute or {}).items()}
        self.model = build_model(config, **backbone, **recompute)
        self.plain = PlainExits(build_model(config, **backbone), config)
        self.plain.model.load_state_dict(self.model.state_dict())
        self.objective = ExitObjective(
            config, LossNormalization(per_token=per_token, context_parallel_size=1), chunk_tokens
        )
        self.model.exit_tap = self.objective

    def deferred_gradients(self, *batches: Microbatch, scale: float = 1.0) -> dict[str, Any]:
        """All forward passes, then all backward passes, as in the steady state of a pipeline."""
        self.objective.start_iteration(0)
        losses = []
        for batch in batches:
            self.objective.set_loss_scale(torch.tensor([scale]))
            loss = batch.final_loss(self.model)
            losses.append(loss if self.per_token else loss / batch.tokens_that_count)
        for loss in losses:
            (scale * loss).backward()
        return gradients(self.model)

    def plain_gradients(self, *batches: Microbatch, scale: float = 1.0) -> dict[str, Any]:
        for batch in batches:
            (scale * self.plain.objective(batch, self.per_token)).backward()
        return gradients(self.plain.model)

    def freeze(self, is_frozen: Callable[[str], bool]) -> None:
        for model in (self.model, self.plain.model):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not is_frozen(name))

    def check(self, *batches: Microbatch, bound: float = BOUND, scale: float = 1.0) -> None:
        batches = batches or (Microbatch(0),)
        expected = self.plain_gradients(*batches, scale=scale)
        found = self.deferred_gradients(*batches, scale=scale)
        errors = {name: relative_error(found[name], expected[name]) for name in expected}
        trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        assert trained
        assert all(expected[name].any() for name in trained), "a parameter without a gradient"
        assert max(errors.values()) < bound, errors


HEAD_KINDS = [
    {"use_exit_norm": norm, "use_exit_mlp": mlp, "use_exit_block": block}
    for norm, mlp, block in product((False, True), repeat=3)
]
SOME_KINDS = [
    {},
    {"use_exit_norm": True, "use_exit_mlp": True},
    {"use_exit_norm": True, "use_exit_block": True},
]


def names(options: dict[str, Any]) -> str:
    return "+".join(name.removeprefix("use_exit_") for name, on in options.items() if on) or "plain"


@pytest.mark.parametrize("tied_backbone", [True, False], ids=["tied-lm", "untied-lm"])
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize("pre_exit", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("kind", HEAD_KINDS, ids=names)
def test_head_kinds(kind, pre_exit, untied, tied_backbone):
    if pre_exit and kind["use_exit_mlp"]:
        pytest.skip("refused: an exit MLP takes the place of the MLP of the layer before it")
    config = exits(1, 3, pre_exit=pre_exit, untie_exit_output_weights=untied, **kind)
    Training(config, tied=tied_backbone).check()


@pytest.mark.parametrize("tied_backbone", [True, False], ids=["tied-lm", "untied-lm"])
@pytest.mark.parametrize("pre_exit", [False, True], ids=["post", "pre"])
def test_exits_that_share_the_final_head(pre_exit, tied_backbone):
    positions = (1, 3) if pre_exit else (1, 3, LAYERS)
    config = exits(*positions, pre_exit=pre_exit, share_final_head=True)
    training = Training(config, tied=tied_backbone)
    assert not [name for name, _ in training.model.named_parameters() if "exits." in name]
    training.check()


@pytest.mark.parametrize("kind", SOME_KINDS, ids=names)
@pytest.mark.parametrize(
    "options",
    [
        {"exit_layer_temperature": (0.5, 3.0)},
        {"use_dynamic_exit_layer_weight": True},
        {"use_dynamic_exit_layer_weight": True, "exit_layer_temperature": (2.0, 0.7)},
    ],
    ids=["temperature", "dynamic", "both"],
)
def test_loss_options(kind, options):
    Training(exits(1, 3, **kind, **options)).check()


@pytest.mark.parametrize("kind", SOME_KINDS, ids=names)
@pytest.mark.parametrize(
    "positions", [(LAYERS,), (2, LAYERS), tuple(range(1, LAYERS + 1))], ids=str
)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_exits_up_to_the_last_layer(kind, positions, untied):
    config = exits(*positions, untie_exit_output_weights=untied, **kind)
    Training(config, tied=False).check()


@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 24, 1000])
def test_chunks(chunk_tokens):
    Training(exits(1, 3, use_exit_norm=True), chunk_tokens).check()


@pytest.mark.parametrize("kind", SOME_KINDS, ids=names)
@pytest.mark.parametrize(
    "recompute",
    [
        {"granularity": "full", "method": "uniform", "num_layers": 1},
        {"granularity": "full", "method": "uniform", "num_layers": 3},
        {"granularity": "full", "method": "block", "num_layers": 2},
        {"granularity": "selective", "modules": ["core_attn"]},
        {"granularity": "selective", "modules": ["core_attn", "mlp"]},
    ],
    ids=lambda one: "-".join(map(str, one.values())),
)
def test_recompute(kind, recompute):
    Training(exits(1, 2, LAYERS, **kind), recompute=recompute).check()
    if not kind.get("use_exit_mlp"):
        Training(exits(1, 3, pre_exit=True, **kind), recompute=recompute).check()


@pytest.mark.parametrize("kind", HEAD_KINDS, ids=names)
@pytest.mark.parametrize(
    "backbone",
    [
        {"fp32_residual_connection": True},
        {
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "gated_linear_unit": False,
            "activation_func": torch.nn.functional.gelu,
        },
        {"num_query_groups": 2, "qk_layernorm": True},
        {"apply_residual_connection_post_layernorm": False, "layernorm_zero_centered_gamma": True},
    ],
    ids=["fp32-residual", "layernorm-bias-gelu", "grouped-queries", "centred-gains"],
)
def test_backbones(kind, backbone):
    Training(exits(1, 3, **kind), **backbone).check()


@pytest.mark.parametrize("kind", [{}, {"use_exit_norm": True}], ids=names)
def test_mixture_of_experts(kind):
    experts = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": False,
    }
    Training(exits(1, 3, **kind), **experts).check()


@pytest.mark.parametrize("per_token", [False, True], ids=["mean", "sum"])
def test_several_microbatches(per_token):
    batches = [Microbatch(seed) for seed in range(3)]
    empty = Microbatch(4)
    empty.mask.zero_()
    config = exits(1, 3, use_exit_norm=True, use_exit_mlp=True)
    Training(config, per_token=per_token).check(*batches, empty)


def test_loss_scale():
    Training(exits(1, 3, use_exit_norm=True)).check(scale=1024.0)


def test_weight_of_the_current_iteration():
    config = exits(
        2,
        exit_layer_weight=(1.0,),
        exit_layer_weight_init=(0.25,),
        exit_layer_weight_warmup_iters=10,
    )
    training = Training(config)
    found = training.deferred_gradients(Microbatch(0))
    training.plain.exits = exits(2, exit_layer_weight=(0.25,))
    expected = training.plain_gradients(Microbatch(0))
    assert max(relative_error(found[name], expected[name]) for name in expected) < BOUND


@pytest.mark.parametrize(
    "kind", [*HEAD_KINDS, {"share_final_head": True}], ids=[*map(names, HEAD_KINDS), "final-head"]
)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_exits_that_do_not_learn_are_not_computed(kind, untied):
    if untied and "share_final_head" in kind:
        pytest.skip("refused: such exits have no weights of their own")
    config = exits(1, 2, 3, untie_exit_output_weights=untied, **kind)
    training = Training(config, tied=False)
    training.objective.curriculum = LossCurriculum(
        options=CurriculumOptions(exit_curriculum="rotational", exit_curriculum_period=2),
        positions=(1, 2, 3),
        num_layers=LAYERS,
        iterations=lambda: 10,
    )
    computed, delivered = [], []
    for position, head in training.model.exits.heads.items():
        head.register_forward_hook(lambda *_, position=position: computed.append(position))
    for name, parameter in training.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: delivered.append(name))
    found = training.deferred_gradients(Microbatch(0))
    assert sorted(computed) == [1, 3]
    counts = Counter(delivered)
    training.objective.curriculum = None
    training.deferred_gradients(Microbatch(0))
    assert counts == Counter(delivered[counts.total() :]), "data parallelism would wait for ever"

    weights = config.exit_layer_weight
    training.plain.exits = replace(config, exit_layer_weight=(weights[0], 0.0, weights[2]))
    expected = training.plain_gradients(Microbatch(0))
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("kind", HEAD_KINDS, ids=names)
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_frozen_backbone_trains_its_exits(kind, untied):
    if not untied and not any(kind.values()):
        pytest.skip("nothing to train: a tied projection alone belongs to the backbone")
    training = Training(exits(1, 3, untie_exit_output_weights=untied, **kind))
    training.freeze(lambda name: not name.startswith("exits."))
    training.check()


def test_frozen_exits_train_the_backbone():
    training = Training(exits(1, 3, use_exit_mlp=True, untie_exit_output_weights=True))
    training.freeze(lambda name: name.startswith("exits."))
    training.check()


def test_zero_weights_leave_the_backbone_bitwise_alone():
    config = exits(
        1, 3, LAYERS, use_exit_mlp=True, use_exit_block=True, exit_layer_weight=(0.0,) * 3
    )
    training = Training(config)
    found = training.deferred_gradients(Microbatch(0))
    training.model.exit_tap = None
    expected = training.deferred_gradients(Microbatch(0))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_evaluation_measures_and_leaves_nothing_behind():
    training = Training(exits(1, 3))
    training.model.eval()
    batch = Microbatch(0)
    with torch.no_grad():
        batch.final_loss(training.model)
    groups = training.model.pg_collection
    means = training.objective.validation_metrics.take_means(groups, torch.device("cpu"))
    training.model.train()
    training.deferred_gradients(batch)
    trained = training.objective.training_metrics.take_means(groups, torch.device("cpu"))
    assert means.keys() == trained.keys()
    assert len(means) == 4
    for name, value in means.items():
        torch.testing.assert_close(value, trained[name])
    assert all(not gradient.any() for gradient in gradients(training.model).values())


def test_bf16():
    config = exits(1, 3, use_exit_norm=True, use_exit_mlp=True)
    Training(config, bf16=True, params_dtype=torch.bfloat16).check(bound=2e-2)
