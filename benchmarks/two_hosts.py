"""Two hosts on one machine (Linux, root): learner and PostgreSQL in one network namespace, worker in another.

    python benchmarks/two_hosts.py [--engine vllm|embedded] [--steps 20]

Each host has a working folder of its own; only the snapshot folder is shared. After a few steps the network is cut for
30 s; later the worker's host is killed whole (every process at once, kill -9) and another one takes its place. At the
end: the run has finished, every ordinal was trained exactly once, in order, and nothing is left. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
A, B, C = "rlkit-a", "rlkit-b", "rlkit-c"  # the learner's host, the worker's, and the one that takes its place
ADDRESS = {A: "10.77.0.1", B: "10.77.0.2", C: "10.77.1.2"}
CUT_S, DEADLINE_S = 30.0, 1500.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30)


def inside(host: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{host}"]


def plug_in(host: str) -> str:
    """A worker's host on a cable of its own to A; returns A's end of it."""
    end, other = f"a-{host}", f"b-{host}"
    ip("netns", "add", host)
    ip("link", "add", end, "netns", A, "type", "veth", "peer", "name", other, "netns", host)
    ip("-n", A, "address", "add", f"{ADDRESS[A]}/32", "peer", f"{ADDRESS[host]}/32", "dev", end)
    ip("-n", host, "address", "add", f"{ADDRESS[host]}/32", "peer", f"{ADDRESS[A]}/32", "dev", other)
    for name, link in ((A, end), (host, other), (host, "lo")):
        ip("-n", name, "link", "set", link, "up")
    return end


def kill_host(name: str) -> int:
    """Every process of a host at once; returns how many there were."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=30).stdout.split()
    if found:
        subprocess.run(["kill", "-9", *found], check=False, timeout=30)
        time.sleep(1)
    subprocess.run(["ip", "netns", "del", name], check=False, timeout=30, stderr=subprocess.DEVNULL)
    return len(found)


@contextlib.contextmanager
def on(host: str, folder: Path, name: str, role: str, settings: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(exist_ok=True)
    command = [*inside(host), sys.executable, "-m", "rlkit", role, *settings, f"output_dir={folder}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(90)
        process.kill()
        process.wait()


def hosts(options: argparse.Namespace, folder: Path, snapshots: Path) -> dict[str, object]:
    import postgres
    from sqlalchemy import text

    from rlkit.buffer.database import connect, parsed

    cable = plug_in(B)
    with postgres.server(folder / "a" / "postgresql", ADDRESS[A]) as url:
        recipe = "quickstart_async" if options.engine == "vllm" else "quickstart"
        settings = [
            f"recipe={recipe}", f"steps={options.steps}", "name=two_hosts", f"buffer.url={url}", "max_staleness=2",
            f"rollout.snapshot_dir={snapshots}", "rollout.workers=1", "rollout.lease_timeout_s=20",
            "evaluation.at_start=false",
            "checkpoint.every_steps=5", f"sft.cache_dir={options.cache}", "telemetry.report=false",
        ]  # fmt: skip
        metrics, seen = folder / "a" / "two_hosts" / "metrics.jsonl", dict[str, object]()
        engine = connect(parsed(url), "two_hosts", read_only=True)

        def steps() -> int:
            return metrics.read_text().count("time/step") if metrics.exists() else 0

        def until(what: str, holds: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
            deadline = time.monotonic() + DEADLINE_S
            while not holds():
                if time.monotonic() > deadline or any(p.poll() for p in processes):
                    logs = [path.read_text(errors="replace")[-3000:] for path in folder.rglob("*.log")]
                    sys.exit(f"no {what}\n" + "\n----\n".join(logs))
                time.sleep(0.1)

        with (
            on(A, folder / "a", "learner", "learner", settings) as learner,
            on(A, folder / "a", "evaluator", "evaluator", settings),
        ):
            with on(B, folder / "b1", "workers", "workers", settings) as workers:
                until("first steps", lambda: steps() >= 4, [learner, workers])
                print(f"step {steps()}: the cable is cut for {CUT_S:.0f} s", flush=True)
                ip("-n", A, "link", "set", cable, "down")
                time.sleep(CUT_S)
                ip("-n", A, "link", "set", cable, "up")
                ip("-n", A, "route", "replace", f"{ADDRESS[B]}/32", "dev", cable)
                at, since = steps(), time.monotonic()
                until("steps after the cut", lambda: steps() >= min(at + 4, options.steps - 4), [learner, workers])
                seen["seconds_to_go_on_after_the_cut"] = round(time.monotonic() - since, 1)
                print(f"step {steps()}: host B is killed", flush=True)
                seen["processes_killed"] = kill_host(B)
            plug_in(C)
            with on(C, folder / "c", "workers", "workers", settings) as workers:
                until("end", lambda: learner.poll() is not None, [workers])
        with engine.connect() as connection:
            rows = connection.execute(
                text("SELECT ordinal, trained_step FROM groups WHERE state = 'trained' ORDER BY 1")
            ).all()
            dropped = connection.execute(text("SELECT count(*) FROM groups WHERE state = 'dropped'")).scalar_one()
            counters = connection.execute(
                text("SELECT expired_leases, fenced_writes, prompts_per_step FROM meta")
            ).one()
        engine.dispose()
    per_step = Counter(step for _, step in rows)
    P = counters.prompts_per_step
    whole = len(rows) == options.steps * P and set(per_step.values()) == {P} and len(per_step) == options.steps
    in_order = [step for _, step in rows] == sorted(step for _, step in rows)
    lags = [json.loads(line).get("off_policy/lag/max", 0.0) for line in metrics.read_text().splitlines()]
    return {
        "status": learner.returncode, "steps": steps(), "groups_trained": len(rows), "every_ordinal_once": whole,
        "in_order": in_order, "dropped": dropped, "expired_leases": counters.expired_leases,
        "fenced_writes": counters.fenced_writes, "largest_lag": max(lags), **seen,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("vllm", "embedded"), default="vllm")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cache", default="outputs/cache", help="folder of finished warm starts")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.cache = str(Path(options.cache).absolute())
    if not options.inside:
        for host in (A, B, C):
            kill_host(host)
        ip("netns", "add", A)
        ip("-n", A, "link", "set", "lo", "up")
        try:
            sys.exit(subprocess.run([*inside(A), sys.executable, *sys.argv, "--inside"]).returncode)
        finally:
            for host in (C, B, A):
                kill_host(host)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL runs under another account
        (folder / "a").mkdir()
        (folder / "snapshots").mkdir()
        print(json.dumps(hosts(options, folder, folder / "snapshots")))


if __name__ == "__main__":
    main()
