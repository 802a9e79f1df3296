"""What a person watching the run sees: a progress bar, and one line a step."""

from __future__ import annotations

import re
import time
from collections import deque

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rlkit.telemetry.jsonl import Metrics, axis_of
from rlkit.telemetry.names import SFT_STEP

FIELDS = (
    ("reward", "reward/mean", ".3f"),
    ("dead", "group/dead_frac", ".0%"),
    ("length", "completion/length/mean", ".1f"),
    ("entropy", "policy/entropy", ".3f"),
    ("loss", "sft/loss", ".4f"),
    ("s/step", "time/step", ".2f"),
)
EVAL_NAME = re.compile(r"eval/([^/]+)/((?:avg|pass|maj)@\d+)")


def duration(seconds: float) -> str:
    """Short form of a time span: 42 s, 2 min, 1 h 1 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def figure(value: float | None, spec: str) -> str:
    """A number in its format; "not finite" for null."""
    return "not finite" if value is None else format(value, spec)


class ConsoleSink:
    """Progress bar with steps and ETA on a terminal; plain lines anywhere else.

    Args:
        total_steps, sft_steps: learner and warm-start steps of the whole run.
        start_step: steps done before this process (a resumed run).
        console: where to write; default: standard output.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, sft_steps: int | None = None, console: Console | None = None
    ) -> None:
        self.console = console if console is not None else Console(highlight=False)
        self._totals = {"": total_steps, "sft ": sft_steps}
        self._times: dict[str, deque[tuple[float, int]]] = {kind: deque(maxlen=20) for kind in self._totals}
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if self.console.is_terminal:
            eta = (TextColumn("ETA"), TimeRemainingColumn(compact=True))
            columns = (TextColumn("{task.description:>5}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, *eta, console=self.console)
            self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Show one row: a step's summary, held-out figures, or both."""
        shown = [f"{label} {figure(metrics[name], spec)}" for label, name, spec in FIELDS if name in metrics]
        if shown:
            kind = "sft " if axis_of(metrics) == SFT_STEP else ""
            total = self._totals[kind]
            eta = self._advance(kind, step, total)
            head = f"{kind}step {step}" + (f"/{total}" if total else "")
            self._print("  ".join([head, *shown, *([f"ETA {duration(eta)}"] if eta is not None else [])]))
        for name, value in metrics.items():
            if match := EVAL_NAME.fullmatch(name):
                error = metrics.get(name + "_se")
                tail = "" if error is None else f" +- {error:.3f}"
                self._print(f"step {step}  eval {match[1]}  {match[2]} {figure(value, '.3f')}{tail}", "bold cyan")

    def _advance(self, kind: str, step: int, total: int | None) -> float | None:
        """Move the bar; without one, the seconds left at the pace of the last steps, if there is a pace."""
        times = self._times[kind]
        times.append((time.monotonic(), step))
        if self._progress is not None:
            if kind not in self._tasks:
                self._tasks[kind] = self._progress.add_task(kind or "train", total=total, completed=step)
            self._progress.update(self._tasks[kind], completed=step)
            return None
        steps = step - times[0][1]
        return (times[-1][0] - times[0][0]) / steps * max(0, total - step) if total and steps > 0 else None

    def _print(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style), soft_wrap=True)

    def close(self, *, failed: bool = False) -> None:
        """Take the bar down and leave the cursor visible; closing twice is harmless."""
        if self._progress is not None:
            self._progress.stop()
