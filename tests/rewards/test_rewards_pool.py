"""The verifier pool: order, deadlines, crashes, restarts, threads and event loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import RewardError, Sample, Score, VerifierPool

Make = Callable[..., Sample]
SPEC = {"told": {"_target_": "user_rewards.Misbehave"}, "same": {"_target_": "user_rewards.equals", "weight": 0.5}}


def warm_pid(pool: VerifierPool) -> int | None:
    """Process id of the warm process that forks the scoring children; None while there is none."""
    zygote = pool._keeper.zygote
    return None if zygote is None else zygote.process.pid


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(SPEC, workers=2, timeout_s=1.0, batch_size=4) as made:
        yield made
        pid = warm_pid(made)
    assert pid is not None and not psutil.pid_exists(pid) and warm_pid(made) is None


def _scores(scores: list[Score]) -> list[float | None]:
    return [score.score for score in scores]


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@settings(max_examples=25, deadline=None)
@given(st.lists(finite, max_size=20))
def test_order_and_totals_are_kept(pool: VerifierPool, values: list[float]) -> None:
    samples = [
        Sample("", f"value {v!r}", f"value {v!r}" if i % 2 else None, {"i": i}, "stop", 1) for i, v in enumerate(values)
    ]
    scores = pool.score_sync(samples)
    assert _scores(scores) == [v + 0.5 * (i % 2) for i, v in enumerate(values)]
    assert [dict(s.parts) for s in scores] == [{"told": v, "same": float(i % 2)} for i, v in enumerate(values)]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("spin", "timeout"),
        ("sleep 60", "timeout"),
        ("segfault", "verifier crashed (signal 11)"),
        ("exit 3", "verifier exited (status 3)"),
        ("exit 0", "verifier exited (status 0)"),
        ("close-everything", "verifier closed its result pipe"),
        ("garbage", "verifier sent a malformed result"),
        ("huge-line", "verifier sent a malformed result"),
        ("value nan", "NaN from reward 'told'"),
        ("raise", "reward 'told' raised ValueError: told to"),
        ("sys.exit", "reward 'told' raised SystemExit: 0"),
    ],
)
def test_one_bad_sample_costs_only_itself(pool: VerifierPool, completion: str, reason: str, sample: Make) -> None:
    before = pool.restarts
    texts = ["value 1", completion, "value 2", "value 3"]
    scores = pool.score_sync([sample(text) for text in texts])
    assert _scores(scores) == [1.0, None, 2.0, 3.0]
    assert scores[1].reason == reason
    assert scores[1].parts["told"] is None
    assert pool.restarts == before


def test_a_second_answer_is_not_taken_for_the_next_sample(sample: Make) -> None:
    with VerifierPool(SPEC, workers=1) as pool:
        scores = pool.score_sync([sample("answer-ahead"), sample("value 1"), sample("value 2")])
    assert _scores(scores) == [7.0, None, 2.0]  # evaluated text can forge its own score, not another's
    assert scores[1].reason == "verifier answered out of turn"


def test_timeout_keeps_its_limit(pool: VerifierPool, sample: Make) -> None:
    started = time.monotonic()
    (score,) = pool.score_sync([sample("spin")])
    assert 0.9 < score.seconds < 3.0
    assert time.monotonic() - started < 4.0


def test_text_that_is_no_utf8_is_unscored(pool: VerifierPool, sample: Make) -> None:
    scores = pool.score_sync([sample("value 1"), sample("\ud800"), sample("value 2")])
    assert _scores(scores) == [1.0, None, 2.0]
    assert scores[1].reason is not None and "UTF-8" in scores[1].reason


def test_metadata_that_is_no_json_is_an_error(pool: VerifierPool, sample: Make) -> None:
    with pytest.raises(RewardError, match="sample 1: metadata must be plain JSON"):
        pool.score_sync([sample("value 1"), sample("value 1", metadata={"x": object()})])


def test_several_event_loops_in_turn_and_threads_at_once(pool: VerifierPool, sample: Make) -> None:
    samples = [sample(f"value {i}") for i in range(20)]

    async def twice() -> list[list[Score]]:
        return await asyncio.gather(pool.score(samples), pool.score(samples[::-1]))

    for _ in range(3):
        forwards, backwards = asyncio.run(twice())
        assert _scores(forwards) == _scores(backwards[::-1]) == [float(i) for i in range(20)]
    found: dict[int, list[float | None]] = {}

    def work(index: int) -> None:
        found[index] = _scores(asyncio.run(pool.score(samples)))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == {index: [float(i) for i in range(20)] for index in range(4)}


def test_the_event_loop_is_free_while_scoring(pool: VerifierPool, sample: Make) -> None:
    async def tick() -> int:
        scoring = asyncio.ensure_future(pool.score([sample("sleep 0.4")]))
        ticks = 0
        while not scoring.done():
            await asyncio.sleep(0.02)
            ticks += 1
        return ticks

    assert asyncio.run(tick()) >= 5


def test_cancelled_scoring_leaves_the_pool_usable(pool: VerifierPool, sample: Make) -> None:
    async def cancel() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.score([sample("sleep 0.5")] * 6), 0.1)

    asyncio.run(cancel())
    started = time.monotonic()
    assert _scores(pool.score_sync([sample("value 7")])) == [7.0]
    assert time.monotonic() - started < 1.2  # what nobody waits for any more is not scored


def test_pool_made_off_the_main_thread(sample: Make) -> None:
    found: list[Any] = []

    def work() -> None:
        with VerifierPool(SPEC, workers=1) as pool:
            found.extend(asyncio.run(pool.score([sample("value 4")])))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert _scores(found) == [4.0]


def test_pool_outlives_the_thread_that_made_it(sample: Make) -> None:
    made: list[VerifierPool] = []
    thread = threading.Thread(target=lambda: made.append(VerifierPool(SPEC, workers=1)))
    thread.start()
    thread.join(30)
    with made[0] as pool:
        pid = warm_pid(pool)
        assert _scores(pool.score_sync([sample("value 4")])) == [4.0]
        assert warm_pid(pool) == pid and pool.restarts == 0


def test_worker_killed_in_mid_batch_loses_no_sample(sample: Make) -> None:
    with VerifierPool(SPEC, workers=1, timeout_s=5.0) as pool:
        pid = warm_pid(pool)
        assert pid is not None
        timer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        timer.start()
        scores = pool.score_sync([sample(f"sleep {0.3}") for _ in range(4)])
        timer.join()
        assert _scores(scores) == [1.0] * 4
        assert pool.restarts == 1
        assert warm_pid(pool) not in (None, pid)


def test_sample_that_kills_the_worker_is_given_up(sample: Make) -> None:
    with pytest.warns(RuntimeWarning, match="sandbox=limits"), VerifierPool(SPEC, workers=1, sandbox="limits") as pool:
        texts = ["value 1", "kill-parent", "value 2"]
        scores = pool.score_sync([sample(text) for text in texts])
        assert _scores(scores) == [1.0, None, 2.0]
        assert scores[1].reason == "verifier worker died (killed by signal 9)"
        assert pool.restarts == 2


def test_crash_loop_stops_with_the_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewards.keeper._MAX_RESTARTS", 2)
    spec = {"bad": {"_target_": "user_rewards.BreaksAtStart", "how": "exit"}}
    with pytest.raises(RewardError, match="(?s)died 3 times in a row.*status 7.*last words"):
        VerifierPool(spec, workers=1)


def test_restart_backs_off_and_close_interrupts_it(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with VerifierPool(SPEC, workers=1) as pool:
        pid = warm_pid(pool)
        assert pid is not None
        monkeypatch.setattr("rewards.keeper._BACK_OFF_S", 60.0)
        monkeypatch.setattr("rewards.keeper._LONGEST_BACK_OFF_S", 60.0)
        os.kill(pid, signal.SIGKILL)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            waiting = threads.submit(pool.score_sync, [sample("value 1")])
            with pytest.raises(TimeoutError):
                waiting.result(1.0)
            assert warm_pid(pool) is None
            started = time.monotonic()
            pool.close()
            assert time.monotonic() - started < 5
            with pytest.raises(RewardError, match="closed"):
                waiting.result(5)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({}, "empty"),
        ({"bad": {"_target_": "user_rewards.BreaksAtStart", "how": "raise"}}, "no judge here"),
        ({"bad": {"_target_": "user_rewards.BreaksAtStart", "why": 1}}, "settings are how; 'why' is not one"),
        ({"bad": {"_target_": "user_rewards.equals", "factor": object()}}, "JSON values only"),
    ],
)
def test_worker_that_cannot_start_says_why(spec: Any, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        VerifierPool(spec, workers=2)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"workers": 0}, "workers=0"),
        ({"timeout_s": 0.0}, "timeout_s=0.0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"sandbox": "none"}, "sandbox='none'"),
        ({"memory_mb": 0}, "memory_mb=0"),
    ],
)
def test_wrong_pool_settings(setting: Any, says: str) -> None:
    with pytest.raises(RewardError, match=says):
        VerifierPool(SPEC, **setting)


def test_reward_with_threads_and_asyncio(sample: Make) -> None:
    with VerifierPool({"t": {"_target_": "user_rewards.HoldsThread"}}, workers=1) as pool:
        assert _scores(pool.score_sync([sample(str(i)) for i in range(4)])) == [0, 2, 4, 6]


def test_close_ends_what_is_running_and_fails_the_waiting(sample: Make) -> None:
    pool = VerifierPool(SPEC, workers=2, timeout_s=60.0)
    warm = psutil.Process(warm_pid(pool))
    errors: list[BaseException] = []

    def wait() -> None:
        with pytest.raises(RewardError, match="closed") as caught:
            pool.score_sync([sample("spin")] * 4)
        errors.append(caught.value)

    thread = threading.Thread(target=wait)
    thread.start()
    deadline = time.monotonic() + 10
    while len(children := warm.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(children) == 2
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5
    thread.join(5)
    assert errors
    assert not any(process.is_running() for process in [warm, *children])
    pool.close()
    with pytest.raises(RewardError, match="closed"):
        pool.score_sync([sample("value 1")])


@pytest.mark.parametrize("ending", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_workers_and_their_children_end_with_the_parent(ending: str, tmp_path: Path) -> None:
    code = f"""
import os, threading, time, sys, psutil
sys.path[:0] = {sys.path!r}
from rewards import VerifierPool, Sample
pool = VerifierPool({SPEC!r}, workers=2, timeout_s=60.0)
threading.Thread(target=pool.score_sync, daemon=True,
                 args=([Sample('', 'spin', None, {{}}, 'stop', 1)] * 4,)).start()
deadline = time.monotonic() + 10
while len(family := psutil.Process().children(recursive=True)) < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
print(*(process.pid for process in family), flush=True)
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3, done.stderr  # the warm process and two scoring children
    deadline = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, pids))


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_pool_in_a_forked_process_is_refused(pool: VerifierPool, sample: Make) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            pool.score_sync([sample("value 1")])
        except RewardError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert _scores(pool.score_sync([sample("value 1")])) == [1.0]


def test_no_folder_is_left(sample: Make) -> None:
    import tempfile

    before = set(Path(tempfile.gettempdir()).glob("rewards-*"))
    with VerifierPool(SPEC, workers=1) as pool:
        pool.score_sync([sample("value 1")])
    assert set(Path(tempfile.gettempdir()).glob("rewards-*")) <= before
