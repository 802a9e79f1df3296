"""environment.json: what a run ran on, so that its figures can be read later.

Left out on purpose: environment variables, user and host names, absolute paths, secrets.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import rlkit

PACKAGES = [
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "hydra-core",
    "omegaconf",
    "sqlalchemy",
    "msgspec",
    "pyarrow",
    "math-verify",
    "reasoning-gym",
    "datasets",
    "vllm",
    "wandb",
]
GIT_DEADLINE_S = 10.0

_WORDS = (  # eos_token and the like are no secrets
    "(?:api_?key|secret|password|passwd|credentials?|(?:hf|access|auth|api|bearer)_?token|(?<!_)token)"
)
_SECRET = re.compile(rf"(?i)(^|[._-]){_WORDS}$")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_SECRET_LINE = re.compile(rf"(?im)^(\s*(?:[\w.-]*[_.-])?{_WORDS}\s*:[ \t]*)\S.*$")


def redact_argument(argument: str, cwd: Path) -> str:
    """One word of a command line without logins, secrets and absolute paths.

    A path below `cwd` becomes relative to it, another one ".../<last part>".

    Example:
        >>> redact_argument("judge.api_key=abc", Path("/work"))
        'judge.api_key=***'
    """
    key, equals, value = argument.rpartition("=")
    if equals and _SECRET.search(key):
        return f"{key}=***"
    value = _URL_LOGIN.sub("***@", value)
    if value.startswith(("/", "~")):
        path = Path(value)
        inside = path.is_relative_to(cwd)
        value = str(path.relative_to(cwd)) if inside else f".../{path.name}"
    return f"{key}{equals}{value}"


def redact_text(text: str) -> str:
    """YAML text without logins in URLs and without the values of secret keys."""
    return _SECRET_LINE.sub(r"\1'***'", _URL_LOGIN.sub("***@", text))


def _versions() -> dict[str, str]:
    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions() if d.name}
    own = {"python": platform.python_version(), "rlkit": rlkit.__version__}
    return own | {name: installed[name] for name in PACKAGES if name in installed}


def _cpu() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        model = match[1].strip()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out: dict[str, Any] = {"model": model, "cores": os.cpu_count(), "usable_cores": usable}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        out["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1)
    return out


def _devices() -> list[dict[str, Any]]:
    """Accelerators torch sees; empty on a CPU machine."""
    import torch  # here, because `rlkit report` should not pay for it

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    cuda = torch.version.cuda
    return [{"name": d.name, "memory_gb": round(d.total_memory / 1e9, 1), "cuda": cuda} for d in devices]


def _git(*arguments: str) -> str | None:
    """Output of git on rlkit's own source folder; None where git or the repository is missing."""
    command = ["git", "-C", str(Path(rlkit.__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> dict[str, Any] | None:
    """Commit of rlkit's source, and whether tracked files differ from it.

    None where rlkit is not run from a repository that tracks it (an installed wheel may lie inside
    somebody else's repository).
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "modified": bool(changes)} if commit else None


def peak_memory_gb() -> float:
    """Largest resident set so far on a CPU, largest allocation on a GPU, in GB (1e9 bytes)."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def collect_environment(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, machine, commit and command line (default: this process's) as plain JSON types."""
    words = list(sys.argv if argv is None else argv)
    cwd = Path.cwd()
    return {
        "versions": _versions(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "devices": _devices(),
        "git": _commit(),
        "command": [Path(w).name if i == 0 else redact_argument(w, cwd) for i, w in enumerate(words)],
    }


def write_environment(run_dir: Path, argv: Sequence[str] | None = None) -> Path:
    """Write environment.json into a run folder and return its path."""
    path = run_dir / "environment.json"
    path.write_text(json.dumps(collect_environment(argv), indent=2) + "\n")
    return path
