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
    """Short form of a time span.

    Example:
        >>> duration(42), duration(3700)
        ('42 s', '1 h 1 min')
    """
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
        total_steps: learner steps of the whole run.
        start_step: steps done before this process (a resumed run).
        sft_steps: steps of the warm start, when there is one.
        console: where to write; default: standard output.
    """

    def __init__(
        self, total_steps: int, *, start_step: int = 0, sft_steps: int | None = None, console: Console | None = None
    ) -> None:
        self.console = console if console is not None else Console(highlight=False)
        self.total_steps = total_steps
        self.sft_steps = sft_steps
        self._done = {"train": start_step, "sft": 0}
        self._times: dict[str, deque[tuple[float, int]]] = {"train": deque(maxlen=20), "sft": deque(maxlen=20)}
        self._tasks: dict[str, TaskID] = {}
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:>5}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Show one row: a step's summary, held-out figures, or both."""
        kind = "sft" if axis_of(metrics) == SFT_STEP else "train"
        shown = [(label, metrics[name], spec) for label, name, spec in FIELDS if name in metrics]
        if shown:
            self._advance(kind, step)
            total = self.sft_steps if kind == "sft" else self.total_steps
            head = f"{'sft ' if kind == 'sft' else ''}step {step}"
            head += f"/{total}" if total else ""
            parts = [head, *(f"{label} {figure(value, spec)}" for label, value, spec in shown)]
            if self._progress is None and total and (eta := self._eta(kind, total)) is not None:
                parts.append(f"ETA {duration(eta)}")
            self._print("  ".join(parts), style="")
        for name, value in metrics.items():
            if match := EVAL_NAME.fullmatch(name):
                error = metrics.get(name + "_se")
                tail = "" if error is None else f" +- {error:.3f}"
                text = f"step {step}  eval {match[1]}  {match[2]} {figure(value, '.3f')}{tail}"
                self._print(text, style="bold cyan")

    def _advance(self, kind: str, step: int) -> None:
        self._done[kind] = step
        self._times[kind].append((time.monotonic(), step))
        if self._progress is None:
            return
        total = self.sft_steps if kind == "sft" else self.total_steps
        if kind not in self._tasks:
            self._tasks[kind] = self._progress.add_task(kind, total=total, completed=step)
        self._progress.update(self._tasks[kind], completed=step)

    def _eta(self, kind: str, total: int) -> float | None:
        """Seconds left at the pace of the last steps; None before there is a pace."""
        times = self._times[kind]
        steps = times[-1][1] - times[0][1]
        if steps <= 0:
            return None
        return (times[-1][0] - times[0][0]) / steps * max(0, total - times[-1][1])

    def _print(self, line: str, style: str) -> None:
        self.console.print(Text(line, style=style), soft_wrap=True)

    def close(self, *, failed: bool = False) -> None:
        """Take the bar down and leave the cursor visible; closing twice is harmless."""
        if self._progress is not None:
            self._progress.stop()
