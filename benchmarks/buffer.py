"""What the buffer carries: whole lives of groups a second, with workers in processes of their own.

    python benchmarks/buffer.py [--groups 4000] [--workers 4]

A group is 8 rollouts of 1,024 tokens; it is requested, leased, handed in, scored, taken, trained and committed. The
learner (this process) trains 32 groups a step and commits every 10 steps; workers only make the records, with no engine
behind them, so that the buffer alone is measured. Once on SQLite in a temporary folder, once on a PostgreSQL server
that the script starts and ends. The last line is JSON: groups a second of both, and the most megabytes that payloads
and database took at a commit (of PostgreSQL, its own account of the database's size).
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import postgres  # noqa: E402

from rlkit.buffer.protocol import GroupRequest  # noqa: E402
from rlkit.buffer.sql import SqlBuffer  # noqa: E402
from rlkit.types import Prompt, Rollout, Verdict, VersionSpan  # noqa: E402

SAMPLES, TOKENS, PER_STEP, COMMIT_STEPS, STALENESS = 8, 1024, 32, 10, 2
DEADLINE_S = 900.0


def opened(url: str, folder: Path) -> SqlBuffer:
    return SqlBuffer(
        url, payload_dir=folder / "payloads", run="benchmark", prompts_per_step=PER_STEP, max_staleness=STALENESS,
        slice_samples=SAMPLES,
    )  # fmt: skip


def work(url: str, folder: Path, number: int) -> None:
    """A worker: lease, hand in, score, until it is ended."""
    buffer, draw = opened(url, folder), np.random.default_rng(number)
    tokens = draw.integers(0, 150_000, TOKENS)
    logprobs = -draw.exponential(size=TOKENS).astype(np.float32)
    whole, zeros = np.ones(TOKENS, np.bool_), np.zeros(TOKENS, np.int64)
    while True:
        leases = buffer.lease(f"worker-{number}", 64, 60.0)
        if not leases:
            time.sleep(0.002)
            continue
        rollouts = [
            [
                Rollout(
                    ordinal=x.ordinal, index=i, token_ids=tokens, behavior_logprobs=logprobs, loss_mask=whole,
                    segments=zeros, version_spans=(VersionSpan(version=x.min_version, start=0, end=TOKENS),),
                    finish_reason="stop", engine_id="none", text="",
                )
                for i in range(x.start, x.stop)
            ]
            for x in leases
        ]  # fmt: skip
        buffer.submit_many(list(zip(leases, rollouts, strict=True)))
        buffer.score_many([(x, [Verdict(score=float(i % 2)) for i in range(x.start, x.stop)]) for x in leases])


def size_mb(buffer: SqlBuffer, folder: Path) -> float:
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if buffer._db.is_file:
        return files / 1e6
    with buffer._db.read() as connection:
        return float(connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()) / 1e6


def measure(url: str, folder: Path, groups: int, workers: int) -> dict[str, float]:
    buffer = opened(url, folder)
    prompt = Prompt(id="p", text="?", token_ids=np.arange(64), reference="1", metadata={})
    processes = [multiprocessing.Process(target=work, args=(url, folder, n), daemon=True) for n in range(workers)]
    for process in processes:
        process.start()
    try:
        started, step, sizes = time.perf_counter(), 0, []
        while step * PER_STEP < groups:
            if room := buffer.capacity():
                first = buffer.stats().next_ordinal
                buffer.request([GroupRequest(ordinal=first + k, prompt=prompt, samples=SAMPLES) for k in range(room)])
            while (taken := buffer.take(PER_STEP)) is None:
                assert time.perf_counter() - started < DEADLINE_S and all(p.is_alive() for p in processes)
                time.sleep(0.002)
            step += 1
            buffer.publish(step, [group.ordinal for group in taken])
            if step % COMMIT_STEPS == 0:
                sizes.append(round(size_mb(buffer, folder), 1))
                buffer.commit(buffer.watermark())
        seconds = time.perf_counter() - started
    finally:
        for process in processes:
            process.kill()
            process.join(10)
        buffer.close()
    parts = [sizes[k * len(sizes) // 8 : (k + 1) * len(sizes) // 8] for k in range(8)]
    print("largest MB at a commit, by eighths of the run:", [max(part, default=None) for part in parts], flush=True)
    return {"groups_per_s": round(step * PER_STEP / seconds, 1), "largest_mb": max(sizes, default=0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(folder, 0o755)  # PostgreSQL runs under another account
        found["sqlite"] = measure(
            f"sqlite:///{folder}/sqlite/buffer.db", folder / "sqlite", options.groups, options.workers
        )
        print("sqlite", found["sqlite"], flush=True)
        with postgres.server(folder / "postgresql") as url:
            found["postgresql"] = measure(url, folder / "beside", options.groups, options.workers)
        print("postgresql", found["postgresql"], flush=True)
    print(json.dumps({f"{kind}_{key}": value for kind, figures in found.items() for key, value in figures.items()}))


if __name__ == "__main__":
    main()
