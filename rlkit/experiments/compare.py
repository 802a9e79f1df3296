"""`rlkit compare A B ...`: variants side by side, over seeds, as text, PNG and HTML.

Runs named seed_<n> are of the variant that their parent folder is called after; any other run is a variant of its own.
Seeds are the unit of resampling: with three an interval says how far they lie apart, not more (its coverage is poor).
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure as Drawing
from rich.console import CONSOLE_HTML_FORMAT, Console
from rich.table import Column, Table
from rich.text import Text
from scipy.stats import bootstrap

from rlkit.config.keys import leaves
from rlkit.errors import RlkitError, nearest
from rlkit.telemetry.figures import CYCLE, STYLE
from rlkit.telemetry.record import EvalCurve, RunRecord
from rlkit.types import FloatArray

FREE = ("name", "output_dir", "seed", "telemetry", "checkpoint", "resume")  # in which runs of one variant may differ


@dataclass(frozen=True)
class Variant:
    """Runs of one setting by seed."""

    name: str
    runs: Mapping[int, RunRecord]

    def curves(self, metric: str) -> dict[int, EvalCurve]:
        """The held-out figure of every run, by seed; RlkitError if one did not log it, or not after training."""
        found = {}
        for seed, run in self.runs.items():
            logged = {f"{c.set}/{c.label}": c for c in run.evaluations}
            if metric not in logged:
                expected = f"one of {', '.join(logged) or 'none: no evaluation was logged'}"
                problem = f"{run.run_dir} has no such held-out figure.{nearest(metric, logged)}"
                raise RlkitError(problem, key="--metric", value=metric, expected=expected)
            if logged[metric].after is None:
                fix = "let it train, or leave it out"
                raise RlkitError("not evaluated after training", key="run", value=str(run.run_dir), fix=fix)
            found[seed] = logged[metric]
        return found

    @cached_property
    def spent(self) -> list[FloatArray]:
        """A run's sampled tokens and seconds of learner steps alone, after step 0, 1, ...: [last step + 1, 2]."""
        found = []
        for run in self.runs.values():
            both = [dict(zip(*run.metric(name), strict=True)) for name in ("perf/sampled_tokens", "time/step")]
            rows = [[of_step.get(step, 0.0) for of_step in both] for step in range(1, run.last_step + 1)]
            found.append(np.cumsum([[0.0, 0.0], *rows], axis=0))
        return found


class Figure(NamedTuple):
    """An estimate with its standard error over seeds and its bootstrap interval; NaN where one seed says nothing."""

    value: float
    error: float
    low: float
    high: float
    seeds: int


def over_seeds(values: Mapping[int, float]) -> Figure:
    """Mean over seeds; error is sd / sqrt(n) with the unbiased sd, the interval a percentile bootstrap of 95 %."""
    x = np.array(list(values.values()))
    if len(x) < 2:
        return Figure(float(x.mean()), np.nan, np.nan, np.nan, len(x))
    low, high = bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=0).confidence_interval
    return Figure(float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5), float(low), float(high), len(x))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Figure | None:
    """Mean over common seeds of value - baseline (same prompts and random numbers); None without a common seed."""
    common = values.keys() & baseline.keys()
    return over_seeds({seed: values[seed] - baseline[seed] for seed in sorted(common)}) if common else None


def improvement_probability(values: Mapping[int, float], baseline: Mapping[int, float]) -> float:
    """P(a run beats one of the baseline), a tie counts half (Agarwal et al. 2021, arXiv 2108.13264, section 4.3)."""
    pairs = np.subtract.outer(list(values.values()), list(baseline.values()))
    return float(np.mean(0.5 + 0.5 * np.sign(pairs)))


class Comparison(NamedTuple):
    """A row of the table; `difference` and `improvement` are None for the baseline itself."""

    variant: Variant
    after: Figure
    difference: Figure | None
    improvement: float | None


def find_variants(folders: Iterable[Path]) -> list[Variant]:
    """All runs at or below the folders. Raises RlkitError: none there, or a seed twice in a variant."""
    found: dict[str, dict[int, RunRecord]] = {}
    for folder in folders:
        logs = sorted(folder.rglob("metrics.jsonl"))
        if not logs:
            raise RlkitError("no run here", key="run", value=str(folder), expected="a run folder, or a sweep's folder")
        for file in logs:
            run, place = RunRecord(file.parent), file.parent.resolve()
            name = place.parent.name if place.name.startswith("seed_") else place.name
            seed = int(run.config.get("seed", 0))
            if seed in (variant := found.setdefault(name, {})):
                raise RlkitError(f"two runs of {name} have seed {seed}", key="run", value=str(file.parent))
            variant[seed] = run
    return [Variant(name, dict(sorted(runs.items()))) for name, runs in found.items()]


def compare(variants: Sequence[Variant], metric: str, baseline: str) -> list[Comparison]:
    """One row a variant, best first."""
    last = {v.name: {seed: c.points[-1].value for seed, c in v.curves(metric).items()} for v in variants}
    if baseline not in last:
        raise RlkitError("no such variant", key="--baseline", value=baseline, expected=f"one of {', '.join(last)}")
    rows, base = [], last[baseline]
    for variant in variants:
        values = last[variant.name]
        both = paired_difference(values, base), improvement_probability(values, base)
        rows.append(Comparison(variant, over_seeds(values), *(both if variant.name != baseline else (None, None))))
    return sorted(rows, key=lambda row: -row.after.value)


def differing_keys(variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Settings that are not the same in every run -> their values by variant."""
    configs = [(variant.name, leaves(run.config)) for variant in variants for run in variant.runs.values()]
    differing = {}
    for key in sorted({key for _, config in configs for key in config}):
        values = [(name, repr(config.get(key))) for name, config in configs]
        if key.split(".")[0] not in FREE and len({value for _, value in values}) > 1:
            differing[key] = [f"{name}: {value}" for name, value in dict(values).items()]
    return differing


def _shown(figure: Figure | None, sign: str = "") -> tuple[str, str]:
    """("0.964 +- 0.004", "0.957 to 0.971")."""
    if figure is None:
        return "-", "-"
    if np.isnan(figure.error):
        return f"{figure.value:{sign}.3f}", "one seed"
    return f"{figure.value:{sign}.3f} +- {figure.error:.3f}", f"{figure.low:{sign}.3f} to {figure.high:{sign}.3f}"


def draw(variants: Sequence[Variant], metric: str) -> Drawing:
    """The figure against steps, sampled tokens and seconds: mean over seeds, band of one standard error."""
    with mpl.rc_context(STYLE):
        drawing = Drawing(figsize=(13.0, 4.4), layout="constrained")
        axes = drawing.subplots(1, 3)
        for i, variant in enumerate(variants):
            points = [{p.step: p.value for p in curve.points} for curve in variant.curves(metric).values()]
            steps = sorted(set(points[0]).intersection(*points))  # where every seed was evaluated
            values = np.array([[of_seed[step] for step in steps] for of_seed in points])
            mean = values.mean(axis=0)
            error = values.std(axis=0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros(len(steps))
            colour, line = CYCLE[i % len(CYCLE)], ("-", "--", ":", "-.")[i // len(CYCLE) % 4]
            spent = [total[min(step, len(total) - 1)] for total in variant.spent for step in steps]
            tokens, seconds = np.reshape(spent, (len(points), len(steps), 2)).mean(axis=0).T
            for place, x in zip(axes, (steps, tokens / 1e6, seconds), strict=True):
                place.plot(x, mean, line, marker="o", markersize=3, label=variant.name, color=colour)
                place.fill_between(x, mean - error, mean + error, alpha=0.15, color=colour, linewidth=0)
        labels = ("learner step", "sampled tokens, millions", "seconds of learner steps")
        for place, label in zip(axes, labels, strict=True):
            place.set(xlabel=label, ylabel=metric if place is axes[0] else "")
        drawing.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return drawing


def main(argv: Sequence[str]) -> int:
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
    compared = compare(variants, metric, baseline)
    title = f"{metric}: mean +- standard error over seeds; differences paired by seed with {baseline}"
    headings = ("seeds", "after", "95 % interval", "difference", "95 % interval", "P(better)", "tokens", "seconds")
    shown = Table("variant", *(Column(heading, justify="right") for heading in headings), title=title)
    for row in compared:
        tokens, seconds = np.mean([spent[-1] for spent in row.variant.spent], axis=0)
        better = "-" if row.improvement is None else f"{row.improvement:.2f}"
        estimates = (*_shown(row.after), *_shown(row.difference, "+"), better)
        start = row.variant.name, str(row.after.seeds)
        shown.add_row(*start, *estimates, f"{tokens / 1e6:.2f} M", f"{seconds:.0f}")
    out: Path = options.out or options.folders[0]
    out.mkdir(parents=True, exist_ok=True)
    runs = [(f"{variant.name} seed {seed}", run) for variant in variants for seed, run in variant.runs.items()]
    planned = [(name, run.last_step, run.config.get("steps", 0)) for name, run in runs]
    notes = [f"{name} stands at step {last} of {steps}" for name, last, steps in planned if last < steps]
    notes += [f"{key}: {'; '.join(values)}" for key, values in differing_keys(variants).items()]
    console = Console(record=True, width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(shown, Text("\n".join(notes)))
    console.save_text(str(out / "compare.txt"), clear=False)
    picture = '<img src="compare.png" alt="curves" style="max-width: 100%"></body>'
    console.save_html(str(out / "compare.html"), code_format=CONSOLE_HTML_FORMAT.replace("</body>", picture))
    draw([row.variant for row in compared], metric).savefig(out / "compare.png", dpi=150, metadata={"Software": None})
    print(f"written: {out / 'compare.txt'}, compare.png, compare.html")
    return 0
