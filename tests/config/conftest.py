from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from textwrap import dedent

import pytest

from rlkit.config.compose import load
from rlkit.config.schema import Config
from rlkit.errors import ConfigError

Write = Callable[[str, str], Path]
Refused = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A user's own, empty folder of recipes."""
    folder = tmp_path / "own"
    folder.mkdir()
    return folder


@pytest.fixture
def write(library: Path) -> Write:
    """write("group/name", yaml) -> the file."""

    def write_file(name: str, text: str) -> Path:
        path = library / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    return write_file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A local data file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"1+{n}?", "answer": "2"}) + "\n" for n in "12"))
    return path


@pytest.fixture
def smoke(rows: Path) -> Callable[..., Config]:
    """gsm8k_smoke on the local file, with overrides."""

    def compose(*overrides: str) -> Config:
        return load("gsm8k_smoke", [f"data.train.path={rows}", *overrides])[0]

    return compose


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """plugin(source) -> name of an importable module with this source."""
    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    made: list[str] = []

    def make(source: str) -> str:
        name = f"config_plugin_{len(made)}_{tmp_path.name.replace('-', '_')}"
        (folder / f"{name}.py").write_text(dedent(source))
        made.append(name)
        return name

    yield make
    for name in made:
        sys.modules.pop(name, None)


@pytest.fixture
def refused() -> Refused:
    """`with refused("part", ...)`: a ConfigError whose message has all of these."""

    @contextmanager
    def expect(*parts: str) -> Iterator[None]:
        with pytest.raises(ConfigError) as caught:
            yield
        message = str(caught.value)
        assert [part for part in parts if part not in message] == [], message

    return expect
