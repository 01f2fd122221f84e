"""What is written behind a model's name decides how exits are used."""

import pytest

from megatron.early_exit.server.http.errors import ApiError
from megatron.early_exit.server.model_names import ServedModel
from megatron.early_exit.server.settings import ExitSettings

DEFAULTS = ExitSettings(mode="full", draft_exit_layer=4, num_draft_tokens=2)
MODEL = ServedModel("m", DEFAULTS, (2, 4))
EARLY = {"mode": "early_exit"}


@pytest.mark.parametrize(
    ("layers", "depths", "given", "drafter"),
    [
        ((), 0, {}, None),
        ((2, 4), 0, {}, "2"),
        ((2, 4), 0, {"draft_method": "auto"}, "auto"),
        ((2,), 0, {"draft_method": "auto"}, "2"),
        ((2, 4), 1, {}, "auto"),
        ((2, 4), 1, {"draft_exit_layer": 4}, "4"),
        ((2, 4), 1, {"draft_method": "exit"}, "2"),
        ((2, 4), 1, {"draft_method": "mtp"}, "mtp"),
        ((2, 4), 1, {"draft_method": "auto", "draft_exit_layer": 4}, "auto"),
        ((), 1, {}, "mtp"),
        ((), 1, {"draft_method": "auto"}, "mtp"),
    ],
)
def test_pages_are_told_what_drafts(layers, depths, given, drafter):
    assert ServedModel("m", ExitSettings(mode="full", **given), layers, depths).drafter == drafter


def test_one_exit_alone_is_no_choice():
    def methods(layers: tuple[int, ...], depths: int) -> tuple[str, ...]:
        return ServedModel("m", DEFAULTS, layers, depths).draft_methods

    assert [methods(layers, 0) for layers in ((), (2,), (2, 4))] == [
        (),
        ("exit",),
        ("exit", "auto"),
    ]
    assert [methods(layers, 1) for layers in ((), (2,))] == [("mtp",), ("exit", "mtp", "auto")]


@pytest.mark.parametrize("name", [None, "m"])
def test_the_name_alone_decides_nothing(name):
    assert MODEL.settings(name) == DEFAULTS


@pytest.mark.parametrize(
    ("end", "decided"),
    [
        ("full", {"mode": "full"}),
        ("lossless", {"mode": "self_speculative"}),
        (
            "exit=4",
            {
                **EARLY,
                "early_exit_threshold": 0.0,
                "exit_layers": (4,),
                "exit_threshold_decay": 0.0,
                "exits_pay_at": 0,
            },
        ),
        ("threshold=0.25", {**EARLY, "early_exit_threshold": 0.25}),
        ("threshold=1", {**EARLY, "early_exit_threshold": 1.0}),
        ("threshold=2.5e-1", {**EARLY, "early_exit_threshold": 0.25}),
    ],
)
def test_the_end_of_a_name_decides(end, decided):
    found = MODEL.settings(f"m:{end}")
    assert {name: getattr(found, name) for name in decided} == decided
    assert found.decided == decided.keys()
    assert found.model == f"m:{end}"
    # What it does not decide stays the server's.
    assert (found.draft_exit_layer, found.num_draft_tokens) == (4, 2)


@pytest.mark.parametrize(
    "name",
    [
        *("", "n", "M", "m:", "m:fast", "m:full:full", "m:exit=3", "m:exit=04", "m:threshold="),
        *("m:threshold=1.1", "m:threshold=-0.1", "m:threshold=nan", "m:threshold=" + "1" * 400),
    ],
)
def test_other_names_do_not_exist(name):
    with pytest.raises(ApiError) as refused:
        MODEL.settings(name)
    error = refused.value.body.error
    assert (refused.value.status, error.param, error.code) == (404, "model", "model_not_found")
    assert error.message.endswith(f"allowed: {', '.join(MODEL.names())}")
    assert len(error.message) < 400


def test_every_listed_name_exists():
    assert MODEL.names() == ["m", "m:full", "m:lossless", "m:threshold=0.8", "m:exit=2", "m:exit=4"]
    for name in MODEL.names():
        MODEL.settings(name)


def test_a_model_without_exits_has_no_names_for_them():
    plain = ServedModel("m", DEFAULTS, ())
    assert plain.names() == ["m", "m:full"]
    for end in ("lossless", "threshold=0.5", "exit=2"):
        with pytest.raises(ApiError):
            plain.settings(f"m:{end}")
