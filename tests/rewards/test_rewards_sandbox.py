"""Model output that attacks: what it asks for happens without the sandbox, and not within."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rewards import RewardError, Sample, VerifierPool
from rewards.sandbox import Sandbox

Make = Callable[..., Sample]

# How a task's scorer comes to run the answer: eval() in the first two, sympy's parse_expr, which
# evaluates what it has tokenised, in the others. The word IMPORT stands for __import__.
EVAL = "__import__"
SYMPY = "lambdify.__globals__['__builtins__']['__import__']"
TASKS = {"string_insertion": EVAL, "spiral_matrix": EVAL, "countdown": SYMPY, "polynomial_multiplication": SYMPY}
ATTACKS = {
    "system": "IMPORT('os').system('touch {mark}')",
    "open": "IMPORT('builtins').open('{mark}', 'w').close()",
    "subprocess": "IMPORT('subprocess').run(['touch', '{mark}'])",
    "unlink": "IMPORT('os').unlink('{victim}')",
    "truncate": "IMPORT('os').truncate('{victim}', 0)",
    "chmod": "IMPORT('os').chmod('{victim}', 0)",
    "connect": "IMPORT('socket').create_connection(('127.0.0.1', '{port}'))",
    "kill": "IMPORT('os').kill(IMPORT('os').getppid(), 9)",
    "fork": "IMPORT('os').fork() or (open('{mark}', 'w'), IMPORT('os')._exit(0))".replace(
        "open", "IMPORT('builtins').open"
    ),
}


def warm_pid(pool: VerifierPool) -> int | None:
    """Process id of the warm process that forks the scoring children; None while there is none."""
    zygote = pool._keeper.zygote
    return None if zygote is None else zygote.process.pid


class Scene:
    """Where an attack would leave its trace."""

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self.mark = folder / "mark"
        self.victim = folder / "victim"
        self.victim.write_text("precious")
        self.victim.chmod(0o644)
        self.listener = listener

    def answer(self, task: str, attack: str) -> str:
        text = ATTACKS[attack].replace("IMPORT", TASKS[task])
        port = self.listener.getsockname()[1]
        return text.format(mark=self.mark, victim=self.victim, port=port)

    def traces(self) -> list[str]:
        """What happened."""
        found = []
        if self.mark.exists():
            found.append("mark")
        if not self.victim.exists():
            found.append("unlinked")
        elif self.victim.stat().st_size == 0:
            found.append("truncated")
        elif self.victim.stat().st_mode & 0o777 != 0o644:
            found.append("chmod")
        try:
            self.listener.accept()[0].close()
            found.append("connected")
        except BlockingIOError:
            pass
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield Scene(tmp_path, listener)


@pytest.fixture(scope="module")
def gym() -> Iterator[VerifierPool]:
    reward = {"_target_": "rewards.reasoning_gym.ReasoningGym", "task": list(TASKS), "extract": "whole"}
    with VerifierPool({"gym": reward}, workers=1, timeout_s=5.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def entries() -> dict[str, dict[str, Any]]:
    import reasoning_gym

    return {task: json.loads(json.dumps(reasoning_gym.create_dataset(task, seed=5, size=1)[0])) for task in TASKS}


def _gym_sample(entry: dict[str, Any], completion: str) -> Sample:
    reference = str(entry["answer"])
    return Sample("", completion, reference, entry["metadata"], "stop", 1)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_through_a_scorer_has_no_effect(
    attack: str, task: str, scene: Scene, gym: VerifierPool, entries: dict[str, dict[str, Any]]
) -> None:
    entry = entries[task]
    pid = warm_pid(gym)
    right = _gym_sample(entry, str(entry["answer"] or "1"))
    attacked, neighbour = gym.score_sync([_gym_sample(entry, scene.answer(task, attack)), right])
    assert scene.traces() == []
    assert attacked.score != 1.0
    assert neighbour.parts.keys() == {"gym"} and neighbour.score is not None
    assert warm_pid(gym) == pid and gym.restarts == 0


_CONTROL = """
import json, os, sys, reasoning_gym
for task, entry, answers in json.load(sys.stdin):
    scorer = reasoning_gym.create_dataset(task, seed=5, size=1)
    for answer in answers:
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child == 0:
                scorer.score_answer(answer, entry)
                os._exit(0)
            os.waitpid(child, 0)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1])
        print("killed" if status == -9 else "unharmed", flush=True)
"""


@pytest.mark.parametrize("task", TASKS)
def test_control_the_same_attacks_work_without_the_sandbox(
    task: str, tmp_path: Path, entries: dict[str, dict[str, Any]]
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        listener.setblocking(False)
        scenes = {}
        for attack in ATTACKS:
            folder = tmp_path / attack
            folder.mkdir()
            scenes[attack] = Scene(folder, listener)
        answers = [scenes[attack].answer(task, attack) for attack in ATTACKS]
        done = subprocess.run(
            [sys.executable, "-c", _CONTROL],
            input=json.dumps([[task, entries[task], answers]]),
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        ends = dict(zip(ATTACKS, done.stdout.split(), strict=True))
        assert ends.pop("kill") == "killed" and set(ends.values()) == {"unharmed"}
        time.sleep(0.1)  # the forked child of the fork attack writes by itself
        connected = [attack for attack, scene in scenes.items() if "connected" in scene.traces()]
        assert len(connected) == 1
        del scenes["connect"], scenes["kill"]
        assert all(scene.traces() for scene in scenes.values()), scenes


@pytest.fixture(scope="module")
def told() -> Iterator[VerifierPool]:
    spec = {"told": {"_target_": "user_rewards.Misbehave"}}
    with VerifierPool(spec, workers=1, timeout_s=5.0, memory_mb=256) as pool:
        yield pool


OS, C = "__import__('os')", "__import__('ctypes').CDLL(None, use_errno=True)"


@pytest.mark.parametrize(
    "expression",
    [
        f"{OS}.fork()",
        f"{OS}.posix_spawn('/bin/true', ['true'], {{}})",
        f"{OS}.execv('/bin/true', ['true'])",
        f"{OS}.kill({OS}.getpid(), 9)",
        f"{OS}.killpg(0, 9)",
        f"{OS}.open('x', {OS}.O_RDWR | {OS}.O_CREAT)",
        f"{OS}.open('.', {OS}.O_TMPFILE | {OS}.O_RDWR)",
        f"{OS}.open('/dev/shm', {OS}.O_TMPFILE | {OS}.O_RDWR)",
        f"{OS}.memfd_create('x')",
        f"{OS}.mkdir('x')",
        f"{OS}.rename('/tmp', '/tmp2')",
        f"{OS}.symlink('/tmp', 'x')",
        f"{OS}.utime('/tmp')",
        f"{OS}.setuid(0)",
        f"{OS}.setsid()",
        f"{OS}.setpriority({OS}.PRIO_PROCESS, 0, -5)",
        "__import__('socket').socket()",
        "__import__('socket').socketpair(type=__import__('socket').SOCK_DGRAM)",
        "__import__('resource').setrlimit(0, (1, 1))",
        "__import__('fcntl').fcntl(1, __import__('fcntl').F_SETOWN, 1)",
        "__import__('multiprocessing').Pool(1)",
    ],
)
def test_refused_with_permission_error(expression: str, told: VerifierPool, sample: Make) -> None:
    (score,) = told.score_sync([sample(f"evaluate {expression}")])
    assert score.score is None
    # The resource module words EPERM in its own way.
    refusals = ("PermissionError", "not allowed to raise maximum limit")
    assert any(refusal in str(score.reason) for refusal in refusals), score


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("ptrace(0, 0, 0, 0)", -1),
        ("prctl(1, 0, 0, 0, 0)", -1),
        ("unshare(0x10000000)", -1),
        ("syscall(310, 1, 0, 0, 0, 0, 0)", -1),  # process_vm_readv on x86_64
        ("syscall(425, 8, 0)", -1),  # io_uring_setup
        ("syscall(434, 1, 0)", -1),  # pidfd_open
    ],
)
def test_raw_system_calls_fail(call: str, result: int, told: VerifierPool, sample: Make) -> None:
    (score,) = told.score_sync([sample(f"evaluate {C}.{call} == {result}")])
    assert score.score == 1.0, score


def test_the_kernel_says_that_a_child_is_confined(told: VerifierPool, sample: Make) -> None:
    """A filter (mode 2), and no new privileges through a program that is executed."""
    for line in ("Seccomp:\\t2", "NoNewPrivs:\\t1"):
        (score,) = told.score_sync([sample(f"evaluate '{line}\\n' in open('/proc/self/status').read()")])
        assert score.score == 1.0, score


def test_no_memory_beyond_the_limit(told: VerifierPool, sample: Make) -> None:
    expression = "len(bytearray({size})) == {size}"
    assert eval(expression.format(size=4 * 10**8))  # the control: here it can be had
    sizes = (10**10, 4 * 10**8, 10**8)
    huge, much, enough = told.score_sync([sample("evaluate " + expression.format(size=size)) for size in sizes])
    for refused in (huge, much):
        assert refused.score is None and "MemoryError" in str(refused.reason)
    assert enough.score == 1.0


@pytest.mark.parametrize("task", ["string_insertion", "spiral_matrix"])
def test_huge_allocation_through_a_scorer(task: str, gym: VerifierPool, entries: dict[str, dict[str, Any]]) -> None:
    entry = entries[task]
    right = _gym_sample(entry, str(entry["answer"]))
    bomb = _gym_sample(entry, "['x' * len(bytearray(10**10))]")
    peak = psutil.Process(warm_pid(gym)).memory_info().rss
    first, second = gym.score_sync([bomb, right])
    # The scorer takes its MemoryError for a malformed answer: a verdict of its own.
    assert first.score == 0.0 and second.score == 1.0
    assert psutil.Process(warm_pid(gym)).memory_info().rss < peak + 2**26


def test_fork_bomb_makes_no_process(told: VerifierPool, sample: Make) -> None:
    bomb = f"evaluate [{OS}.system(':(){{ :|:& }};:') for _ in range(100)]"
    before = len(psutil.pids())
    told.score_sync([sample(bomb)])
    assert len(psutil.pids()) < before + 20
    worker = psutil.Process(warm_pid(told))
    deadline = time.monotonic() + 2
    while len(worker.children(recursive=True)) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(worker.children(recursive=True)) <= 2  # the children that go on, one a worker


def test_scoring_processes_do_not_inherit_secrets(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2")
    spec = {"told": {"_target_": "user_rewards.Misbehave"}}
    worker_environ = f"open('/proc/%d/environ' % {OS}.getppid()).read()"
    with VerifierPool(spec, workers=1) as pool:
        texts = [
            f"evaluate {OS}.environ.get('API_TOKEN') is None",
            "evaluate 'API_TOKEN' not in open('/proc/self/environ').read()",
            f"evaluate 'API_TOKEN' not in {worker_environ}",
        ]
        assert [score.score for score in pool.score_sync([sample(text) for text in texts])] == [1.0] * 3


@pytest.mark.parametrize("batch_size", [3, 1])
def test_reach_within_a_child(batch_size: int, sample: Make) -> None:
    """Known and documented: evaluated text can forge what its process scores after it, `batch_size` samples at most."""
    forge = "evaluate setattr(__import__('user_rewards'), 'float', lambda text: 99.0) or True"
    spec = {"told": {"_target_": "user_rewards.Misbehave"}}
    with VerifierPool(spec, workers=1, batch_size=batch_size) as pool:
        scores = pool.score_sync([sample(forge), sample("value 1")])
        assert scores[1].score == (1.0 if batch_size == 1 else 99.0)
        assert pool.score_sync([sample("value 1")])[0].score == (1.0 if batch_size == 1 else 99.0)
        assert pool.score_sync([sample("value 1")])[0].score == 1.0  # the child has had its samples


def test_a_child_scores_batch_size_samples_of_any_number_of_calls(sample: Make) -> None:
    with VerifierPool({"told": {"_target_": "user_rewards.Misbehave"}}, workers=1, batch_size=3) as pool:
        pids = [score.score for count in (1, 1, 2, 5) for score in pool.score_sync([sample("pid")] * count)]
    assert [pids.index(pid) // 3 for pid in pids] == [0, 0, 0, 1, 1, 1, 2, 2, 2] and None not in pids


@pytest.mark.parametrize("endless", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2^{2^{100}}+1}"])
def test_endless_mathematics_is_a_timeout(endless: str, sample: Make) -> None:
    with VerifierPool({"math": {"_target_": "rewards.math_verify.MathVerify"}}, timeout_s=1.0) as pool:
        started = time.monotonic()
        bad, good = sample(endless, "7625597484987^2"), sample(r"\boxed{2}", "2")
        scores = pool.score_sync([good, bad, good, good])
        assert time.monotonic() - started < 8
    assert [score.score for score in scores] == [1.0, None, 1.0, 1.0]
    assert scores[1].reason == "timeout"


def test_strict_refuses_to_start_without_libseccomp(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Unable to find libseccomp")

    monkeypatch.setattr("rewards.sandbox._whitelist", missing)
    with pytest.raises(RewardError, match=r"libseccomp2.*sandbox=limits"):
        Sandbox("strict", 1, 1024)
    Sandbox("limits", 1, 1024)


def test_strict_without_pyseccomp_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(RewardError, match=r"pip install pyseccomp.*sandbox=limits"):
        Sandbox("strict", 1, 1024)


def test_limits_only_still_bounds_memory_and_ends_grandchildren(sample: Make) -> None:
    spec = {"told": {"_target_": "user_rewards.Misbehave"}}
    with (
        pytest.warns(RuntimeWarning, match="sandbox=limits"),
        VerifierPool(spec, workers=1, batch_size=2, sandbox="limits", memory_mb=256) as pool,
    ):
        daemon = f"evaluate {OS}.fork() or __import__('time').sleep(3600)"
        scores = pool.score_sync([sample("evaluate bytearray(10**10)"), sample(daemon)])
        assert "MemoryError" in str(scores[0].reason) and scores[1].score == 1.0
        worker = psutil.Process(warm_pid(pool))
        deadline = time.monotonic() + 5
        while worker.children(recursive=True) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert worker.children(recursive=True) == []


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_every_reasoning_gym_task_scores_its_reference_in_the_sandbox() -> None:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    samples, expected, tasks = [], [], []
    for task in DATASETS:
        if task == "composite":  # made of other tasks, nothing by itself
            continue
        data = reasoning_gym.create_dataset(task, seed=7)
        entry = data[0]
        if not isinstance(entry["answer"], str) or not entry["answer"].strip():
            continue  # nothing a completion could hold
        tasks.append(task)
        expected.append(data.score_answer(entry["answer"].strip(), entry))
        plain = json.loads(json.dumps(entry, default=str))
        metadata = {**plain["metadata"], "source_dataset": task, "question": plain["question"]}
        samples.append(Sample("", entry["answer"], entry["answer"], metadata, "stop", 1))
    reward = {"_target_": "rewards.reasoning_gym.ReasoningGym", "task": tasks, "extract": "whole"}
    with VerifierPool({"gym": reward}, timeout_s=10.0) as pool:
        scores = pool.score_sync(samples)
    assert len(tasks) > 90
    different = {
        task: (score, want) for task, score, want in zip(tasks, scores, expected, strict=True) if score.score != want
    }
    assert not different
