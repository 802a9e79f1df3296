"""Which weights are kept, and that a torn or foreign file is never listed."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from buffer_work import START, Buffer, finish, request, rollouts, train, verdicts
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlkit.buffer.snapshots import Snapshot
from rlkit.errors import BufferError, TrainingError
from rlkit.learner.checkpoint import checksum
from rlkit.learner.publisher import ARCHITECTURE, Publisher
from rlkit.learner.remote import RemoteRollouts
from rlkit.rollout.verification import probe_logprobs

pytestmark = pytest.mark.usefixtures("database")


def listed(version: int) -> Snapshot:
    return Snapshot(version=version, path=f"v{version}", checksum="00", size=1)


def test_the_newest_complete_one_is_served(buffer: Buffer) -> None:
    assert buffer.snapshot() is None
    buffer.stored(listed(0))
    request(buffer, 2, samples=2)
    finish(buffer, buffer.lease("a", 4, 60.0))
    train(buffer)
    assert buffer.snapshot() == listed(0)  # version 1 is published, its file is not complete
    buffer.stored(listed(1))
    assert buffer.snapshot() == listed(1)
    with pytest.raises(BufferError, match="no such live version"):
        buffer.stored(listed(2))


def test_weights_of_untrained_tokens_are_kept(buffer: Buffer) -> None:
    """P = 2, S = 1: groups 2 and 3, sampled under version 0, are trained in the second step."""
    buffer.stored(listed(0))
    request(buffer, 4, samples=2)
    finish(buffer, buffer.lease("a", 8, 60.0))
    train(buffer)
    buffer.stored(listed(1))
    assert buffer.discard() == []
    train(buffer)
    buffer.stored(listed(2))
    assert buffer.discard() == [listed(0), listed(1)]
    assert buffer.discard() == [] and buffer.snapshot() == listed(2)


def test_a_rollback_serves_the_checkpoints_weights_again(buffer: Buffer) -> None:
    """Version 1 is dead; an engine that serves it must go back to 0."""
    buffer.stored(listed(0))
    request(buffer, 2, samples=2)
    finish(buffer, buffer.lease("a", 4, 60.0))
    train(buffer)
    buffer.stored(listed(1))
    buffer.rollback(START)
    assert buffer.snapshot() == listed(0)
    with pytest.raises(BufferError, match="left it behind"):
        buffer.stored(listed(1))
    assert buffer.discard() == [listed(1)]


def test_an_engine_on_dead_weights_gets_no_lease(buffer: Buffer) -> None:
    """It took version 1 before a rollback and asks after it: what it would sample could not be handed in."""
    request(buffer, 2, samples=2)
    finish(buffer, buffer.lease("a", 4, 60.0, 0))
    train(buffer)
    buffer.rollback(START)
    request(buffer, 2, samples=2)
    assert buffer.lease("a", 4, 60.0, 1) == [] and len(buffer.lease("a", 4, 60.0, 0)) == 2


def test_leases_of_a_dead_worker_go_back_at_once(buffer: Buffer) -> None:
    request(buffer, 3, samples=2)
    lost, kept = buffer.lease("dead", 2, 60.0), buffer.lease("alive", 2, 60.0)
    assert buffer.release_all("dead") == 1 and buffer.release_all("dead") == 0
    again = buffer.lease("alive", 2, 60.0)
    assert [x.ordinal for x in again] == [x.ordinal for x in lost]
    finish(buffer, kept + again)
    with pytest.raises(BufferError):
        finish(buffer, lost)


def test_leased_work_needs_no_weights_until_it_is_handed_in(buffer: Buffer) -> None:
    buffer.stored(listed(0))
    request(buffer, 2, samples=2)
    (early, late) = buffer.lease("a", 4, 60.0)
    buffer.submit(early, rollouts(early))
    buffer.score(early, verdicts(early))
    assert buffer.discard() == []
    buffer.release([late])


def tiny() -> LlamaForCausalLM:
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8)
    return LlamaForCausalLM(LlamaConfig(**sizes))


def learner(model: LlamaForCausalLM) -> Any:
    """What the publisher asks of a learner of one rank."""
    policy = SimpleNamespace(probe=partial(probe_logprobs, model))
    it = SimpleNamespace(model=model, unwrapped=policy, accelerator=SimpleNamespace(is_main_process=True))
    it.together = lambda work: work(it)
    return it


def test_the_publisher_writes_lists_and_deletes(buffer: Buffer, tmp_path: Path) -> None:
    async def run() -> None:
        publisher, model, folder = Publisher(buffer, tmp_path / "weights", 1.0), tiny(), tmp_path / "weights"
        publisher.prepare(model)
        before = model.lm_head.weight.detach().clone()
        await publisher.publish(0, learner(model))
        with torch.no_grad():
            model.lm_head.weight += 1  # training goes on; the copy was made before
        await publisher.done()
        found = buffer.snapshot()
        assert found is not None and found.path == str(folder / "v0.safetensors")
        assert checksum(Path(found.path)) == found.checksum and Path(found.path).stat().st_size == found.size
        assert torch.equal(load_file(found.path)["lm_head.weight"], before)
        request(buffer, 2, samples=2)
        finish(buffer, buffer.lease("a", 4, 60.0))
        train(buffer)
        await publisher.publish(1, learner(model))
        await publisher.done()
        assert buffer.snapshot().version == 1  # type: ignore[union-attr]
        assert sorted(path.name for path in folder.iterdir()) == [ARCHITECTURE, "v0.safetensors", "v1.safetensors"]
        finish(buffer, buffer.lease("a", 4, 60.0))
        request(buffer, 2, samples=2)
        finish(buffer, buffer.lease("a", 4, 60.0))
        train(buffer)
        await publisher.publish(2, learner(model))
        await publisher.done()
        assert sorted(path.name for path in folder.iterdir()) == [ARCHITECTURE, "v1.safetensors", "v2.safetensors"]

    asyncio.run(run())


def test_the_file_is_written_while_the_event_loop_is_busy_training(buffer: Buffer, tmp_path: Path) -> None:
    async def run() -> bool:
        publisher = Publisher(buffer, tmp_path / "weights", 1.0)
        publisher.prepare(tiny())
        await publisher.publish(0, learner(tiny()))
        end = time.monotonic() + 30.0
        while buffer.snapshot() is None and time.monotonic() < end:
            time.sleep(0.005)  # a step with its groups at hand: nothing is awaited
        written = buffer.snapshot() is not None
        await publisher.done()
        return written

    assert asyncio.run(run())


def test_a_full_disk_or_cap_is_named_and_nothing_is_listed(buffer: Buffer, tmp_path: Path) -> None:
    async def run(most_gb: float, folder: Path) -> None:
        publisher = Publisher(buffer, folder, most_gb)
        publisher.prepare(tiny())
        await publisher.publish(0, learner(tiny()))
        await publisher.done()

    with pytest.raises(TrainingError, match=r"rollout\.snapshot_gb"):
        asyncio.run(run(1e-9, tmp_path / "weights"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        asyncio.run(run(1.0, tmp_path / "file"))
    assert buffer.snapshot() is None and [x.name for x in (tmp_path / "weights").iterdir()] == [ARCHITECTURE]


def test_runs_that_share_a_snapshot_folder_keep_out_of_each_others_files(buffer: Buffer, tmp_path: Path) -> None:
    """docs/asynchronous.md has one folder for all hosts, and any number of runs in a database."""
    (tmp_path / "v1.safetensors").write_bytes(b"another run's, or the user's own")
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    rollout = SimpleNamespace(snapshot_dir=str(tmp_path), snapshot_gb=1.0, max_completion_tokens=4, wait_s=1.0)
    run = SimpleNamespace(output_dir=str(tmp_path), name="run", rollout=rollout, data=SimpleNamespace(eval={}))
    prompts = SimpleNamespace(prompts=[SimpleNamespace(token_ids=torch.arange(3).numpy())])
    engine = SimpleNamespace(takes_turns=False)
    session = SimpleNamespace(config=run, check_stop=lambda: None, component=lambda _: engine)
    remote = RemoteRollouts.of(session, learner(LlamaForCausalLM(config)), buffer, prompts)  # type: ignore[arg-type]
    assert (tmp_path / "v1.safetensors").exists() and remote.publisher.folder == tmp_path / "run"

    async def publish() -> None:
        """With a probe each: a worker that is started late, or again, has its first update there."""
        await remote.serve(0)
        await remote.publisher.done()
        first = buffer.snapshot()
        await remote.serve(0)
        await remote.publisher.done()
        assert first is not None and first == buffer.snapshot() and first.probe is not None

    asyncio.run(publish())
