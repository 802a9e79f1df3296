from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from rlkit.config.schema import DatasetConfig
from rlkit.learner.model import character_tokenizer

# Wall-clock deadlines fail on a busy machine, not on a wrong program.
settings.register_profile("data", deadline=None)
settings.load_profile("data")

LETTERS = "0123456789+-=;#:?. \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<|>_"


@pytest.fixture(scope="session")
def letters() -> str:
    return LETTERS


@pytest.fixture(scope="session")
def tokenizer(letters: str) -> Any:
    return character_tokenizer(letters)


@pytest.fixture
def dataset(tmp_path: Path) -> Callable[..., DatasetConfig]:
    """Make a config of a JSONL file with the given rows."""

    def make(rows: list[dict[str, Any]], **settings: Any) -> DatasetConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        source = {"_target_": "rlkit.data.sources.LocalFile", "path": str(path)}
        return DatasetConfig(source=source, **settings)

    return make
