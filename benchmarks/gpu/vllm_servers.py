"""Check and measure vLLM servers against the learner, in one call; the last line is JSON.

    python benchmarks/gpu/vllm_servers.py                 # CUDA: sleep and wake; with two devices nccl as well
    python benchmarks/gpu/vllm_servers.py --device cpu    # by file and two sharded ranks, to try the script itself

For each way of sending weights: an update in flight splits long rollouts in two; the log-probs of both parts are those
of a full forward pass under the version that the server names; a probe scores the same on both sides. Measured: tokens
a second, seconds of an update, seconds to sleep and to wake up.

Then a short `rlkit train`: weights by nccl to a worker's server where there are two devices, from a learner that is
sharded over the others where there are more; its probe says whether they arrived. One worker is killed on the way.

Exit status 1 where a log-prob is off by more than 1e-4 (float32) or 5e-2 (bfloat16, other kernels), no rollout spans
two versions, or the run does not end with verified weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlkit.buffer.snapshots import Snapshot, checksum
from rlkit.config.schema import ModelConfig
from rlkit.learner.model import load_model, load_tokenizer
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.vllm_engine import VllmClient, VllmEngine
from rlkit.rollout.vllm_server import VllmServer
from rlkit.types import Rollout, SamplingParams

TRAIN_S = 900.0
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
MODEL = ModelConfig(
    architecture={
        "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "intermediate_size": 1536, "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    alphabet="0123456789+-=;#:",
)  # fmt: skip


class Run:
    """Two versions of one model, and what the server said of them."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, folder
        self.tokenizer, self.dtype = load_tokenizer(MODEL), getattr(torch, arguments.dtype)
        self.device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
        self.models = [load_model(MODEL, self.tokenizer, self.dtype, seed).to(self.device) for seed in range(2)]
        for version, model in enumerate(self.models):
            model.save_pretrained(folder / str(version))
        self.results: dict[str, Any] = {}

    def forward(self, version: int, tokens: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens)[None].to(self.device)
        with torch.no_grad():
            table = torch.log_softmax(self.models[version](input_ids=ids).logits[0, :-1].float(), -1)
        return table.gather(1, ids[0, 1:, None]).squeeze(1).cpu().numpy()

    def difference(self, requests: list[GenerationRequest], rollouts: list[Rollout]) -> float:
        prompts, worst = {r.ordinal: r.prompt_token_ids for r in requests}, 0.0
        for rollout in rollouts:
            prompt = prompts[rollout.ordinal]
            for span in rollout.version_spans:
                own = self.forward(span.version, np.concatenate([prompt, rollout.token_ids]))[len(prompt) - 1 :]
                part = slice(span.start, span.end)
                worst = max(worst, float(np.abs(own[part] - rollout.behavior_logprobs[part]).max()))
        return worst

    async def send(self, client: VllmClient, version: int) -> None:
        path = self.folder / str(version) / "model.safetensors"
        found = Snapshot(version=version, path=str(path), checksum=checksum(path), size=path.stat().st_size)
        await client.update_weights(version, found)

    async def check(self, client: VllmClient, transfer: str) -> dict[str, Any]:
        if transfer == "nccl":
            source = load_model(MODEL, self.tokenizer, self.dtype, 0).to(self.device)
            nccl = await asyncio.to_thread(client.settings.sender, client.servers[0].url, source)

            async def send(version: int) -> None:
                source.load_state_dict(self.models[version].state_dict())
                pairs = ((name, p.detach()) for name, p in source.named_parameters())
                await asyncio.to_thread(nccl.send, version, pairs)
                await client.update_weights(version, None)
        else:

            async def send(version: int) -> None:
                await self.send(client, version)

        draw = np.random.default_rng(0)
        requests = [
            GenerationRequest(ordinal=i, index=0, prompt_token_ids=draw.integers(4, 20, 32))
            for i in range(client.capacity)
        ]
        sampling = SamplingParams(temperature=1.0, max_tokens=self.arguments.tokens, seed=0, stop_token_ids=())
        await send(0)

        async def collect() -> list[Rollout]:
            return [r async for part in client.generate(requests, sampling) for r in part]

        started = time.perf_counter()
        await collect()
        plain = time.perf_counter() - started
        under_way = asyncio.create_task(collect())
        await asyncio.sleep(plain / 3)
        started = time.perf_counter()
        await send(1)
        update = time.perf_counter() - started
        rollouts = await under_way
        probe = draw.integers(4, 20, 512)
        scores = (await client.score(probe))[client.servers[0].url]
        return {
            "tokens_per_s": round(len(requests) * sampling.max_tokens / plain),
            "update_s": round(update, 3),
            "spanning_rollouts": sum(len(r.version_spans) > 1 for r in rollouts),
            "logprob_difference": self.difference(requests, rollouts),
            "probe_difference": float(np.abs(scores - self.forward(1, probe)).max()),
        }

    def run(self, name: str, transfer: str, sleep: bool, devices: str | None) -> None:
        share = 0.5 if sleep else 0.9
        settings = VllmEngine(
            max_num_seqs=self.arguments.samples, max_model_len=4096, weight_transfer=transfer, takes_turns=sleep,
            gpu_memory_utilization=share,
        )  # fmt: skip
        before = os.environ.get("CUDA_VISIBLE_DEVICES")
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
        started = time.perf_counter()
        server = VllmServer(
            settings, self.folder / "0", self.folder / f"{name}.log", seed=0, dtype=self.arguments.dtype
        )
        if before is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before

        async def all_of_it() -> dict[str, Any]:
            client = settings.open([server.url], self.tokenizer, self.folder, name)
            try:
                found = await self.check(client, transfer)
                if sleep:
                    free = torch.cuda.mem_get_info()[0]
                    for key, asleep in (("sleep_s", True), ("wake_s", False)):
                        begun = time.perf_counter()
                        await client.move(asleep)
                        found[key] = round(time.perf_counter() - begun, 3)
                        if asleep:
                            found["freed_gib"] = round((torch.cuda.mem_get_info()[0] - free) / 2**30, 2)
                    await self.send(client, 0)
                    probe = np.arange(4, 20)
                    scores = (await client.score(probe))[server.url]
                    found["after_waking_difference"] = float(np.abs(scores - self.forward(0, probe)).max())
                return found
            finally:
                await client.close()

        try:
            server.wait_ready()
            start = round(time.perf_counter() - started, 1)
            self.results[name] = asyncio.run(all_of_it()) | {"start_s": start}
        finally:
            server.close()
        print(name, self.results[name], flush=True)


def train(folder: Path, device: str, devices: int) -> dict[str, Any]:
    """Twelve steps of the quickstart with vLLM; a worker is killed after the fourth."""
    ranks = 2 if device == "cpu" else devices - 1
    command = [
        sys.executable, "-m", "rlkit", "train", "recipe=quickstart_async", "steps=12", "name=run",
        "~data.eval.heldout", "data.train.source.exclude=[]", "sft.data.source.exclude=[]",
        "evaluation.every_steps=0", f"output_dir={folder}", "sft.steps=50", "rollout.verify_every=1",
        f"rollout.engine.weight_transfer={'nccl' if device == 'cuda' else 'rlkit_file'}",
        f"learner.processes={ranks}", f"learner.sharded={str(ranks > 1).lower()}", f"learner.device={device}",
        "rollout.verify_tolerance=0.05",
    ]  # fmt: skip
    started, rows, killed = time.perf_counter(), folder / "run" / "metrics.jsonl", False
    with (folder / "train.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            while process.poll() is None and time.perf_counter() - started < TRAIN_S:
                steps = rows.read_text().count('"reward/mean"') if rows.exists() else 0
                if steps >= 4 and not killed:
                    children = psutil.Process(process.pid).children(recursive=True)
                    killed = any(x.kill() is None for x in children if "worker" in x.cmdline()[:4])
                time.sleep(0.2)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(120)
    metrics = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    verified = [row for row in metrics if row.get("weights/verified_version", -1) >= 0]
    if process.returncode:
        print((folder / "train.txt").read_text(errors="replace")[-5000:], flush=True)
    return {
        "status": process.returncode, "learner_ranks": ranks, "worker_killed": killed,
        "steps": sum("reward/mean" in row for row in metrics), "train_s": round(time.perf_counter() - started, 1),
        "verified_version": max((row["weights/verified_version"] for row in verified), default=-1),
        "probe_absdiff_max": max((row["weights/probe_absdiff_max"] for row in verified), default=None),
        "weight_sync_s": [round(x["time/weight_sync"], 3) for x in metrics if "time/weight_sync" in x][-1:],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=list(BOUNDS), default="float32")
    parser.add_argument("--samples", type=int, default=64, help="sequences at a time")
    parser.add_argument("--tokens", type=int, default=1024, help="of a completion")
    arguments = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the script without one")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), arguments)
        if arguments.device == "cpu":
            run.run("file", "rlkit_file", sleep=False, devices=None)
        elif torch.cuda.device_count() > 1:
            run.run("nccl", "nccl", sleep=False, devices="1")
        if arguments.device == "cuda":
            run.run("sleep", "rlkit_file", sleep=True, devices="0")
        trained = None
        if arguments.device == "cpu" or torch.cuda.device_count() > 1:
            trained = train(Path(folder), arguments.device, torch.cuda.device_count())
            print("train", trained, flush=True)
    found = run.results.values()
    bound = BOUNDS[arguments.dtype]
    worst = max(value for result in found for key, value in result.items() if key.endswith("difference"))
    good = worst <= bound and all(result["spanning_rollouts"] for result in found)
    if trained is not None:
        good &= trained["status"] == 0 and trained["steps"] == 12 and trained["verified_version"] >= 4
    said = {"device": arguments.device, "dtype": arguments.dtype, "bound": bound, "good": good}
    print(json.dumps({**said, **run.results, "train": trained}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
