"""The description of a model's exits: what it accepts, refuses and means."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.early_exit.config import EarlyExitConfig, Exit


def refusal(**fields: object) -> str:
    """The message with which the fields are refused."""
    with pytest.raises(ValueError, match=r"^--\S+ ") as caught:
        EarlyExitConfig(**fields)
    return one_line(caught.value)


def one_line(error: ValueError) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- refusals: each names the flag, the value and what is allowed -------------------------------


@pytest.mark.parametrize(
    ("layers", "pre_exit", "words"),
    [
        ((0,), False, ["--exit-layer-nums 0", "1 to the number of layers"]),
        ((3, -1), False, ["--exit-layer-nums -1", "1 to the number of layers"]),
        ((1,), True, ["--exit-layer-nums 1", "with --pre-exit", "2 to the number of layers"]),
        ((2.0,), False, ["--exit-layer-nums 2.0", "1 to the number of layers"]),
        ((True,), False, ["--exit-layer-nums True", "1 to the number of layers"]),
        (("2",), False, ["--exit-layer-nums '2'", "1 to the number of layers"]),
    ],
)
def test_layers_out_of_range(layers, pre_exit, words):
    message = refusal(exit_layer_nums=layers, pre_exit=pre_exit)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("pre_exit", "lowest"), [(False, "1 to 8"), (True, "2 to 8")])
def test_layers_beyond_the_model(pre_exit, lowest):
    config = EarlyExitConfig(exit_layer_nums=(4, 9), pre_exit=pre_exit)
    with pytest.raises(ValueError, match=r"^--\S+ ") as caught:
        config.validate(8)
    message = one_line(caught.value)
    assert "--exit-layer-nums 9" in message
    assert lowest in message
    assert ("--pre-exit" in message) == pre_exit


def test_last_layer_is_within_the_model():
    EarlyExitConfig(exit_layer_nums=(8,)).validate(8)
    EarlyExitConfig(exit_layer_nums=(8,), pre_exit=True).validate(8)


def test_repeated_layer():
    message = refusal(exit_layer_nums=(2, 5, 2))
    assert "--exit-layer-nums 2 5 2" in message
    assert "layer 2 is given more than once" in message


@pytest.mark.parametrize(
    "flag", ["exit_layer_weight", "exit_layer_weight_init", "exit_layer_temperature"]
)
@pytest.mark.parametrize("values", [(1.0,), (1.0, 2.0, 3.0)])
def test_lists_of_different_length(flag, values):
    message = refusal(exit_layer_nums=(1, 2), **{flag: values})
    assert f"--{flag.replace('_', '-')} {' '.join(map(str, values))} has" in message
    assert f"{len(values)} value" in message
    assert "2 layers of --exit-layer-nums" in message


def test_values_without_exits():
    assert "--exit-layer-weight 1.0" in refusal(exit_layer_weight=(1.0,))


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("exit_layer_weight", -0.5, "0 or more"),
        ("exit_layer_weight", float("nan"), "0 or more"),
        ("exit_layer_weight", float("inf"), "0 or more"),
        ("exit_layer_weight_init", -1.0, "0 or more"),
        ("exit_layer_temperature", 0.0, "above 0"),
        ("exit_layer_temperature", -2.0, "above 0"),
        ("exit_layer_temperature", float("inf"), "above 0"),
    ],
)
def test_values_out_of_range(flag, value, allowed):
    message = refusal(exit_layer_nums=(1, 2), **{flag: (1.0, value)})
    assert f"--{flag.replace('_', '-')} {value}" in message
    assert f"allowed: {allowed}" in message


def test_warmup_out_of_range():
    message = refusal(exit_layer_weight_warmup_iters=-3)
    assert "--exit-layer-weight-warmup-iters -3" in message
    assert "0 or more" in message


def test_unknown_warmup_style():
    message = refusal(exit_layer_weight_warmup_style="square")
    assert "--exit-layer-weight-warmup-style 'square'" in message
    assert "linear, cosine" in message


def test_exit_mlp_before_its_layer():
    message = refusal(exit_layer_nums=(2,), use_exit_mlp=True, pre_exit=True)
    assert "--use-exit-mlp cannot be combined with --pre-exit" in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("pre_exit", True),
        ("use_exit_norm", True),
        ("use_exit_mlp", True),
        ("use_exit_block", True),
        ("untie_exit_output_weights", True),
        ("share_final_head", True),
        ("exit_vocab_size", 100),
        ("use_dynamic_exit_layer_weight", True),
        ("exit_layer_weight_warmup_iters", 9),
    ],
)
def test_what_shapes_exits_needs_exits(flag, value):
    message = refusal(**{flag: value})
    assert message == f"--{flag.replace('_', '-')} has no effect without --exit-layer-nums"


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("exit_layer_weight_init", (0.5, 0.0), "0.5 0.0"),
        ("exit_layer_weight_warmup_style", "cosine", "cosine"),
    ],
)
def test_what_shapes_the_warmup_needs_one(flag, value, shown):
    message = refusal(exit_layer_nums=(1, 2), **{flag: value})
    assert f"--{flag.replace('_', '-')} {shown} has no effect without" in message
    assert "--exit-layer-weight-warmup-iters, allowed: 1 or more" in message


# --- meaning ------------------------------------------------------------------------------------


def test_defaults():
    config = EarlyExitConfig(exit_layer_nums=(2, 4))
    assert config.exits == (Exit(2, 1.0, 0.0, 1.0), Exit(4, 1.0, 0.0, 1.0))
    assert EarlyExitConfig().exits == ()


def test_values_stay_with_their_layer():
    config = EarlyExitConfig(
        exit_layer_nums=(6, 2),
        exit_layer_weight=(0.6, 0.2),
        exit_layer_weight_init=(0.06, 0.02),
        exit_layer_weight_warmup_iters=1,
        exit_layer_temperature=(60.0, 20.0),
    )
    assert config.exits == (Exit(2, 0.2, 0.02, 20.0), Exit(6, 0.6, 0.06, 60.0))


layers = st.lists(st.integers(1, 40), unique=True, max_size=6)


@given(layers=layers)
def test_both_placements_name_the_same_exits(layers):
    after = EarlyExitConfig(exit_layer_nums=tuple(layers))
    before = EarlyExitConfig(exit_layer_nums=tuple(n + 1 for n in layers), pre_exit=bool(layers))
    assert after.exits == before.exits
    assert after.positions == before.positions == tuple(sorted(layers))


@st.composite
def configs(draw: st.DrawFn) -> EarlyExitConfig:
    numbers = draw(st.lists(st.integers(2, 40), unique=True, max_size=5))
    if not numbers:
        return EarlyExitConfig()
    pre_exit, shares = draw(st.booleans()), draw(st.booleans())
    size = len(numbers)
    values = st.lists(st.floats(0.125, 8), min_size=size, max_size=size)
    warmup = draw(st.integers(0, 1000))
    return EarlyExitConfig(
        exit_layer_nums=tuple(numbers),
        pre_exit=pre_exit,
        use_exit_norm=draw(st.booleans()) and not shares,
        use_exit_mlp=draw(st.booleans()) and not (pre_exit or shares),
        use_exit_block=draw(st.booleans()) and not shares,
        untie_exit_output_weights=draw(st.booleans()) and not shares,
        use_exit_gate=draw(st.booleans()),
        share_final_head=shares,
        exit_layer_weight=tuple(draw(values)),
        exit_layer_weight_init=tuple(draw(values)) if warmup else (),
        exit_layer_weight_warmup_iters=warmup,
        exit_layer_weight_warmup_style=draw(st.sampled_from(["linear", "cosine"][: 1 + warmup])),
        exit_layer_temperature=tuple(draw(values)),
        use_dynamic_exit_layer_weight=draw(st.booleans()),
    )


@given(config=configs())
def test_round_trip_through_json(config):
    assert EarlyExitConfig(**json.loads(json.dumps(config.to_dict()))) == config


@given(config=configs())
def test_round_trip_through_arguments(config):
    assert EarlyExitConfig.from_attributes(SimpleNamespace(**config.to_dict(), other=1)) == config


def test_absent_and_empty_attributes_keep_defaults():
    source = SimpleNamespace(exit_layer_nums=[3], exit_layer_weight=[], pre_exit=None)
    assert EarlyExitConfig.from_attributes(source) == EarlyExitConfig(exit_layer_nums=(3,))


def test_lists_are_taken_and_kept_immutable():
    config = EarlyExitConfig(exit_layer_nums=[1, 2], exit_layer_weight=[0.5, 0.5])
    assert config.exit_layer_nums == (1, 2)
    assert hash(config) == hash(
        EarlyExitConfig(exit_layer_nums=(1, 2), exit_layer_weight=(0.5,) * 2)
    )
    with pytest.raises(AttributeError):
        config.pre_exit = True


def test_answers_of_exits():
    message = refusal(exit_layer_nums=(1,), exit_vocab_size=1)
    assert message == "--exit-vocab-size 1 is out of range, allowed: 2 or more"
    message = refusal(exit_layer_nums=(1,), exit_vocab_size=9, untie_exit_output_weights=True)
    assert message.startswith("--exit-vocab-size cannot be combined with --untie-exit-output")
    config = EarlyExitConfig(exit_layer_nums=(1,), exit_vocab_size=9)
    config.validate(4, 9)
    with pytest.raises(ValueError, match=r"^--exit-vocab-size 9 .* allowed: 2 to the 8 tokens"):
        config.validate(4, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_exit_norm", True),
        ("use_exit_mlp", True),
        ("use_exit_block", True),
        ("untie_exit_output_weights", True),
        ("exit_vocab_size", 9),
    ],
)
def test_a_shared_head_has_no_parts_of_its_own(field, value):
    message = refusal(exit_layer_nums=(1,), share_final_head=True, **{field: value})
    flag = f"--{field.replace('_', '-')}" + ("" if value is True else f" {value}")
    assert message.startswith(f"--share-final-head cannot be combined with {flag}: ")
    config = EarlyExitConfig(exit_layer_nums=(1,), share_final_head=True)
    assert config.head_flags == "--share-final-head"
    assert not config.head_parts


def test_a_gate_is_beside_the_branch():
    config = EarlyExitConfig(exit_layer_nums=(1,), share_final_head=True, use_exit_gate=True)
    assert config.head_flags == "--use-exit-gate --share-final-head"
    assert [part.module for part in config.head_parts] == ["gate"]
    assert config.beside_parts == config.head_parts
    assert not config.branch_parts
    assert refusal(use_exit_gate=True).startswith("--use-exit-gate has no effect without")


@pytest.mark.parametrize(
    ("pre_exit", "stages"), [(False, (0, 0, 1, 1, 2)), (True, (0, 1, 1, 2, 2))]
)
def test_exits_lie_on_the_stage_of_their_layer(pre_exit, stages):
    layers = tuple(position + pre_exit for position in (1, 2, 3, 4, 5))
    exits = EarlyExitConfig(exit_layer_nums=layers, pre_exit=pre_exit)
    assert exits.stages((2, 2, 3)) == stages
