"""Whether the installed TRL really logs every name that aliases.yaml gives as TRL's; exit status 1 if not.

Run: python benchmarks/peers/trl_names.py   (needs trl; grad_norm and learning_rate are logged by transformers' Trainer)
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from rlkit.telemetry.names import ALIASES


def source(package: str, file: str) -> str:
    """Text of a module, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8")


def main() -> int:
    text = source("trl", "trainer/grpo_trainer.py") + source("transformers", "trainer.py")
    names = [theirs["trl"].replace("<name>", "{reward_func_name}") for theirs in ALIASES.values() if "trl" in theirs]
    missing = [name for name in names if f'"{name}"' not in text]
    print(f"{len(names)} names of TRL, not found: {missing or 'none'}")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
