"""All pictures of a run: drawn without a display, kept as PNG, handed to the page as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from rlkit.telemetry import figures
from rlkit.telemetry.drawing import STYLE, lines
from rlkit.telemetry.record import RunRecord


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of the report: file name, what it shows, how it is drawn."""

    name: str
    caption: str
    draw: Callable[[RunRecord], Figure | None]


PANELS: tuple[Panel, ...] = (
    Panel(
        "learning_curve",
        "What was learnt: held-out figures before and after, and training reward by step.",
        figures.learning_curve,
    ),
    Panel("evaluations", "Held-out avg@k, pass@k and maj@k.", figures.evaluations),
    Panel("named_rewards", "Each named reward before its weight.", figures.named_rewards),
    Panel("groups", "Only mixed groups carry signal.", figures.groups),
    Panel("length", "Length of completions and share cut at the limit.", figures.lengths),
    Panel(
        "entropy",
        "Entropy of the next-token distribution.",
        lambda run: lines(run, [("entropy", "policy/entropy")], "Policy entropy", "nats", from_zero=True),
    ),
    Panel("optimiser", "Gradient norm and learning rate.", figures.optimiser),
    Panel(
        "kl",
        "Distance to the anchor and to the reference model.",
        lambda run: lines(
            run,
            [("to the old policy", "policy/kl_old"), ("to the reference", "policy/kl_ref")],
            "KL divergence",
            "nats per token",
        ),
    ),
    Panel(
        "clipping",
        "Share of tokens whose ratio was clipped.",
        lambda run: lines(
            run,
            [("below", "policy/clip_frac/low"), ("above", "policy/clip_frac/high")],
            "Clipped tokens",
            "fraction",
            from_zero=True,
        ),
    ),
    Panel(
        "mismatch",
        "Engine against learner on the same tokens.",
        lambda run: lines(
            run,
            [("mean", "mismatch/logprob_absdiff/mean"), ("max", "mismatch/logprob_absdiff/max")],
            "Log-prob mismatch",
            "nats",
            log=True,
        ),
    ),
    Panel(
        "lag",
        "Age of the trained tokens in policy versions.",
        lambda run: lines(
            run,
            [("mean", "off_policy/lag/mean"), ("max", "off_policy/lag/max")],
            "Staleness",
            "versions",
            from_zero=True,
        ),
    ),
    Panel("time", "Mean seconds of a step, and each part's share.", figures.time_split),
    Panel(
        "throughput",
        "Completion tokens trained on per second.",
        lambda run: lines(run, [("tokens/s", "perf/tokens_per_s")], "Throughput", "tokens per second", from_zero=True),
    ),
    Panel("warm_start", "Supervised warm start.", figures.warm_start),
)


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn panel: its PNG beside the report, its SVG as a data URI for the page."""

    panel: Panel
    png: Path
    svg_uri: str


def draw_all(run: RunRecord) -> tuple[list[Drawn], list[Panel]]:
    """Draw every panel the run has data for into plots/; return them, and those without data.

    A picture an earlier report drew and this run's metrics no longer support is removed.
    """
    folder = run.run_dir / "plots"
    drawn: list[Drawn] = []
    empty: list[Panel] = []
    with mpl.rc_context(STYLE):
        for panel in PANELS:
            png = folder / f"{panel.name}.png"
            figure = panel.draw(run)
            if figure is None:
                png.unlink(missing_ok=True)
                empty.append(panel)
                continue
            folder.mkdir(exist_ok=True)
            figure.savefig(png, dpi=150, metadata={"Software": None})
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
            uri = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
            drawn.append(Drawn(panel, png, uri))
    return drawn, empty
