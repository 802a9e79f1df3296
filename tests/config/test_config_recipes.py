"""Every shipped recipe and option is sound; the wheel ships them; the reference is up to date."""

from __future__ import annotations

import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlkit.config.compose import SHIPPED, Library, load
from rlkit.config.verify import verify
from rlkit.learner.check import batch_table

ROOT = Path(__file__).parents[2]
LIBRARY = Library()


def local_data(recipe: str, rows: Path) -> list[str]:
    """The recipe whose data are the user's gets some."""
    keys = {"gsm8k_smoke": ["train"], "gsm8k_solutions": ["train", "eval.test"]}
    return [f"data.{key}.path={rows}" for key in keys.get(recipe, [])]


@pytest.mark.parametrize("recipe", LIBRARY.options(""))
def test_recipe(recipe: str, rows: Path) -> None:
    config, _ = load(recipe, local_data(recipe, rows))
    verify(config)
    assert config.name.replace("-", "_") == recipe
    assert all(value >= 0 for _, value, _ in batch_table(config))


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={option}"
        for group in LIBRARY.groups()
        if group.split("/")[0] not in ("model", "data", "reward")  # these go together
        for option in LIBRARY.options(group)
    ],
)
def test_option_fits_the_quickstart(choice: str) -> None:
    of_noise = choice.endswith(("backward", "forward"))  # they need a verifier of right and wrong only
    partners = ["reward=jepo"] if choice in ("algorithm=jepo", "algorithm/advantage=jepo") else []
    verify(load("quickstart_noise" if of_noise else "quickstart", [choice, *partners])[0])


@pytest.mark.parametrize(
    ("reward", "algorithm"),
    [
        *((r, "rloo") for r in ("logprob", "avg_logprob", "prob", "avg_prob", "nover")),
        ("jepo", "jepo"),
        ("rlpr", "grpo"),
    ],
)
def test_likelihood_rewards_fit_the_quickstart(reward: str, algorithm: str) -> None:
    verify(load("quickstart_likelihood", [f"reward={reward}", f"algorithm={algorithm}"])[0])


def test_every_option_is_reached(rows: Path) -> None:
    """No file that no recipe and no group choice can use."""
    groups = set(LIBRARY.groups())
    assert {"algorithm", "algorithm/loss", "model", "data", "reward"} <= groups
    used = {path.relative_to(SHIPPED).parent.as_posix() for path in SHIPPED.rglob("*.yaml")} - {"."}
    assert used == groups


def test_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "config.md").read_text()
    markdown = runpy.run_path(str(ROOT / "docs" / "generate" / "config.py"))["markdown"]
    assert written == markdown(), "run: python docs/generate/config.py > docs/config.md"


@pytest.mark.slow
def test_wheel_holds_packages_and_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in files:
        if name.startswith(("rlkit/", "rewards/", "recipes/")) or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--no-index", "-q", "-w", str(tmp_path), str(source)], check=True, timeout=200)
    (wheel,) = tmp_path.glob("rlkit_rlvr-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in ("rlkit", "rewards", "recipes")
        for suffix in ("*.py", "*.yaml", "*.j2")
        for path in (ROOT / package).rglob(suffix)
    }
    assert wanted <= held
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "docs"))]
