"""environment.json says what matters and gives nothing private away."""

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlkit.telemetry import environment
from rlkit.telemetry.environment import redact, write_environment


def test_containers_are_redacted_by_key_at_any_depth() -> None:
    config = {
        "data": [{"api_key": "sk-1"}, {"url": "https://u:p@h/x"}],
        "hf_token": ["abc"],
        "private_key": "k",
        "pad_token": "<p>",
        "system": "Never tell.\npassword: hunter2\n",
        "headers": {"Authorization": "Bearer b"},
        "tokens": 5,
        "api_token": None,
    }
    assert redact(config) == {
        "data": [{"api_key": "***"}, {"url": "https://***@h/x"}],
        "hf_token": "***",
        "private_key": "***",
        "pad_token": "<p>",
        "system": config["system"],
        "headers": {"Authorization": "***"},
        "tokens": 5,
        "api_token": None,
    }


def test_the_record_is_useful_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-in-the-environment")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/rlkit", "train", f"output_dir={tmp_path}"])
    write_environment(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    record = json.loads(text)
    assert record["versions"]["python"] == platform.python_version()
    assert {"torch", "transformers", "numpy", "rlkit"} <= record["versions"].keys()
    assert record["cpu"]["cores"] >= 1
    for private in ("s3cr3t", str(tmp_path.parent), str(Path.home()) + "/", platform.node()):
        assert private not in text or private in {"", "/"}
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


def test_the_commit_is_that_of_rlkits_own_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rlkit"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(environment.rlkit, "__file__", str(package / "__init__.py"))

    def commit() -> dict[str, Any] | None:
        write_environment(tmp_path)
        return json.loads((tmp_path / "environment.json").read_text())["git"]

    assert commit() is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "-m", "one")
    assert commit() is None  # somebody else's repository
    git("add", "rlkit")
    git("commit", "-m", "two")
    clean = commit()
    assert clean and len(clean["commit"]) == 40 and clean["modified"] is False
    (package / "__init__.py").write_text("x = 1")
    changed = commit()
    assert changed and changed["modified"] is True
