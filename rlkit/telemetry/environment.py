"""environment.json: what a run ran on, without names of users and hosts. Secrets taken out of recipes."""

import json
import os
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import rlkit
from rlkit.telemetry.names import REPORT

# Keys of secrets, after any prefix; eos_token and the like are none.
_SECRET = re.compile(
    r"(?i)(?:.*[_.+=-])?(?:api_?key|secret|password|passwd|credentials?|private_?key|authorization"
    r"|(?:hf|access|auth|api|bearer)_?token|(?<!_)token)"
)
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


def redact(value: Any, key: str = "") -> Any:
    """Plain containers without logins in URLs, and with *** for whatever a secret key holds."""
    if isinstance(value, Mapping):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if value and _SECRET.fullmatch(key):
        return "***"
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return _URL_LOGIN.sub("***@", value) if isinstance(value, str) else value


def _git(*arguments: str) -> str | None:
    """Output of git on rlkit's own source folder; None where git or the repository is missing."""
    command = ["git", "-C", str(Path(rlkit.__file__).parent), *arguments]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, timeout=10.0).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def peak_memory_gb() -> float:
    """Largest resident set so far on a CPU, largest allocation on a GPU, in GB (1e9 bytes)."""
    import torch  # here, because `rlkit report` should not pay for it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def write_environment(run_dir: Path) -> None:
    """Write versions, machine and commit of rlkit's source (null for an installed wheel) into a run folder."""
    import torch

    installed = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions() if d.name}
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    # A wheel may lie inside somebody else's repository, hence the question whether git tracks rlkit.
    tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = {"commit": _git("rev-parse", "HEAD"), "modified": bool(_git("status", "--porcelain", "-uno"))}
    found = {
        "versions": {"python": platform.python_version(), "rlkit": rlkit.__version__}
        | {name: installed[name] for name in REPORT["packages"] if name in installed},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "model": model[1].strip() if model else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        },
        "devices": [
            {"name": d.name, "memory_gb": round(d.total_memory / 1e9, 1), "cuda": torch.version.cuda} for d in gpus
        ],
        "git": commit if tracked else None,
    }
    (run_dir / "environment.json").write_text(json.dumps(found, indent=2) + "\n")
