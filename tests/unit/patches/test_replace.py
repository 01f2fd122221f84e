"""Names are replaced only where they are what is expected."""

from __future__ import annotations

import types

import pytest

from megatron.early_exit.patches.replace import replace, replaced, wrap


def owner() -> types.SimpleNamespace:
    return types.SimpleNamespace(
        __name__="lib", function=lambda a, b=1: (a, b), builtin=max, kind=int, table={}
    )


@pytest.mark.parametrize(
    ("name", "value", "parameters"),
    [
        ("function", lambda a, b: None, None),
        ("function", lambda *args: None, "a, b"),
        ("function", lambda *args: None, "a, ..."),
        ("function", lambda *args: None, "a, b, ..."),
        ("function", lambda *args: None, "..."),
        ("builtin", lambda: None, None),
        ("kind", float, None),
        ("table", {1: 2}, None),
    ],
)
def test_what_is_expected_is_replaced(name, value, parameters) -> None:
    lib = owner()
    original = getattr(lib, name)
    assert replace(lib, name, value, parameters) is original
    assert getattr(lib, name) is value


@pytest.mark.parametrize(
    ("name", "value", "parameters", "said"),
    [
        ("gone", lambda a, b: None, None, "not there, expected: function;"),
        ("function", lambda a, c: None, None, r"function\(a, b\), expected: function\(a, c\);"),
        ("function", lambda a: None, None, r"function\(a, b\), expected: function\(a\);"),
        ("function", lambda a: None, "a", r"function\(a, b\), expected: function\(a\);"),
        (
            "function",
            lambda a: None,
            "b, ...",
            r"function\(a, b\), expected: function\(b, \.\.\.\);",
        ),
        (
            "function",
            lambda a: None,
            "a, b, c, ...",
            r"function\(a, b\), expected: function\(a, b, c, \.\.\.\);",
        ),
        ("function", lambda: None, "", r"function\(a, b\), expected: function\(\);"),
        ("function", 7, None, "function, expected: int;"),
        ("kind", lambda: None, None, "class, expected: function;"),
        ("table", lambda: None, None, "dict, expected: function;"),
        ("table", [], None, "dict, expected: list;"),
    ],
)
def test_what_is_not_expected_stays_and_is_an_error(name, value, parameters, said) -> None:
    lib = owner()
    before = dict(vars(lib))
    with pytest.raises(
        RuntimeError, match=rf"^lib\.{name} is {said} this version .* is not supported$"
    ):
        replace(lib, name, value, parameters)
    assert vars(lib) == before


def test_wrapped_function_calls_the_original_and_keeps_its_signature() -> None:
    lib = owner()
    wrap(lib, "function", lambda function: lambda *args: ["before", function(*args)], "a, ...")
    assert lib.function(3) == ["before", (3, 1)]
    with pytest.raises(RuntimeError, match="expected"):
        wrap(lib, "function", lambda function: function, "b")
    with pytest.raises(RuntimeError, match="expected: function;"):
        wrap(lib, "kind", lambda function: function)


def test_temporary_change_ends_also_with_an_error() -> None:
    lib = owner()
    table = lib.table
    with pytest.raises(KeyError), replaced(lib, "table", {1: 2}):
        lib.table[3]
    assert lib.table is table
    with replaced(lib, "table", {1: 2}):
        assert lib.table == {1: 2}
    assert lib.table is table
    with pytest.raises(RuntimeError, match="not supported"), replaced(lib, "gone", {}):
        pass
