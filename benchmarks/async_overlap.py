"""Does sampling overlap training? One learner and one worker, each pinned to a core, at max_staleness 0 and 1.

    python benchmarks/async_overlap.py [--steps 40] [--seeds 0,1,2] [--override key=value ...]

The quickstart with the embedded engine. At 0 the two take turns: a step takes the time G of its rollouts and the time L
of its training. At 1 they can overlap, and no schedule is faster than max(G, L): the bound on the speed-up is
(G + L) / max(G, L). Runs alternate. Step times are medians, without the first three steps.

Two cores that are hyperthreads of one are slower when both are busy, which the bound does not know: `--busy` keeps the
core of whoever waits busy at 0 as well (a spinning process on each core at the lowest priority), so that G and L are
measured as they are at 1.

The last line is JSON: seconds a step, G, L, the speed-up and its share of the bound by seed, and avg@4 at 0 and 1 with
the paired difference.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED, DEADLINE_S = 3, 900.0


@contextlib.contextmanager
def pinned(core: int, command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command], stdout=output, stderr=output, env=environment
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(folder: Path, seed: int, staleness: int, options: argparse.Namespace) -> dict[str, float]:
    name = f"s{staleness}-seed{seed}"
    settings = [
        "recipe=quickstart", f"output_dir={folder}", f"name={name}", f"seed={seed}", f"max_staleness={staleness}",
        f"steps={options.steps}", "rollout.workers=1", "evaluation.every_steps=0", "evaluation.at_start=false",
        "rollout.verify_every=0", "telemetry.report=false", f"sft.cache_dir={options.cache}", *options.override,
    ]  # fmt: skip
    rlkit = [sys.executable, "-m", "rlkit"]
    spin = ["nice", "-n", "19", sys.executable, "-c", "while True: pass"]
    with contextlib.ExitStack() as stack:
        if options.busy and staleness == 0:
            for core in options.cores:
                stack.enter_context(pinned(core, spin, folder / "spin.log"))
        learner = stack.enter_context(pinned(options.cores[0], [*rlkit, "learner", *settings], folder / f"{name}.log"))
        for role in ("worker", "evaluator"):
            stack.enter_context(pinned(options.cores[1], [*rlkit, role, *settings], folder / f"{name}-{role}.log"))
        status = learner.wait(DEADLINE_S)
    if status:
        sys.exit((folder / f"{name}.log").read_text()[-3000:])
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step" in row][SKIPPED:]
    ends = [row["seconds"] for row in rows if "time/step" in row][SKIPPED - 1 :]
    (score,) = (row["eval/heldout/avg@4"] for row in rows if "eval/heldout/avg@4" in row)
    return {
        "step_s": (ends[-1] - ends[0]) / len(steps),
        "generate_s": statistics.median(row["time/wait_rollout"] for row in steps),
        "learner_s": statistics.median(row["time/step"] - row["time/wait_rollout"] for row in steps),
        "lag": statistics.fmean(row["off_policy/lag/mean"] for row in steps),
        "avg@4": score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--cores", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1])
    parser.add_argument("--cache", default="outputs/cache", help="folder of finished warm starts")
    parser.add_argument("--busy", action="store_true", help="keep both cores busy at 0 as well")
    parser.add_argument("--override", nargs="*", default=[])
    options = parser.parse_args()
    options.cache = str(Path(options.cache).absolute())
    by_seed = []
    with tempfile.TemporaryDirectory() as name:
        for seed in options.seeds:
            started, found = time.perf_counter(), {}
            for staleness in (0, 1) if seed % 2 == 0 else (1, 0):
                found[staleness] = run(Path(name), seed, staleness, options)
            generate, learn = found[0]["generate_s"], found[0]["learner_s"]
            bound, speed_up = (generate + learn) / max(generate, learn), found[0]["step_s"] / found[1]["step_s"]
            by_seed.append({
                "seed": seed, "step_s": [round(found[s]["step_s"], 3) for s in (0, 1)], "G": round(generate, 3),
                "L": round(learn, 3), "bound": round(bound, 3), "speed_up": round(speed_up, 3),
                "of_bound": round(speed_up / bound, 3), "lag": round(found[1]["lag"], 3),
                "avg@4": [round(found[s]["avg@4"], 4) for s in (0, 1)], "busy_at_1": {
                    k: round(found[1][k], 3) for k in ("generate_s", "learner_s")
                },
            })  # fmt: skip
            print(by_seed[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
    change = [x["avg@4"][1] - x["avg@4"][0] for x in by_seed]
    error = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else None
    print(json.dumps({
        "seeds": by_seed, "speed_up": round(statistics.median(x["speed_up"] for x in by_seed), 3),
        "of_bound": round(statistics.median(x["of_bound"] for x in by_seed), 3),
        "avg@4_change": round(statistics.fmean(change), 4), "avg@4_change_se": error and round(error, 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
