"""The command line: `rlkit train recipe=NAME [key=value ...]` and its sister commands.

Thin: each command imports its main function when it runs, so that `rlkit report` needs no torch.
Bad input ends with one message on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.errors import RewardError
from rlkit import __version__
from rlkit.errors import ConfigError, RlkitError

RECIPE_COMMANDS = {
    "train": "train with RL: recipe=NAME [key=value ...]",
    "sft": "only the warm start of a recipe",
    "eval": "evaluate a checkpoint (or the initial model) on a recipe's held-out sets",
    "check": "print the resolved config, batch table and memory estimate; start nothing",
    "check-parity": "compare the engine's log-probs with the learner's",
}
RUN_COMMANDS = {"report": "write report.html and plots of a run folder", "buffer": "show what a run's buffer holds"}


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; `rollouts` has its own."""
    top = argparse.ArgumentParser(prog="rlkit", description=__doc__.splitlines()[0])
    top.add_argument("--version", action="version", version=f"rlkit {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in RECIPE_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="recipe=NAME [key=value ...]",
            help="the recipe, then Hydra overrides: key=value, group=option",
        )
        command.add_argument("--config-dir", type=Path, help="folder with your own recipes, searched first")
        if name == "eval":
            command.add_argument("--checkpoint", type=Path, help="checkpoints/step_N of a run")
    for name, text in RUN_COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("run", type=Path, help="run folder, outputs/NAME")
    commands.add_parser("rollouts", help="read a run's completions", add_help=False)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the process's exit status (0, or 2 after an RlkitError)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Users' components are found where the command runs; behind the installed packages, so that a
    # stray folder called `recipes` there does not replace ours.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return _dispatch(arguments)
    except (RlkitError, RewardError) as error:
        sys.stdout.flush()
        print(f"rlkit: {error}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    grammar = parser()
    # Overrides may stand before and after options, which argparse's subcommands do not expect.
    options, rest = grammar.parse_known_args(arguments)
    command = options.command
    if command == "rollouts":
        from rlkit.telemetry.rollouts import main as rollouts

        return rollouts(arguments[arguments.index("rollouts") + 1 :])
    flags = [text for text in rest if text.startswith("-")]
    if flags or (rest and command in RUN_COMMANDS):
        grammar.error(f"unrecognized arguments: {' '.join(flags or rest)}")
    if command == "report":
        from rlkit.telemetry.report import main as report

        return int(report(options.run) or 0)
    if command == "buffer":
        from rlkit.buffer.inspect import main as inspect

        inspect(options.run)
        return 0
    return _run_recipe(command, options, [*options.overrides, *rest])


def _run_recipe(command: str, options: argparse.Namespace, texts: list[str]) -> int:
    from rlkit.config.compose import load
    from rlkit.config.verify import verify

    config, raw = load(*split_recipe(texts), config_dir=options.config_dir)
    if command == "check":
        from rlkit.config.check import main as check

        return check(config, raw)
    verify(config)
    result: Any
    if command == "train":
        from rlkit.learner.train import main as train

        result = train(config, raw)
    elif command == "sft":
        from rlkit.learner.sft import main as sft

        result = sft(config, raw)
    elif command == "eval":
        from rlkit.evaluation.evaluate import main as evaluate

        result = evaluate(config, raw, options.checkpoint)
    else:
        from rlkit.learner.parity import main as parity

        result = parity(config, raw)
    return int(result or 0)


def split_recipe(texts: Sequence[str]) -> tuple[str, list[str]]:
    """(recipe, the other overrides). ConfigError unless `recipe=NAME` is there exactly once."""
    chosen = [text.partition("=")[2] for text in texts if text.startswith("recipe=")]
    others = [text for text in texts if not text.startswith("recipe=")]
    if len(chosen) != 1 or not chosen[0]:
        from rlkit.config.library import Library

        raise ConfigError(
            "give exactly one recipe" if chosen else "no recipe is given",
            key="recipe",
            value=chosen or None,
            expected=f"recipe=NAME, one of {', '.join(Library.open().recipes())}",
        )
    return chosen[0], others
