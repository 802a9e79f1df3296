"""One training step of TRL's GRPOTrainer and of rlkit on the same job, in alternation.

    pip install "trl==1.16.*"
    python benchmarks/peers/trl_step.py [--rounds 3] [--steps 10] [--ranks 2] [--threads 1]

The job: 32 prompts x 8 completions of the quickstart, at most 48 new tokens, temperature 1, one AdamW step at learning
rate 1e-6 (so that the policy, and with it lengths and rewards, stay what they are), no KL. It is run for two policies:
`warm`, the quickstart's warm start, right in half of its samples, where nearly every group has a gradient, and
`trained`, the same after 60 steps, where most groups are all correct, as they are for most of a run. Each round starts
one process of either side for each policy, in changing order, and leaves out the first two steps of each.

Both sides use two cores as two data-parallel ranks of one thread, the fastest way for either. TRL runs at its best
settings for this machine: micro-batches of 32 samples a rank (64 and 128 are slower), malloc as rlkit sets it, no
gradient checkpointing, the transformers engine, its reward a string comparison in process; rlkit scores in sandboxed
verifiers, writes its buffer and every rollout. Both are timed from the request for completions to the updated weights.

The last line is JSON: for each policy medians and spreads of both sides, generation and learner apart, peak memory of
the training process, `ratio` = TRL seconds / rlkit seconds (median of the rounds' ratios, with the smallest and
largest); `ratio` at the top is that of `warm`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

PROMPTS, SAMPLES, NEW_TOKENS, SKIP = 32, 8, 48, 2
TRAINED_STEPS = 60
POLICIES = ("warm", "trained")
SINGLE = ("reward", "dead", "length", "peak_gb")
OVERRIDES = [
    f"prompts_per_step={PROMPTS}",
    f"samples_per_prompt={SAMPLES}",
    f"rollout.max_completion_tokens={NEW_TOKENS}",
]
ROOMY = "model.architecture.max_position_embeddings=80"
# What rlkit tells malloc itself: freed memory is kept and not faulted in again.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
QUIET = ["evaluation.at_start=false", "evaluation.every_steps=0", "data.eval={}", "checkpoint.every_steps=1000"]
QUIET += ["telemetry.report=false", "telemetry.console=false"]


def peak_gb() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def policy(name: str, folder: Path) -> Path:
    """The checkpoint of a policy, made now unless it is there."""
    shared = ["recipe=quickstart", *OVERRIDES, ROOMY]
    if name == "trained":
        checkpoint = folder / "trained" / "checkpoints" / f"step_{TRAINED_STEPS}"
        command = ["train", *shared, *QUIET, "name=trained", f"output_dir={folder}", f"steps={TRAINED_STEPS}"]
        if not checkpoint.exists():
            rlkit(command, folder)
        return checkpoint
    return folder / rlkit(["sft", *shared], folder).splitlines()[-1].removeprefix("warm start: ")


def rlkit(command: list[str], folder: Path) -> str:
    """Run rlkit in `folder`; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "rlkit", *command], cwd=folder, env=environment(), capture_output=True, text=True,
        check=True, timeout=1800,
    )  # fmt: skip
    return done.stdout.strip()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}


def run_rlkit(folder: Path, model: Path, steps: int, threads: int) -> dict[str, Any]:
    from rlkit.cli import main

    name = f"step-{os.environ.get('TORCHELASTIC_RUN_ID', os.getpid())}"  # the same on all ranks
    settings = [f"name={name}", f"output_dir={folder / 'runs'}", f"steps={steps}", f"learner.num_threads={threads}"]
    settings += [f"model.path={model}", "model.architecture=null", "model.alphabet=null", "sft=null"]
    settings += ["learner.learning_rate=1e-6", "learner.warmup_steps=0"]
    os.chdir(folder)
    assert main(["train", "recipe=quickstart", *OVERRIDES, *QUIET, *settings]) == 0
    if os.environ.get("RANK", "0") != "0":
        return {}
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    rows = [row for line in lines if "time/step" in (row := json.loads(line))][SKIP:]
    return {
        "step": [row["time/step"] for row in rows],
        "generation": [row["time/generate"] for row in rows],
        "learner": [row["time/learner"] for row in rows],
        "reward": statistics.fmean(row["reward/mean"] for row in rows),
        "dead": statistics.fmean(row["group/dead_frac"] for row in rows),
        "length": statistics.fmean(row["completion/length/mean"] for row in rows),
        "peak_gb": peak_gb(),
    }


def run_trl(model: Path, steps: int, threads: int, batch: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rlkit.config.compose import load
    from rlkit.data.prompts import load_prompts

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    config, _ = load("quickstart", OVERRIDES)
    prompts = load_prompts(config.data.train, tokenizer, "data.train", True).prompts
    rows = Dataset.from_list([{"prompt": p.text, "answer": p.reference} for p in prompts[: PROMPTS * (steps + 1)]])

    def correct(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [float(text.rpartition("#")[2].strip() == gold) for text, gold in zip(completions, answer, strict=True)]

    times: dict[str, list[float]] = {"step": [], "generation": []}
    rewards: list[float] = []
    lengths: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["step"].append(time.perf_counter() - self.started)

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, Any], **____: Any) -> None:
            if "reward" in logs:
                rewards.append(float(logs["reward"]))
                lengths.append(float(logs["completions/mean_length"]))

    class Timed(GRPOTrainer):
        def _generate(self, *arguments: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            out = super()._generate(*arguments, **settings)
            times["generation"].append(time.perf_counter() - started)
            return out

    with tempfile.TemporaryDirectory() as out:
        settings = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=batch,
            num_generations=SAMPLES,
            gradient_accumulation_steps=PROMPTS * SAMPLES // batch // int(os.environ.get("WORLD_SIZE", "1")),
            gradient_checkpointing=False,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=0.0,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=steps,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        # The prompts are text with the tokenizer's bos in front, as rlkit has them.
        Timed(
            model=policy, reward_funcs=correct, args=settings, train_dataset=rows, processing_class=tokenizer,
            callbacks=[Clock()],
        ).train()  # fmt: skip
    learner = [step - generation for step, generation in zip(times["step"], times["generation"], strict=False)]
    return {
        "step": times["step"][SKIP:],
        "generation": times["generation"][SKIP:],
        "learner": learner[SKIP:],
        "reward": statistics.fmean(rewards),
        "length": statistics.fmean(lengths),
        "peak_gb": peak_gb(),
    }


def measured(side: str, folder: Path, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    command = [sys.executable, *(launcher if options.ranks > 1 else []), __file__, "--side", side]
    command += ["--folder", str(folder), "--model", str(model), "--trl-batch", str(options.trl_batch)]
    env = environment() | {"OMP_NUM_THREADS": str(options.threads), **MALLOC}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]], key: str) -> dict[str, float]:
    values = sorted(value for run in runs for value in run[key])
    tenth = len(values) // 10
    return {
        "median": round(statistics.median(values), 4),
        "p10": round(values[tenth], 4),
        "p90": round(values[-1 - tenth], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"of each process; the first {SKIP} are not counted")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel processes of either side")
    parser.add_argument("--trl-batch", type=int, default=32, help="TRL's samples of one forward and backward")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "benchmark-trl")
    parser.add_argument("--side", choices=("rlkit", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.side:
        found = (
            run_rlkit(folder, options.model, options.steps, options.threads)
            if options.side == "rlkit"
            else run_trl(options.model, options.steps, options.threads, options.trl_batch)
        )
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        os._exit(0)  # gloo aborts where the interpreter ends
    folder.mkdir(parents=True, exist_ok=True)
    models = {name: policy(name, folder) for name in POLICIES}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {"trl": [], "rlkit": []} for name in POLICIES}
    for number in range(options.rounds):
        for name, model in models.items():
            for side in ("trl", "rlkit") if number % 2 == 0 else ("rlkit", "trl"):
                found = measured(side, folder, model, options)
                runs[name][side].append(found)
                print(f"round {number} {name} {side}: {statistics.median(found['step']):.3f} s a step", flush=True)
    result: dict[str, Any] = {name: compared(of_policy) for name, of_policy in runs.items()}
    print(json.dumps(result | {"ranks": options.ranks, "threads": options.threads, "ratio": result["warm"]["ratio"]}))


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of both sides on one policy, and the ratios of the rounds."""
    medians = [[statistics.median(run["step"]) for run in runs[side]] for side in ("trl", "rlkit")]
    ratios = [theirs / ours for theirs, ours in zip(*medians, strict=True)]
    sides = {
        side: {key: summary(of_side, key) for key in ("step", "generation", "learner")}
        | {key: statistics.fmean(run[key] for run in of_side) for key in of_side[0] if key in SINGLE}
        for side, of_side in runs.items()
    }
    return sides | {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}


if __name__ == "__main__":
    main()
