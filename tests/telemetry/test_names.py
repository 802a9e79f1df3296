"""The registry knows every name, and the glossary is generated from it."""

import dataclasses
import itertools
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

from rlkit.config.schema import TelemetryConfig
from rlkit.telemetry.names import (
    ALIASES,
    GROUPS,
    LIBRARIES,
    METRICS,
    TelemetryError,
    alias,
    check_name,
    sections,
)  # fmt: skip

DOCS = Path(__file__).parents[2] / "docs"


def examples(pattern: str) -> list[str]:
    """Concrete names of a pattern."""
    pattern = pattern.replace("<name>", "math_1").replace("<set>", "gsm8k-test").replace("@k", "@16")
    parts = re.split(r"(\{[^}]*\}|\[_se\])", pattern)
    choices = [p[1:-1].split(",") if p.startswith("{") else ["", "_se"] if p == "[_se]" else [p] for p in parts]
    return ["".join(choice) for choice in itertools.product(*choices)]


def test_glossary_is_up_to_date() -> None:
    made = runpy.run_path(str(DOCS / "generate" / "metrics.py"))["markdown"]()
    assert (DOCS / "metrics.md").read_text() == made, "run: python docs/generate/metrics.py > docs/metrics.md"


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.pattern)
def test_every_pattern_is_found_by_its_names_only_and_explained(metric) -> None:
    names = examples(metric.pattern)
    assert names
    for name in names:
        assert check_name(name) is metric
    assert metric.pattern.split("/")[0] in GROUPS
    assert all((metric.unit, metric.meaning, metric.healthy, metric.action))


def test_every_name_the_trainer_logs_is_known(make_run) -> None:
    row = make_run.training_metrics(1, 10, np.random.default_rng(0))
    for name in row | make_run.eval_metrics(0, 10):
        check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "reward/means",
        "reward/mean/",
        "eval/avg@4",
        "eval/a/b/avg@4",
        "eval/set/avg@k",
        "eval/set/avg@4_sd",
        "policy/clip_frac/middle",
        "loss",
        "reward/x y/mean",
        "",
        "reward/mean\n",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(TelemetryError, match=r"docs/metrics\.md"):
        check_name(name)


def test_a_misspelt_name_is_answered_with_the_right_one() -> None:
    with pytest.raises(TelemetryError, match="Did you mean 'policy/entropy'"):
        check_name("policy/entrpy")


@pytest.mark.parametrize("name", ALIASES)
def test_every_alias_is_of_one_of_our_metrics_and_keeps_its_placeholders(name: str) -> None:
    (example,) = examples(name)
    check_name(example)
    assert ALIASES[name] and ALIASES[name].keys() <= LIBRARIES.keys()
    for library, theirs in ALIASES[name].items():
        (expected,) = examples(LIBRARIES[library]["prefix"] + theirs)
        assert alias(example, library) == expected


def test_aliases_are_unambiguous_and_the_setting_offers_their_libraries() -> None:
    for library in LIBRARIES:
        theirs = [names[library] for names in ALIASES.values() if library in names]
        assert len(theirs) == len(set(theirs))
    (aliases,) = (f for f in dataclasses.fields(TelemetryConfig) if f.name == "aliases")
    assert set(aliases.metadata["choices"]) == {"none", *LIBRARIES}
    assert alias("eval/a/avg@4_se", "verl") is None and alias("plugin/x", "trl") is None


def test_every_metric_has_one_place_on_the_dashboard() -> None:
    placed = [metric.pattern for metrics in sections().values() for metric in metrics]
    assert sorted(placed) == sorted(metric.pattern for metric in METRICS)
    assert all(sections().values())
