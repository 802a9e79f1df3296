"""docs/tutorial.md works as it is written: its class and its recipe are accepted, and the class does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rlkit.algorithms.base import AdvantageInputs
from rlkit.cli import main
from rlkit.config.components import import_target

TEXT = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()


def test_the_tutorials_class_and_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {kind: body for kind, body in re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)}
    (tmp_path / "my_ideas.py").write_text(blocks["python"])
    (tmp_path / "my_recipes" / "algorithm").mkdir(parents=True)
    (tmp_path / "my_recipes" / "algorithm" / "range.yaml").write_text(blocks["yaml"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert (
        main(["check", "recipe=quickstart", "algorithm.advantage={_target_: my_ideas.RangeNormalizedAdvantage}"]) == 0
    )
    assert main(["check", "recipe=quickstart", "--config-dir", "my_recipes", "algorithm=range"]) == 0
    advantage = import_target("my_ideas.RangeNormalizedAdvantage", "tutorial")()
    scores = torch.tensor([1, 0, 0, 3, 0.1, 0.1, 0.1], dtype=torch.float64)
    inputs = AdvantageInputs(scores=scores, group=torch.tensor([0, 0, 0, 0, 1, 1, 1]), lengths=torch.ones(7))
    expected = torch.tensor([0, -1 / 3, -1 / 3, 2 / 3, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(advantage(inputs), expected)
    assert (advantage(inputs)[4:] == 0).all()
