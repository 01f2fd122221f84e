"""Profiles of layers: the lines between what was measured, and their files."""

import json
from dataclasses import asdict, replace

import pytest

from megatron.early_exit.planner.costs.layer_profile import LayerProfile
from tests.helpers.derived_profile import derived_profile


def profile_with(layer_forward_s: dict[int, float]) -> LayerProfile:
    profile = derived_profile(tuple(layer_forward_s))
    by_size = {
        size: {**profile.seconds_by_size[size], "layer": {"forward": seconds, "backward": 1.0}}
        for size, seconds in layer_forward_s.items()
    }
    return replace(profile, seconds_by_size=by_size)


# --- between sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "asked", "expected"),
    [
        ({1: 3.0, 2: 5.0, 4: 8.0}, 2, 5.0),
        ({1: 3.0, 2: 5.0, 4: 8.0}, 3, 6.5),
        # Outside, a sequence takes as much as in the nearest.
        ({1: 3.0, 2: 5.0, 4: 8.0}, 8, 16.0),
        ({4: 8.0, 8: 20.0}, 1, 2.0),
        ({2: 5.0}, 6, 15.0),
        # Noise makes nothing cheap, nor negative.
        ({1: 3.0, 2: 1.0}, 4, 2.0),
    ],
)
def test_times_lie_on_lines(measured, asked, expected):
    profile = profile_with(dict(reversed(measured.items())))
    assert profile.seconds("layer", "forward", asked) == pytest.approx(expected)


def test_only_sizes_between_measured_ones_are_measured():
    profile = profile_with({2: 5.0, 8: 20.0})
    assert [n for n in (1, 2, 4, 8, 16) if profile.has_measured(n)] == [2, 4, 8]


# --- files ---------------------------------------------------------------------------------------


def test_files_hold_profiles(tmp_path):
    profile = derived_profile((4, 1))
    profile.write(tmp_path / "profile.json")
    assert LayerProfile.read(tmp_path / "profile.json") == profile


def without(content: dict, *names: str) -> dict:
    return {name: value for name, value in content.items() if name not in names}


def with_layer(content: dict, layer: object) -> dict:
    return content | {"seconds_by_size": {"1": content["seconds_by_size"][1] | {"layer": layer}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [c], "holds a list, allowed: an object"),
        (lambda c: without(c, "dtype"), "it has machine, shape, exit_heads, seconds_by_size, "),
        (
            lambda c: c | {"shape": {"hidden_size": 8}},
            "shape has hidden_size, allowed: hidden_size",
        ),
        (lambda c: c | {"seconds_by_size": {}}, "it has no times"),
        (lambda c: c | {"seconds_by_size": {"0": {}}}, "or of microbatches below 1"),
        (
            lambda c: c | {"seconds_by_size": {"x": {}}},
            "is not a profile of layers: invalid literal",
        ),
        (
            lambda c: c | {"seconds_by_size": {"1": {}}},
            "microbatches of 1 has nothing, allowed: la",
        ),
        (lambda c: with_layer(c, {"forward": 1}), "layer with microbatches of 1 has forward, "),
        (
            lambda c: with_layer(c, {"forward": 0, "backward": 1}),
            "the forward of layer with microbatches of 1 takes 0 s, allowed: above 0",
        ),
        (lambda c: with_layer(c, {"forward": 1, "backward": None}), "takes None s, allowed: above"),
        (lambda c: with_layer(c, {"forward": 1, "backward": float("nan")}), "takes nan s, allowed"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(change(asdict(derived_profile((1,))))))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        LayerProfile.read(path)
    assert message in str(refusal.value)
