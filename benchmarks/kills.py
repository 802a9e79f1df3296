"""kill -9 of every process of an asynchronous run, at random moments: does it finish, and does the ledger add up?

    python benchmarks/kills.py [--engine embedded] [--times 10] [--seed 0] [--only worker,learner,tree]
    python benchmarks/kills.py --engine vllm --times 3        # in an environment with vLLM; server and core as well

A trial starts `rlkit train` with two workers (one with vLLM) on a tiny model, waits for a random step and a random part
of a second (or, one time in six, up to 12 s from the start), and kills

    worker, learner   that process; its supervisor has to mend it
    tree              everything at once, or the supervisor alone, which the others have to notice; in both cases the
                      same command is given again, half of the time without waiting for the others to be gone
    server, core      of vLLM: the API process or the engine core behind it

Then it waits for the end and compares: exit status 0; every ordinal that was not dropped trained exactly once, in
order, prompts_per_step a step; live versions one a step; no version published twice, no snapshot of a version with two
contents; one file of rollouts a step, of that step's groups; metrics of every step once; no process left, and no file
in /dev/shm that one of them had mapped (vLLM's, after a kill of everything at once, are counted apart: its resource
tracker is dead too). What does not hold is printed and counted. The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import TINY  # noqa: E402

from rlkit.telemetry.rollouts import read_rollouts, rollout_steps  # noqa: E402

STEPS, PER_STEP, POLL_S, GONE_S = 24, 4, 0.1, 90.0
DEADLINE_S = {"embedded": 300.0, "vllm": 900.0}
COMMON = [
    f"steps={STEPS}", f"prompts_per_step={PER_STEP}", "samples_per_prompt=8", "rollout.max_completion_tokens=24",
    "checkpoint.every_steps=3", "max_staleness=1", "evaluation.every_steps=8", "telemetry.console=false",
]  # fmt: skip
VLLM = ["recipe=quickstart_async", "rollout.workers=1", "rollout.slice_samples=8", "rollout.verify_every=4"]
MARK = "RLKIT_KILLS_TRIAL"  # environment variable that all processes of a trial inherit
SESSIONS: set[int] = set()  # of marked processes: one that gives itself a title (vLLM's) overwrites its environment


def marked(mark: str) -> list[psutil.Process]:
    """All living processes of a trial, whoever their parent is now."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            session = os.getsid(process.pid)
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes():
                SESSIONS.add(session)
            if session in SESSIONS and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def with_words(processes: list[psutil.Process], *words: str) -> list[psutil.Process]:
    """Those whose command line has one of these words."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if any(word in process.cmdline() or word == process.name() for word in words):
                found.append(process)
    return found


@dataclass
class Trial:
    """One run with one kill."""

    kind: str
    engine: str
    folder: Path
    name: str
    draw: random.Random
    versions: dict[int, float] = field(default_factory=dict)  # version -> when it was published, as first seen
    contents: dict[int, str] = field(default_factory=dict)  # version -> checksum of its snapshot, as first seen
    shared: set[str] = field(default_factory=set)  # files in /dev/shm that its processes had mapped
    wrong: list[str] = field(default_factory=list)
    moment: str = ""
    missed: bool = False  # the run had ended, or there was nobody to kill: no trial
    looked: float = 0.0
    all_at_once: bool = False
    files_left: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[bytes]:
        places = [f"output_dir={self.folder}", f"name={self.name}", f"sft.cache_dir={self.folder}/cache"]
        own = [*TINY, "rollout.workers=2"]
        if self.engine == "vllm":
            own = [*VLLM, *TINY[1:]]
        command = [sys.executable, "-m", "rlkit", "train", *own, *COMMON, *places]
        environment = os.environ | {MARK: self.name, "PYTHONPATH": str(ROOT)}
        with (self.folder / f"{self.name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    @property
    def run(self) -> Path:
        return self.folder / self.name

    def rows(self, query: str) -> list[Any]:
        """Of the buffer; [] while there is none."""
        if not (self.run / "buffer.db").exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{self.run}/buffer.db?mode=ro", uri=True, timeout=30)) as file:
            try:
                return file.execute(query).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error) or "unable to open" in str(error):
                    return []
                raise

    def watch(self) -> None:
        """What must never change: when a version was published, and what its snapshot holds."""
        for version, published, checksum in self.rows("SELECT version, published_at, checksum FROM versions"):
            if self.versions.setdefault(version, published) != published:
                self.wrong.append(f"version {version} was published twice")
            if checksum and self.contents.setdefault(version, checksum) != checksum:
                self.wrong.append(f"the snapshot of version {version} has changed")
        if time.monotonic() - self.looked > 1:
            for process in marked(self.name):
                with contextlib.suppress(psutil.Error, OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self.shared |= {
                        x.split()[-1] for x in maps.splitlines() if " /dev/shm/" in x and "deleted" not in x
                    }
            self.looked = time.monotonic()

    def until(self, process: subprocess.Popen[bytes], holds: Any, deadline_s: float) -> bool:
        """Watch until `holds()`; False where the process has ended or the time is over."""
        end = time.monotonic() + deadline_s
        while not holds():
            if process.poll() is not None or time.monotonic() > end:
                return False
            self.watch()
            time.sleep(POLL_S)
        return True

    def step(self) -> int:
        return next((step for (step,) in self.rows("SELECT step FROM meta")), -1)

    def victims(self) -> list[psutil.Process]:
        there = marked(self.name)
        if self.kind == "server":
            return with_words(there, "vllm.entrypoints.openai.api_server")
        if self.kind == "core":
            return with_words(there, "VLLM::EngineCore")
        return with_words(there, self.kind)

    def play(self) -> dict[str, float]:
        """Start, kill, mend, compare."""
        began, limit = time.monotonic(), DEADLINE_S[self.engine]
        process = self.start()
        try:
            at, late = self.draw.randrange(-3, STEPS - 3), self.draw.random()
            if at < 0 and self.kind not in ("server", "core"):
                seconds = late * 12
                self.moment = f"{seconds:.1f} s after the start"
                self.until(process, lambda: time.monotonic() - began > seconds, limit)
                self.until(process, lambda: self.kind == "tree" or self.victims(), limit)
            else:
                at = max(at, 0)
                self.moment = f"{late:.2f} s into step {at}"
                self.until(process, lambda: self.step() >= at, limit)
                time.sleep(late)
            before = self.step()
            self.missed = process.poll() is not None
            if not self.missed:
                process = self.kill(process)
            killed = time.monotonic()
            if not self.until(process, lambda: process.poll() is not None, limit) and process.poll() is None:
                self.wrong.append(f"it did not end within {limit:g} s")
            ended = time.monotonic()
            self.compare(process)
            return {"step": before, "to_kill": killed - began, "to_end": ended - killed}
        finally:
            for one in marked(self.name):
                with contextlib.suppress(psutil.Error):
                    one.kill()
            process.wait()

    def kill(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Deliver it; returns the process to wait for."""
        if self.kind != "tree":
            if not (victims := self.victims()):
                self.missed = True
                return process
            one = self.draw.choice(sorted(victims, key=lambda x: x.pid))
            one.kill()
            self.moment += f", pid {one.pid}"
            return process
        whole, wait = self.draw.random() < 0.5, self.draw.random() < 0.5
        self.moment += f", {'all at once' if whole else 'the supervisor'}, {'again when gone' if wait else 'at once'}"
        self.all_at_once = whole
        if whole:
            for one in marked(self.name):
                with contextlib.suppress(psutil.Error):
                    one.kill()
        process.kill()
        process.wait()
        if wait:
            end = time.monotonic() + GONE_S
            while (left := marked(self.name)) and time.monotonic() < end:
                time.sleep(POLL_S)
            if left:
                self.wrong.append(f"orphans: {[x.cmdline() for x in left]}")
        return self.start()

    def compare(self, process: subprocess.Popen[bytes]) -> None:
        wrong = self.wrong
        if process.poll() != 0:
            wrong.append(f"exit status {process.poll()}")
        time.sleep(0.5)
        if left := marked(self.name):
            wrong.append(f"left behind: {[' '.join(x.cmdline())[:200] for x in left]}")
        self.files_left = sorted(x for x in self.shared if Path(x).exists())
        if self.files_left and not self.all_at_once:
            wrong.append(f"left in shared memory: {self.files_left}")
        trained = self.rows("SELECT trained_step, ordinal FROM groups WHERE state = 'trained' ORDER BY 1, 2")
        ordinals = [ordinal for _, ordinal in trained]
        dropped = {ordinal for (ordinal,) in self.rows("SELECT ordinal FROM groups WHERE state = 'dropped'")}
        expected = [x for x in range(len(ordinals) + len(dropped)) if x not in dropped][: STEPS * PER_STEP]
        if ordinals != expected or len(ordinals) != STEPS * PER_STEP:
            wrong.append(f"trained: {ordinals}")
        if Counter(step for step, _ in trained) != dict.fromkeys(range(STEPS), PER_STEP):
            wrong.append("a step trained on another number of groups")
        live = self.rows("SELECT version, step FROM versions WHERE live ORDER BY version")
        if [step for _, step in live] != list(range(STEPS + 1)):
            wrong.append(f"live versions: {live}")
        if rollout_steps(self.run) != list(range(1, STEPS + 1)):
            wrong.append(f"rollouts of steps {rollout_steps(self.run)}")
        for step in rollout_steps(self.run):
            own = sorted({row["ordinal"] for row in read_rollouts(self.run, step)})
            if own != [ordinal for at, ordinal in trained if at == step - 1]:
                wrong.append(f"step_{step}.parquet holds groups {own}")
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        if [row["step"] for row in lines if "reward/mean" in row] != list(range(1, STEPS + 1)):
            wrong.append("metrics of a step are missing or there twice")
        evaluated = [row["step"] for row in lines if any(name.startswith("eval/") for name in row)]
        if sorted(evaluated) != [0, 8, 16, 24]:
            wrong.append(f"evaluated: {evaluated}")


def main() -> None:
    """Run the trials, print what happened."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    options.add_argument("--times", type=int, default=10)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", default="")
    options.add_argument("--keep", action="store_true", help="keep the folder of runs")
    given = options.parse_args()
    kinds = ["worker", "learner", "tree", *(("server", "core") if given.engine == "vllm" else ())]
    folder = Path(tempfile.mkdtemp(prefix="rlkit-kills-"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    out: dict[str, Any] = {"engine": given.engine, "times": given.times, "seed": given.seed}
    violations = 0
    try:
        for kind in [x for x in kinds if not given.only or x in given.only.split(",")]:
            ends, restarts, expired, fenced, dead, files = list[float](), 0, 0, 0, 0, 0
            for number in range(2 * given.times):
                if len(ends) == given.times:
                    break
                draw = random.Random(f"{given.seed}/{kind}/{number}")
                trial = Trial(kind, given.engine, folder, f"{kind}-{number}", draw)
                measured = trial.play()
                if trial.missed and not trial.wrong:
                    print(f"{trial.name}: {trial.moment}; nobody was there to kill, which is no trial", flush=True)
                    continue
                ends.append(measured["to_end"])
                with contextlib.suppress(OSError):
                    restarts += sum(json.loads((trial.run / "supervisor.json").read_text()).values())
                for counts in trial.rows("SELECT expired_leases, fenced_writes FROM meta"):
                    expired, fenced = expired + counts[0], fenced + counts[1]
                dead += sum(n for (n,) in trial.rows("SELECT count(*) FROM versions WHERE NOT live"))
                violations += len(trial.wrong)
                files += len(trial.files_left)
                print(f"{trial.name}: {trial.moment}; ended {measured['to_end']:.1f} s later", *trial.wrong, flush=True)
                if trial.wrong:
                    log = (folder / f"{trial.name}.log").read_text(errors="replace").splitlines()
                    print(*(f"    {line}" for line in log[-60:]), sep="\n", flush=True)
                elif not given.keep:
                    shutil.rmtree(trial.run)
            violations += len(ends) < given.times  # too many runs were over before their kill
            out[kind] = {
                "killed": len(ends), "seconds_to_end_mean": round(sum(ends) / max(1, len(ends)), 1),
                "seconds_to_end_max": round(max(ends, default=0.0), 1), "restarts": restarts, "dead_versions": dead,
                "expired_leases": expired, "fenced_writes": fenced,
                "files_left_in_shared_memory": files,
            }  # fmt: skip
    finally:
        if not given.keep and not violations:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"runs are in {folder}")
    print(json.dumps(out | {"violations": violations}))
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
