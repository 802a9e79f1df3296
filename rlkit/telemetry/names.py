"""The metric registry: every name a run may log, slash groups with the statistic last; metrics.yaml explains them."""

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import NamedTuple, TypeAlias

import yaml

from rlkit.errors import RlkitError, nearest

Metrics: TypeAlias = Mapping[str, float | None]
EVAL_NAME = re.compile(r"eval/([^/]+)/((avg|pass|maj|logprob)@(\d+))")


class TelemetryError(RlkitError):
    """A metric, a run folder or a rollout file is not what telemetry can keep or read."""


class Metric(NamedTuple):
    """One row of the glossary. `pattern` is the name with placeholders; the rest is text for people."""

    pattern: str
    unit: str
    meaning: str
    healthy: str
    action: str


def compiled(pattern: str) -> re.Pattern[str]:
    """What a pattern stands for; its placeholders are the groups `name`, `set` and `k`."""
    text = re.sub(r"\\{([^}]*)\\}", lambda m: "(?:" + m[1].replace(",", "|") + ")", re.escape(pattern))
    text = text.replace(r"\[_se\]", "(?:_se)?").replace("@k", r"@(?P<k>\d+)").replace("plugin/<name>", r"plugin/\S+")
    return re.compile(re.sub("<(name|set)>", r"(?P<\1>[^/\\s]+)", text))


def read_resource(name: str) -> str:
    """Text of a file that ships beside the code."""
    return (resources.files("rlkit.telemetry") / name).read_text("utf-8")


REPORT = yaml.safe_load(read_resource("report.yaml"))  # its texts, styles and limits
_GLOSSARY = yaml.safe_load(read_resource("metrics.yaml"))
GROUPS: dict[str, str] = _GLOSSARY["groups"]
METRICS = tuple(Metric(pattern, *texts) for pattern, texts in _GLOSSARY["metrics"].items())
_PATTERNS = {compiled(metric.pattern): metric for metric in METRICS}
_ALIASES = yaml.safe_load(read_resource("aliases.yaml"))
LIBRARIES: dict[str, dict[str, str]] = _ALIASES["libraries"]
ALIASES: dict[str, dict[str, str]] = _ALIASES["aliases"]


@lru_cache(maxsize=4096)
def check_name(name: str) -> Metric:
    """The registry's entry for a metric's name, such as "eval/gsm8k/avg@4_se"; TelemetryError if there is none."""
    for pattern, metric in _PATTERNS.items():
        if pattern.fullmatch(name):
            return metric
    problem = f"unknown metric.{nearest(name, (m.pattern for m in METRICS))}"
    fix = "take one of docs/metrics.md, or add it to metrics.yaml; a component from outside uses plugin/<name>"
    raise TelemetryError(problem, key="metric", value=name, fix=fix)


def sections() -> dict[str, list[Metric]]:
    """The dashboard's sections; one lists patterns, and groups for those of their metrics that no section lists."""
    chosen: dict[str, list[str]] = _GLOSSARY["sections"]
    single = {key for keys in chosen.values() for key in keys}
    groups = {m.pattern: m.pattern if m.pattern in single else m.pattern.split("/")[0] for m in METRICS}
    return {title: [m for key in keys for m in METRICS if groups[m.pattern] == key] for title, keys in chosen.items()}


@lru_cache(maxsize=4096)
def alias(name: str, library: str) -> str | None:
    """What a library of aliases.yaml, such as "trl", calls a metric in wandb; None where it has no such figure."""
    for pattern, names in ALIASES.items():
        if library in names and (match := compiled(pattern).fullmatch(name)):
            theirs = names[library].replace("@k", "@<k>")
            return LIBRARIES[library]["prefix"] + re.sub("<(name|set|k)>", lambda m: match[m[1]], theirs)
    return None


def is_warm_start(metrics: Metrics) -> bool:
    """Whether a row's step counts warm-start updates and not learner steps."""
    return any(name.startswith("sft/") for name in metrics)
