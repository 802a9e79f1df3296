"""`rlkit compare A B ...`: variants side by side, over seeds, as text, PNG and HTML.

An argument is a run folder or a folder with runs below it (a sweep). Runs named seed_<n> are runs of the
variant that their parent folder is called after; any other run is a variant of its own. The first variant, or
the one named by --baseline, is what the others are compared with.
"""

import argparse
import html
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Drawing
from rich.console import Console
from rich.table import Table

from rlkit.config.keys import leaves
from rlkit.errors import RlkitError, nearest
from rlkit.experiments.statistics import Figure, improvement_probability, over_seeds, paired_difference
from rlkit.telemetry.figures import CYCLE, STYLE, new_figure
from rlkit.telemetry.record import EvalCurve, RunRecord, load_run

FREE = ("name", "output_dir", "seed", "telemetry", "checkpoint", "resume")
"""Keys in which runs of one variant may differ."""


@dataclass(frozen=True)
class Variant:
    """Runs of one setting by seed."""

    name: str
    runs: Mapping[int, RunRecord]

    def curve(self, seed: int, metric: str) -> EvalCurve:
        """The held-out figure of a run; RlkitError if it was not logged."""
        curves = {f"{c.set}/{c.label}": c for c in self.runs[seed].evaluations}
        if metric not in curves:
            hint, expected = nearest(metric, curves), f"one of {', '.join(curves) or 'none: no evaluation was logged'}"
            problem = f"{self.runs[seed].run_dir} has no such held-out figure.{hint}"
            raise RlkitError(problem, key="--metric", value=metric, expected=expected)
        return curves[metric]

    def last(self, metric: str) -> dict[int, float]:
        """The figure after training, by seed. RlkitError for a run that was not evaluated after any step."""
        found = {}
        for seed, run in self.runs.items():
            if (after := self.curve(seed, metric).after) is None:
                fix = "let it train, or leave it out"
                raise RlkitError("not evaluated after training", key="run", value=str(run.run_dir), fix=fix)
            found[seed] = after.value
        return found

    @property
    def unfinished(self) -> list[str]:
        """What to say of runs that have not trained all planned steps."""
        short = [(seed, run) for seed, run in self.runs.items() if run.last_step < run.config.get("steps", 0)]
        return [f"{self.name} seed {s} stands at step {r.last_step} of {r.config['steps']}" for s, r in short]

    @cached_property
    def tokens(self) -> dict[int, float]:
        """Sampled tokens of each run."""
        return {seed: _cumulative(run, _tokens)[-1] for seed, run in self.runs.items()}

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Seconds of learner steps of each run; a warm start, evaluations and pauses are not counted."""
        return {seed: _cumulative(run, _seconds)[-1] for seed, run in self.runs.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A row of the table; `difference` and `improvement` are None for the baseline itself."""

    variant: Variant
    after: Figure
    difference: Figure | None
    improvement: Figure | None


def _tokens(run: RunRecord) -> dict[int, float]:
    return dict(zip(*run.metric("perf/sampled_tokens"), strict=True))


def _seconds(run: RunRecord) -> dict[int, float]:
    return dict(zip(*run.metric("time/step"), strict=True))


def _cumulative(run: RunRecord, amount: Callable[[RunRecord], dict[int, float]]) -> list[float]:
    """Running total after step 0, 1, 2, ..."""
    by_step = amount(run)
    return [0.0, *np.cumsum([by_step.get(step, 0.0) for step in range(1, run.last_step + 1)]).tolist()]


def find_variants(folders: Iterable[Path]) -> list[Variant]:
    """All runs at or below the folders. Raises RlkitError: none there, or a seed twice in a variant."""
    found: dict[str, dict[int, RunRecord]] = {}
    for folder in folders:
        files = sorted(folder.rglob("metrics.jsonl"))
        if not files:
            expected = "a run folder, or a sweep's folder"
            raise RlkitError("no run here", key="run", value=str(folder), expected=expected)
        for file in files:
            run, place = load_run(file.parent), file.parent.resolve()
            name = place.parent.name if place.name.startswith("seed_") else place.name
            seed = int(run.config.get("seed", 0))
            if seed in (variant := found.setdefault(name, {})):
                raise RlkitError(f"two runs of {name} have seed {seed}", key="run", value=str(file.parent))
            variant[seed] = run
    return [Variant(name, dict(sorted(runs.items()))) for name, runs in found.items()]


def compare(variants: Sequence[Variant], metric: str, baseline: str) -> list[Comparison]:
    """One row a variant, best first."""
    base = next((v for v in variants if v.name == baseline), None)
    if base is None:
        expected = f"one of {', '.join(v.name for v in variants)}"
        raise RlkitError("no such variant", key="--baseline", value=baseline, expected=expected)
    rows = []
    for variant in variants:
        values, other = variant.last(metric), base.last(metric)
        itself = variant is base
        rows.append(
            Comparison(
                variant=variant,
                after=over_seeds(values),
                difference=None if itself else paired_difference(values, other),
                improvement=None if itself else improvement_probability(values, other),
            )
        )
    return sorted(rows, key=lambda row: -row.after.value)


def differing_keys(variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Settings that are not the same in every run -> their values by variant."""
    configs = [leaves(run.config) for variant in variants for run in variant.runs.values()]
    names = [variant.name for variant in variants for _ in variant.runs]
    differing = {}
    for key in sorted({key for config in configs for key in config}):
        values = [repr(config.get(key)) for config in configs]
        if key.split(".")[0] not in FREE and len(set(values)) > 1:
            differing[key] = [f"{name}: {value}" for name, value in dict(zip(names, values, strict=True)).items()]
    return differing


def _shown(figure: Figure | None, sign: str = "") -> tuple[str, str]:
    """("0.964 +- 0.004", "0.957 to 0.971")."""
    if figure is None:
        return "-", "-"
    if np.isnan(figure.error):
        return f"{figure.value:{sign}.3f}", "one seed"
    return f"{figure.value:{sign}.3f} +- {figure.error:.3f}", f"{figure.low:{sign}.3f} to {figure.high:{sign}.3f}"


HEADINGS = (
    "variant",
    "seeds",
    "after",
    "95 % interval",
    "difference",
    "95 % interval",
    "P(better)",
    "tokens",
    "seconds",
)


def table(rows: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """The cells under HEADINGS."""
    cells: list[tuple[str, ...]] = []
    for row in rows:
        tokens, seconds = (float(np.mean([*x.values()])) for x in (row.variant.tokens, row.variant.seconds))
        better = "-" if row.improvement is None else f"{row.improvement.value:.2f}"
        numbers = (better, f"{tokens / 1e6:.2f} M", f"{seconds:.0f}")
        cells.append(
            (row.variant.name, str(row.after.seeds), *_shown(row.after), *_shown(row.difference, "+"), *numbers)
        )
    return cells


def draw(variants: Sequence[Variant], metric: str) -> Drawing:
    """The figure against steps, sampled tokens and seconds: mean over seeds, band of one standard error."""
    with mpl.rc_context(STYLE):
        drawing, axes = new_figure(3, (13.0, 4.4))
        for i, variant in enumerate(variants):
            points = [{p.step: p.value for p in variant.curve(seed, metric).points} for seed in variant.runs]
            steps = sorted(set(points[0]).intersection(*points))  # where every seed was evaluated
            values = np.array([[of_seed[step] for step in steps] for of_seed in points])
            mean = values.mean(axis=0)
            error = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(len(steps))
            for place, amount, scale in ((0, None, 1.0), (1, _tokens, 1e6), (2, _seconds, 1.0)):
                x = np.array(steps, dtype=float)
                if amount is not None:
                    totals = [_cumulative(run, amount) for run in variant.runs.values()]
                    x = np.mean([[total[min(s, len(total) - 1)] for s in steps] for total in totals], axis=0) / scale
                colour, line = CYCLE[i % len(CYCLE)], ("-", "--", ":", "-.")[i // len(CYCLE) % 4]
                axes[place].plot(x, mean, line, marker="o", markersize=3, label=variant.name, color=colour)
                axes[place].fill_between(x, mean - error, mean + error, alpha=0.15, color=colour, linewidth=0)
        for place, label in enumerate(("learner step", "sampled tokens, millions", "seconds of learner steps")):
            axes[place].set(xlabel=label, ylabel=metric if place == 0 else "")
        drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return drawing


def write_html(
    path: Path, rows: Sequence[Comparison], metric: str, baseline: str, differing: Mapping[str, list[str]]
) -> None:
    """A page with the table, the picture beside it (compare.png), and what the runs differ in."""
    head = "".join(f"<th>{html.escape(x)}</th>" for x in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in cells) + "</tr>" for cells in table(rows))
    keys = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape('; '.join(v))}</td></tr>" for k, v in differing.items()
    )
    style = (
        "body{font:15px system-ui,sans-serif;margin:2em;max-width:1200px}td,th{border:1px solid #ddd;padding:5px 10px;"
    )
    style += "text-align:left}table{border-collapse:collapse}img{width:100%}"
    path.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>rlkit compare</title><style>{style}</style>"
        f"<h1>{html.escape(metric)}</h1><p>Mean +- standard error over seeds, percentile bootstrap over seeds; "
        f"differences are paired by seed with {html.escape(baseline)}.</p><table><tr>{head}</tr>{body}</table>"
        f"<p><img src='compare.png' alt='curves'></p><h2>Settings that differ</h2><table>{keys}</table></html>\n",
        encoding="utf-8",
    )


def main(argv: Sequence[str], console: Console | None = None) -> int:
    """Print the table and write compare.txt, compare.png and compare.html into --out."""
    parser = argparse.ArgumentParser(prog="rlkit compare", description="Compare runs over seeds.")
    parser.add_argument("folders", nargs="+", type=Path, help="run folders, or folders with runs below them")
    parser.add_argument("--metric", help="held-out figure, set/label; default: avg@k of the first set")
    parser.add_argument("--baseline", help="variant the others are compared with; default: the first")
    parser.add_argument("--out", type=Path, help="where files go; default: the first folder")
    options = parser.parse_args(argv)
    variants = find_variants(options.folders)
    first = next(iter(variants[0].runs.values())).averages
    metric = options.metric or (f"{first[0].set}/{first[0].label}" if first else "")
    baseline = options.baseline or variants[0].name
    rows = compare(variants, metric, baseline)
    shown = Table(title=f"{metric}: mean +- standard error over seeds; differences paired by seed with {baseline}")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    for cells in table(rows):
        shown.add_row(*cells)
    differing = differing_keys(variants)
    out: Path = options.out or options.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "compare.txt").open("w", encoding="utf-8") as file:
        for target in (console or Console(width=None if sys.stdout.isatty() else 160), Console(file=file, width=160)):
            target.print(shown)
            notes = [f"{key}: {'; '.join(values)}" for key, values in differing.items()]
            for note in [*(note for variant in variants for note in variant.unfinished), *notes]:
                target.print(note, markup=False, highlight=False)
    draw([row.variant for row in rows], metric).savefig(out / "compare.png", dpi=150, metadata={"Software": None})
    write_html(out / "compare.html", rows, metric, baseline, differing)
    print(f"written: {out / 'compare.txt'}, compare.png, compare.html")
    return 0
