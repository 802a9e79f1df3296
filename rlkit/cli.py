"""The command line: `rlkit train recipe=NAME [key=value ...]` and its sister commands.

Commands are imported when they run: `rlkit report` needs no torch. Bad input: a message on stderr, exit status 2.
"""

import argparse
import ctypes
import errno
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rewards import RewardError
from rlkit import __version__
from rlkit.errors import ConfigError, RlkitError
from rlkit.launch.supervisor import follow

# Command -> what its main takes (a recipe's config, and the command line for processes that it starts; a run folder;
# arguments of its own), where that is, and its help.
COMMANDS = {
    "train": ("processes", "rlkit.launch.run", "train with RL: recipe=NAME [key=value ...]"),
    "learner": ("recipe", "rlkit.learner.train", "only the learner of a run with workers in other processes"),
    "worker": ("recipe", "rlkit.launch.worker", "a rollout worker of such a run, on any machine"),
    "workers": ("processes", "rlkit.launch.workers", "this machine's workers of such a run, started again on failure"),
    "evaluator": ("recipe", "rlkit.launch.evaluator", "the evaluator of such a run, on any machine"),
    "sft": ("recipe", "rlkit.learner.sft", "only the warm start of a recipe"),
    "eval": ("recipe", "rlkit.evaluation.evaluate", "evaluate a checkpoint (or the initial model) on held-out sets"),
    "check": ("recipe", "rlkit.learner.check", "print the resolved config, batch table and memory; start nothing"),
    "sweep": ("recipe", "rlkit.experiments.sweep", "train variants x seeds: key=value,value,... is swept"),
    "check-parity": ("recipe", "rlkit.learner.parity", "compare the engine's log-probs with the learner's"),
    "report": ("run", "rlkit.telemetry.report", "write report.html and plots of a run folder"),
    "buffer": ("run", "rlkit.buffer.inspect", "show what a run's buffer holds"),
    "rollouts": ("arguments", "rlkit.telemetry.rollouts", "read a run's completions"),
    "dashboard": ("arguments", "rlkit.telemetry.dashboard", "make a curated wandb workspace for runs"),
    "compare": ("arguments", "rlkit.experiments.compare", "compare variants over seeds"),
}
# Full, read-only or forbidden disks, and files where folders belong: said in a line, without a traceback.
PLACES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR}
PLACES |= {errno.ENOTDIR, errno.ENAMETOOLONG}
OS_ERROR = re.compile(r"\(os error (\d+)\)")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="rlkit", description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=f"rlkit {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (kind, _, text) in COMMANDS.items():
        own = kind == "arguments"
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=not own)
        if kind == "run":
            command.add_argument("run", type=Path, help="run folder, outputs/NAME")
        if kind in ("recipe", "processes"):
            command.add_argument("overrides", nargs="*", metavar="recipe=NAME [key=value ...]", help="Hydra overrides")
            command.add_argument("--config-dir", type=Path, help="folder with your own recipes, searched first")
        if name == "eval":
            command.add_argument("--checkpoint", type=Path, help="checkpoints/step_N of a run")
        if name == "sweep":
            command.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit status: 0, or after an RlkitError 2, 1 where trying again may help."""
    arguments, status = list(sys.argv[1:] if argv is None else argv), 2
    # Users' components are found where the command runs; behind the installed packages, so that a
    # stray folder called `recipes` there does not replace ours.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return _dispatch(arguments)
    except (RlkitError, RewardError) as error:
        message, status = str(error), 1 if getattr(error, "passing", False) else 2
    except Exception as error:  # safetensors puts the errno into words
        number = error.errno if isinstance(error, OSError) else int((OS_ERROR.findall(str(error)) or [0])[-1])
        if number not in PLACES:
            raise
        where = f": {name}" if (name := getattr(error, "filename", None)) else ""
        message = f"{os.strerror(number)}{where}\n  to mend:  free space, or use a folder you can write to"
    sys.stdout.flush()
    print(f"rlkit: {message}", file=sys.stderr)
    return status


def run() -> None:
    """The process's entry point."""
    follow()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a rank does not outlive its launcher
    status = main()
    if ranks > 1:
        # Of several ranks about one in ten aborts while Python is finalised, in threads of gloo (torch 2.13).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _dispatch(arguments: list[str]) -> int:
    grammar = parser()
    # Overrides may stand before and after options, which argparse's subcommands do not expect.
    options, rest = grammar.parse_known_args(arguments)
    kind, module, _ = COMMANDS[options.command]
    flags = [text for text in rest if text.startswith("-")]
    given: tuple[Any, ...]
    if kind == "arguments":
        given = (arguments[arguments.index(options.command) + 1 :],)
    elif flags or (rest and kind == "run"):
        grammar.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    elif kind == "run":
        given = (options.run,)
    else:
        recipe, overrides = split_recipe([*options.overrides, *rest])
        if options.command == "sweep":
            given = recipe, overrides, options.config_dir, options.jobs
        else:
            from rlkit.config.compose import load
            from rlkit.config.verify import verify

            given = load(recipe, overrides, config_dir=options.config_dir)
            verify(given[0])
            given += (options.checkpoint,) if options.command == "eval" else ()
            given += (arguments[arguments.index(options.command) + 1 :],) if kind == "processes" else ()
    return int(import_module(module).main(*given) or 0)


def split_recipe(texts: Sequence[str]) -> tuple[str, list[str]]:
    """(recipe, the other overrides); "" where none is given. ConfigError for more than one."""
    chosen = [text.partition("=")[2] for text in texts if text.startswith("recipe=")]
    if len(chosen) > 1:
        raise ConfigError("give exactly one recipe", key="recipe", value=chosen)
    if not chosen and texts and "=" not in texts[0]:
        raise ConfigError("no recipe is given", key="recipe", value="", fix=f"recipe={texts[0]}")
    return (*chosen, "")[0], [text for text in texts if not text.startswith("recipe=")]
