"""Import arrows of docs/architecture.md: cli -> processes -> pieces -> config and types."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASE = {"types", "errors", "settings", "config"}
PIECES = BASE | {"data", "algorithms", "budget", "buffer", "telemetry"}
PROCESSES = PIECES | {"rollout", "learner", "evaluation"}
MAY_IMPORT = {
    "types": {"types"},
    "errors": {"errors"},
    "settings": {"settings", "errors"},
    "config": BASE,
    "data": BASE | {"data"},
    "algorithms": {"algorithms", "types", "errors", "settings"},
    "budget": {"budget", "types", "errors", "settings"},
    "buffer": {"buffer", "types", "errors"},
    "telemetry": BASE | {"telemetry"},
    "experiments": BASE | {"telemetry", "experiments"},
    "rollout": BASE | {"rollout", "buffer"},
    "evaluation": PIECES | {"rollout", "evaluation", "learner"},
    "learner": PROCESSES,
    "launch": PROCESSES | {"launch"},
    "cli": PROCESSES | {"cli", "launch"},
}
HEAVY = {"torch", "transformers", "accelerate"}


def imported(path: Path, *, whole: bool) -> set[str]:
    """Modules a file imports; only at its top level unless `whole`, never those for type checkers."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree)) if whole else list(tree.body)
    if whole:
        guards = [n for n in nodes if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        hidden = {id(inner) for guard in guards for inner in ast.walk(guard)}
        nodes = [n for n in nodes if id(n) not in hidden]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_arrows_point_one_way(part):
    place = ROOT / "rlkit" / part
    files = list(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    assert files
    for path in files:
        for name in imported(path, whole=True):
            if name.startswith("rlkit.") and name != "rlkit.__version__":
                assert name.split(".")[1] in MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {name}"


def test_rewards_stands_alone():
    for path in (ROOT / "rewards").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path, whole=True)}
        assert not roots & ({"rlkit"} | HEAVY), path


def test_config_and_the_command_line_start_without_torch():
    for path in [*(ROOT / "rlkit" / "config").rglob("*.py"), ROOT / "rlkit" / "cli.py", *(ROOT / "rlkit").glob("*.py")]:
        assert not {name.split(".")[0] for name in imported(path, whole=False)} & HEAVY, path
