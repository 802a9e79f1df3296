"""Run folders that look like real ones, made by code."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rlkit.telemetry.rollouts import write_rollouts
from rlkit.types import Group, Prompt, Rollout, Verdict, VersionSpan

CONFIG = """\
name: chain_sum
seed: 7
steps: {steps}
prompts_per_step: 32
samples_per_prompt: 8
model:
  architecture:
    model_type: qwen2
    hidden_size: 128
data:
  eval:
    held_out: {{}}
    longer: {{}}
algorithm:
  advantage: {{_target_: rlkit.algorithms.advantages.grpo.GroupNormalizedAdvantage}}
  loss: {{_target_: rlkit.algorithms.losses.clipped.ClippedLoss}}
buffer:
  url: postgresql://someone:hunter2@db/run
"""

NASTY = (
    "12+7=19\n<script>alert(1)</script> [bold red]not markup[/] \x1b[31mred\x1b[0m \u202egnp.exe "
    "</pre><img src=x onerror=alert(1)>\x00\r"
)


def training_metrics(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    """One step's metrics as the trainer logs them: a run that learns."""
    learnt = 1 / (1 + math.exp(-6 * (step / max(steps, 2) - 0.4)))
    reward = float(np.clip(0.22 + 0.6 * learnt + rng.normal(0, 0.035), 0, 1))
    right = float(np.clip(0.05 + 0.5 * learnt + rng.normal(0, 0.03), 0, 1))
    wrong = float(np.clip(0.45 - 0.4 * learnt + rng.normal(0, 0.03), 0, 1))
    length = 60 + 50 * learnt + rng.normal(0, 2)
    wait, learner, sync = 2.2 + length / 80, 1.1 + length / 150, 0.08
    return {
        "reward/mean": reward,
        "reward/std": math.sqrt(reward * (1 - reward)),
        "reward/math/mean": reward * 0.95,
        "reward/format/mean": float(np.clip(0.5 + 0.5 * learnt, 0, 1)),
        "reward/unscored_frac": 0.001,
        "reward/timeout_frac": 0.0,
        "group/dead_frac": right + wrong,
        "group/all_correct_frac": right,
        "group/all_wrong_frac": wrong,
        "group/size/mean": 8.0,
        "group/size/max": 8,
        "advantage/mean": rng.normal(0, 0.01),
        "advantage/std": 0.9,
        "advantage/abs_max": 2.47,
        "completion/length/mean": length,
        "completion/length/max": min(256.0, length * 2.4),
        "completion/length/min": length * 0.3,
        "completion/truncated_frac": 0.06 * (1 - learnt),
        "policy/entropy": 1.1 - 0.7 * learnt + rng.normal(0, 0.02),
        "policy/clip_frac/low": 0.01,
        "policy/clip_frac/high": 0.02 + abs(rng.normal(0, 0.004)),
        "policy/kl_old": 0.002 + abs(rng.normal(0, 0.0005)),
        "policy/kl_ref": 0.05 * step / max(steps, 1),
        "policy/loss": rng.normal(0, 0.02),
        "policy/grad_norm": 0.5 + abs(rng.normal(0, 0.15)),
        "learner/learning_rate": 3e-4 * min(1.0, step / 10),
        "learner/optimizer_steps": step,
        "learner/microbatches": 2,
        "mismatch/logprob_absdiff/mean": 2e-6,
        "mismatch/logprob_absdiff/max": 4e-5,
        "mismatch/kl": 1e-9,
        "off_policy/lag/mean": 0.0,
        "off_policy/lag/max": 0,
        "off_policy/versions_per_rollout": 1.0,
        "off_policy/dropped": 0,
        **{f"queue/{state}": number for number, state in enumerate(("requested", "leased", "scored"))},
        "workers/idle_frac": 0.1,
        "workers/learner_idle_frac": 0.2,
        "time/step": wait + learner + sync + 0.15,
        "time/generate": wait - 0.5,
        "time/score": 0.4,
        "time/wait_rollout": wait,
        "time/learner": learner,
        "time/weight_sync": sync,
        "perf/tokens_per_s": 256 * length / (wait + learner),
        "perf/tokens_per_s_per_device": 256 * length / (wait + learner),
        "perf/peak_mem_gb": 1.9,
    }


def eval_metrics(step: int, steps: int) -> dict[str, float]:
    """Two held-out sets with standard errors."""
    learnt = step / max(steps, 1)
    out = {}
    for name, base, gain in (("held_out", 0.21, 0.55), ("longer", 0.08, 0.21)):
        average = base + gain * learnt
        for statistic, value in (
            ("avg@4", average),
            ("pass@4", min(1.0, average + 0.2)),
            ("maj@4", min(1.0, average + 0.05)),
        ):
            out[f"eval/{name}/{statistic}"] = value
            out[f"eval/{name}/{statistic}_se"] = math.sqrt(value * (1 - value) / 200)
        out[f"eval/{name}/length/mean"] = 70.0
        out[f"eval/{name}/truncated_frac"] = 0.01
        out[f"eval/{name}/unscored_frac"] = 0.0
    return out


def scored_group(ordinal: int, *scores: float | None, text: str | None = None) -> Group:
    """A group with a completion a score; of ordinal 0 the text tries to break out of whatever shows it."""
    a, b = 3 * ordinal + 4, 11
    rollouts, verdicts = [], []
    for index, score in enumerate(scores):
        answer = a + b + (0 if score else 1)
        plain = NASTY if ordinal == 0 else f"First {a} and {b} are added.\n{a}+{b}={answer}"
        tokens = len(plain)
        rollout = Rollout(
            ordinal=ordinal,
            index=index,
            token_ids=np.arange(tokens),
            behavior_logprobs=np.full(tokens, -0.5, dtype=np.float32),
            loss_mask=np.ones(tokens, dtype=np.bool_),
            segments=np.zeros(tokens, dtype=np.int64),
            version_spans=(VersionSpan(version=3, start=0, end=tokens),),
            finish_reason="stop" if index else "length",
            engine_id="e",
            text=plain if text is None else text,
        )
        rollouts.append(rollout)
        known = dict(answer=str(answer)) if score is not None else dict(reason="timeout after 5.0 s")
        verdicts.append(Verdict(score=score, parts={"math": score, "format": 1.0}, **known))
    question, reference = f"State the final answer of {a}+{b}=", str(a + b)
    prompt = Prompt(id=f"chain_sum/{ordinal}", text=question, token_ids=np.array([1]), reference=reference)
    whole, judged = tuple(rollouts), tuple(verdicts)
    return Group(ordinal=ordinal, prompt=prompt, samples=len(scores), rollouts=whole, verdicts=judged)


def save_rollouts(run_dir: Path, step: int, *groups: Group) -> None:
    """As the trainer does, with an advantage for each scored sample."""
    scores = {(g.ordinal, i): verdict.score for g in groups for i, verdict in enumerate(g.verdicts)}
    advantages = {place: score - 0.5 for place, score in scores.items() if score is not None}
    write_rollouts(run_dir / "rollouts" / f"step_{step}.parquet", step, groups, advantages)


class MakeRun:
    """Writes a run folder; every part can be left out."""

    training_metrics = staticmethod(training_metrics)
    eval_metrics = staticmethod(eval_metrics)
    scored_group = staticmethod(scored_group)
    save_rollouts = staticmethod(save_rollouts)

    def __init__(self, parent: Path) -> None:
        self.parent = parent

    def __call__(
        self,
        name: str = "run",
        *,
        steps: int = 60,
        planned: int | None = None,
        eval_steps: tuple[int, ...] | None = None,
        rollouts: bool = True,
        config: bool = True,
        resumed_at: int | None = None,
        sft_steps: int = 0,
        change: Callable[[int, dict[str, float]], dict[str, float]] = lambda step, row: row,
    ) -> Path:
        """`change` rewrites each training row; eval_steps default to first, middle and last."""
        run_dir = self.parent / name
        run_dir.mkdir(parents=True)
        rng = np.random.default_rng(0)
        evaluated = {0, steps // 2, steps} if eval_steps is None else set(eval_steps)
        lines, seconds, clock = [], 0.0, 1.7e9

        def add(step: int, metrics: dict[str, float], took: float) -> None:
            nonlocal seconds, clock
            seconds, clock = seconds + took, clock + took
            row = {"step": step, "time": round(clock, 3), "seconds": round(seconds, 3)}
            lines.append(json.dumps({**row, **metrics}))

        for step in range(1, sft_steps + 1):
            loss = 3 * math.exp(-3 * step / sft_steps) + 0.2 + abs(rng.normal(0, 0.02))
            add(step, {"sft/loss": loss, "sft/learning_rate": 1e-3, "sft/grad_norm": 1.0}, 0.2)
        for step in range(steps + 1):
            if step == resumed_at:
                clock += 500.0
            if step:
                metrics = change(step, training_metrics(step, steps, rng))
                add(step, metrics, metrics.get("time/step", 1.0))
            if step in evaluated:
                add(step, {**eval_metrics(step, steps), "time/eval": 6.0}, 6.0)
        (run_dir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
        if config:
            total = steps if planned is None else planned
            (run_dir / "config.yaml").write_text(CONFIG.format(steps=total))
            environment = {"versions": {"python": "3.11.7"}, "command": ["rlkit", "train"]}
            (run_dir / "environment.json").write_text(json.dumps(environment))
        if rollouts and steps:
            for step in sorted({1, steps}):
                scores: list[float | None] = [1.0, 0.0, 0.0, None]
                groups = [scored_group(o, *(scores[(o + i) % 4] for i in range(4))) for o in range(4)]
                save_rollouts(run_dir, step, *groups)
        return run_dir


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Factory of run folders below tmp_path."""
    return MakeRun(tmp_path)


@pytest.fixture(scope="session")
def make_run_class() -> type[MakeRun]:
    """For fixtures that outlive one test."""
    return MakeRun
