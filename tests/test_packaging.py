"""What a wheel and the image hold: recipes and the report's template travel with the code, tests do not."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_ships_recipes_and_templates_and_rlkit_runs_from_any_folder(tmp_path):
    source = tmp_path / "source"  # a copy: setuptools would leave build/ in the tree, and read it again
    for part in ("rlkit", "rewards", "recipes"):
        shutil.copytree(ROOT / part, source / part)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source / part)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, timeout=120, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"recipes/{p.relative_to(ROOT / 'recipes').as_posix()}" for p in (ROOT / "recipes").rglob("*.yaml")}
    data = (
        p for part in ("rlkit", "rewards") for p in (ROOT / part).rglob("*") if p.suffix in (".j2", ".yaml", ".txt")
    )
    templates = {p.relative_to(ROOT).as_posix() for p in data}
    assert recipes and recipes <= names
    assert templates <= names
    assert not any(name.startswith("tests") for name in names)
    unpacked = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(unpacked)
    check = [sys.executable, "-m", "rlkit", "check", "recipe=quickstart"]
    environment = {"PYTHONPATH": str(unpacked), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    out = subprocess.run(check, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert "Nothing was started" in out.stdout


def test_the_dockerfile_names_what_is_there():
    """Paths it copies, extras it installs, arguments it uses; nothing it copies is ignored."""
    text = (ROOT / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ignored = (ROOT / ".dockerignore").read_text().split()
    copied = [path for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for path in line.split()[:-1]]
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", project["project"]["readme"], "LICENSE", "constraints-cpu.txt"} == set(copied)
    assert all((ROOT / path).exists() and path not in ignored for path in copied)
    chosen = {extra for names in re.findall(r"\bEXTRAS=([\w,-]+)", text) for extra in names.split(",")}
    assert {"wandb", "vllm"} <= chosen <= project["project"]["optional-dependencies"].keys()
    declared = set(re.findall(r"^ARG (\w+)", text, re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)\}", text)) == declared
    assert set(re.findall(r"--build-arg (\w+)=", text)) <= declared
    assert project["project"]["scripts"].keys() == {"rlkit"} and 'ENTRYPOINT ["rlkit"]' in text
