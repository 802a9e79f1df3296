"""Components by import path: what is refused, and that nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlkit.config.components import build, converted, import_target, validate
from rlkit.errors import ConfigError

Plugin = Callable[[str], str]
Refused = Callable[..., AbstractContextManager[None]]

PIECE = """
    from dataclasses import dataclass, field
    from typing import ClassVar

    @dataclass(frozen=True, slots=True)
    class Piece:
        kind: ClassVar[str] = "piece"
        width: int
        rate: float = 0.5
        names: tuple[str, ...] = ()
        inner: dict | None = None
        pieces: tuple = ()
        cache: dict = field(default_factory=dict, init=False)

        def __post_init__(self):
            if self.rate < 0:
                raise ValueError("rate < 0")

        class Nested:
            def __init__(self, size: int):
                self.size = size

    def function(sample, *, power: int = 1):
        return power

    def anything(**settings):
        return settings

    NUMBER = 3
"""


@pytest.fixture
def module(plugin: Plugin) -> str:
    return plugin(PIECE)


def test_build_gives_the_dataclass(module: str) -> None:
    piece = build({"_target_": f"{module}.Piece", "width": 2, "names": ["a", "b"]}, key="x")
    assert (piece.width, piece.rate, piece.names) == (2, 0.5, ("a", "b"))
    assert hash(piece.names)


def test_functions_and_open_ended_callables(module: str, refused: Refused) -> None:
    assert build({"_target_": f"{module}.anything", "a": 1}, key="x") == {"a": 1}
    assert validate({"_target_": f"{module}.function", "sample": 1, "power": 2}, "x") == {"sample": 1, "power": 2}
    with refused("x.weight", "no setting"):
        validate({"_target_": f"{module}.function", "weight": 1.0}, "x")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"width": 1, "rat": 2}, ("piece.rat", "Did you mean 'rate'?", "one of width, rate")),
        ({"width": 1, "cache": {}}, ("piece.cache", "no setting")),
        ({"width": 1, "kind": "x"}, ("piece.kind", "no setting")),
        ({}, ("piece", "needs the setting width")),
        ({"width": "3"}, ("piece.width", "expected: integer")),
        ({"width": True}, ("piece.width", "expected: integer")),
        ({"width": 1, "rate": "x"}, ("piece.rate", "expected: number")),
        ({"width": 1, "names": "ab"}, ("piece.names", "list of text")),
        ({"width": 1, "names": [1]}, ("piece.names", "list of text")),
        ({"width": 1, "rate": -1}, ("piece", "ValueError: rate < 0")),
        ({"width": 1, "inner": {"_target_": "nowhere.X"}}, ("piece.inner._target_", "nowhere")),
        ({"width": 1, "pieces": [{"_target_": "nowhere.X"}]}, ("piece.pieces._target_", "nowhere")),
    ],
)
def test_wrong_settings(module: str, settings: dict[str, Any], parts: tuple[str, ...], refused: Refused) -> None:
    with refused(*parts):
        build({"_target_": f"{module}.Piece", **settings}, key="piece")


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("nowhere_at_all.Piece", ("No module named 'nowhere_at_all'",)),
        ("{module}.Pice", ("has no 'Pice'", "did you mean 'Piece'?")),
        ("{module}.NUMBER", ("int, not a class or function",)),
        ("builtins.dict", ("not a class or function with named settings",)),
        ("Piece", ("not an import path",)),
        (3, ("not an import path",)),
        ("{broken}.Piece", ("RuntimeError: broken on import",)),
        ("{lacking}.Piece", ("No module named 'not_installed_here'",)),
    ],
)
def test_target_that_is_not_to_be_had(
    plugin: Plugin, module: str, target: Any, parts: tuple[str, ...], refused: Refused
) -> None:
    names = {
        "module": module,
        "broken": plugin("raise RuntimeError('broken on import')"),
        "lacking": plugin("import not_installed_here"),
    }
    path = target.format(**names) if isinstance(target, str) else target
    with refused("piece._target_", *parts):
        import_target(path, "piece")


@pytest.mark.parametrize("component", [None, 3, "a.b", {}, {"target": "a.b"}])
def test_what_is_no_component(component: Any, refused: Refused) -> None:
    with refused("thing", "not a component", "_target_"):
        validate(component, "thing")


def test_plugin_that_refuses_is_named_with_its_key(plugin: Plugin, refused: Refused) -> None:
    module = plugin(
        """
        from rlkit.errors import ConfigError
        def piece(rate: float = 0.0):
            raise ConfigError("too fast", key="rate", value=rate, expected="less")
        """
    )
    with refused("algorithm.loss", "rate = 2.0: too fast", "expected: less"):
        build({"_target_": f"{module}.piece", "rate": 2.0}, key="algorithm.loss")


def fits(value: Any, annotation: Any) -> bool:
    try:
        converted(value, annotation, "key", "a.Target")
    except ConfigError:
        return False
    return True


SAMPLES: dict[Any, list[Any]] = {
    bool: [True, False],
    int: [0, -3],
    float: [0.5, 2],
    str: ["", "x"],
    type(None): [None],
    list[int]: [[], [1, 2]],
    dict[str, float]: [{}, {"a": 1.5}],
    tuple[int, str]: [[1, "a"]],
    Literal["on", "off"]: ["on", "off"],
}


@pytest.mark.parametrize("annotation", SAMPLES, ids=str)
def test_fits_accepts_its_own_and_optional(annotation: Any) -> None:
    for value in SAMPLES[annotation]:
        assert fits(value, annotation)
        assert fits(value, Optional[annotation])  # noqa: UP045
    assert fits(None, annotation) == (annotation is type(None))


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_exactly_the_right_simple_types_fit(value: Any) -> None:
    # YAML's integer may stand for a float; nothing else is converted.
    expected = {type(value), float} if type(value) is int else {type(value)}
    simple = (bool, int, float, str, type(None))
    assert {kind for kind in simple if fits(value, kind)} == expected
    assert fits(value, Any) and fits(value, Sequence) is False


def test_containers() -> None:
    assert fits({"a": [1]}, Mapping[str, list[int]])
    assert not fits({"a": ["x"]}, Mapping[str, list[int]])
    assert not fits([1], Mapping[str, int])
    assert not fits([1, "a", 2], tuple[int, str])
    assert not fits("on ", Literal["on"])
    assert fits(3, "an annotation nobody understands")
    assert fits({"_target_": "a.B"}, Plugin) and fits("x", Path | None)


def test_user_code_in_the_working_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from rlkit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    name = "config_plugin_of_the_working_folder"
    (tmp_path / f"{name}.py").write_text("def loss():\n    return None\n")
    with pytest.raises(ConfigError):
        import_target(f"{name}.loss", "x")
    main(["check", "recipe=quickstart", f"algorithm.loss={{_target_: {name}.loss}}"])
    assert import_target(f"{name}.loss", "x") is sys.modules.pop(name).loss
