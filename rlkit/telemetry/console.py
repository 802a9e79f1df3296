"""What a person watching the run sees: a progress bar, and one line a step."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from rlkit.telemetry.names import EVAL_NAME, Metrics, is_warm_start

FIELDS = (
    ("reward", "reward/mean", ".3f"),
    ("dead", "group/dead_frac", ".0%"),
    ("length", "completion/length/mean", ".1f"),
    ("entropy", "policy/entropy", ".3f"),
    ("loss", "sft/loss", ".4f"),
    ("s/step", "time/step", ".2f"),
)
PACE_WINDOW_S = 3600.0  # the time left is told by the pace of the steps in it


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
    """Progress bar with steps and time left on a terminal; plain lines anywhere else.

    `total_steps`: learner steps of the whole run, or updates of a warm start; `start_step` of them are done already.
    """

    def __init__(self, total_steps: int, *, start_step: int = 0, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.total = total_steps
        columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        plain = not self.console.is_terminal
        self._progress = Progress(*columns, console=self.console, disable=plain, speed_estimate_period=PACE_WINDOW_S)
        self._progress.add_task("steps", total=total_steps, completed=start_step)
        self._progress.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """Show one row: a step's summary, held-out figures, or both."""
        shown = [f"{label} {figure(metrics[name], spec)}" for label, name, spec in FIELDS if name in metrics]
        if shown:
            (task,) = self._progress.tasks
            self._progress.update(task.id, completed=step)
            if self._progress.disable and task.time_remaining:
                shown.append(f"ETA {duration(task.time_remaining)}")
            kind = "sft " if is_warm_start(metrics) else ""
            self._print("  ".join([f"{kind}step {step}/{self.total}", *shown]))
        for name, value in metrics.items():
            if match := EVAL_NAME.fullmatch(name):
                error = metrics.get(name + "_se")
                tail = "" if error is None else f" +- {error:.3f}"
                self._print(f"step {step}  eval {match[1]}  {match[2]} {figure(value, '.3f')}{tail}", "bold cyan")

    def _print(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style), soft_wrap=True)

    def close(self, *, failed: bool = False) -> None:
        """Take the bar down and leave the cursor visible; closing twice is harmless."""
        self._progress.stop()
