"""vLLM servers as an engine: token ids in, token ids out, and the servers' own word which version made which token.

Every sample is a request of its own; as many are under way as the servers decode at a time. A request that is given up
here is aborted there. New weights reach a server while its requests are held (`in_flight`: they go on under the new
weights, their prefix computed again) or once they are done (`drain`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlkit.buffer.snapshots import Snapshot
from rlkit.errors import ConfigError, EngineError
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.sampler import stop_positions
from rlkit.rollout.vllm_known import Refused, Server
from rlkit.settings import Checked, choice, number
from rlkit.types import FloatArray, IntArray, Rollout, SamplingParams, VersionSpan

CONNECTION_TRIES = 3  # a connection that was not made sent nothing: only that is tried again
MISSING_LOGPROB = -9999.0  # what a server writes for NaN and -inf
SHOWN = 600  # bytes of an answer in an error
POLL_S, ABORT_S = 0.1, 5.0
GENERATE = "/inference/v1/generate"


class VllmEngine(Checked):
    """Settings of vLLM servers (a component: `open` makes the engine, `rlkit.rollout.vllm_server` the servers)."""

    urls: tuple[str, ...] = ()  # running servers, e.g. http://127.0.0.1:8000; none: rlkit starts `servers` itself
    servers: int = number(1, 1, 1024)  # servers that rlkit starts
    max_num_seqs: int = number(64, 1)  # sequences that a server decodes at a time
    max_model_len: int | None = number(None, 1)  # tokens of prompt and completion; default: the model's own limit
    update: str = choice("in_flight", "drain")  # new weights: requests go on under them, or are finished first
    weight_transfer: str = choice("rlkit_file", "nccl")  # files that server and learner see, or (GPUs) broadcast
    tensor_parallel_size: int = number(1, 1)  # devices of a server
    gpu_memory_utilization: float = number(0.9, 0.01, 1)  # share of a GPU that a server takes
    cpu_kv_cache_gib: int = number(1, 1)  # key-value cache of a server on the CPU
    takes_turns: bool = False  # on one GPU with the learner: servers sleep, their memory free, while it trains
    host: str = "127.0.0.1"  # address to listen on; whoever reaches it may set weights and run methods
    extra_args: tuple[str, ...] = ()  # further arguments of the server's command line
    start_timeout_s: float = number(600.0, 1)  # until a server answers
    request_timeout_s: float = number(1800.0, 0.1)  # until a sample is there, the server's queue included
    update_timeout_s: float = number(600.0, 0.1)  # of each call of a weight update; draining takes a completion's time
    silence_s: float = number(60.0, 1)  # a server that answers nothing for so long is given up
    in_process: ClassVar[bool] = False

    @property
    def devices(self) -> int:
        """GPUs of a worker's servers."""
        return 0 if self.urls else self.servers * self.tensor_parallel_size

    def sender(self, url: str, model: torch.nn.Module) -> Any:
        """The learner's way to a server that waits for weights."""
        from rlkit.rollout.vllm_weights import NcclSender

        return NcclSender(url, model, self.update_timeout_s)

    def open(self, urls: Sequence[str], tokenizer: Tokenizer, snapshots: Path, engine_id: str) -> VllmClient:
        """The engine on running servers that take weights from the folder `snapshots`. Call `update_weights` first."""
        if not urls:
            raise ConfigError("no server", key="rollout.engine.urls", value=urls, expected="one or more URLs")
        return VllmClient(self, tokenizer, snapshots, engine_id, [Server(url.rstrip("/")) for url in urls])


@dataclass(slots=True)
class VllmClient:
    """Implements `rlkit.rollout.engine.Engine` on vLLM servers; belongs to one event loop."""

    settings: VllmEngine
    tokenizer: Tokenizer
    snapshots: Path
    engine_id: str
    servers: list[Server]
    in_flight: ClassVar[bool] = True
    _client: httpx.AsyncClient = field(init=False)
    _places: asyncio.Queue[Server] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        # A connection for each request: one kept open may be closed by the server just as the next request is sent.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        transport = httpx.AsyncHTTPTransport(retries=CONNECTION_TRIES, limits=limits)
        self._client = httpx.AsyncClient(transport=transport, timeout=None)  # deadlines are set around whole calls
        for server in self.servers * self.settings.max_num_seqs:
            self._places.put_nowait(server)

    @property
    def capacity(self) -> int:
        """Samples that are decoded at a time."""
        return len(self.servers) * self.settings.max_num_seqs

    @property
    def version(self) -> int:
        """Of the oldest weights that a server has; -1 before the first `update_weights`."""
        return min(server.version for server in self.servers)

    @property
    def awaiting(self) -> list[str]:
        """URLs of the servers that the learner sends weights to."""
        return [server.url for server in self.servers] if self.settings.weight_transfer == "nccl" else []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """Yield rollouts as they finish. Raises EngineError for the first that a server fails.

        Draws come from the servers' own generators: `sampling.seed` has no effect (docs/engines.md).
        """
        tasks = [asyncio.create_task(self._sample(request, sampling)) for request in requests]
        try:
            for earliest in asyncio.as_completed(tasks):
                yield [await earliest]
        finally:
            for task in tasks:
                task.cancel()  # its connection is closed, and the server aborts the request
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, request: GenerationRequest, sampling: SamplingParams) -> Rollout:
        """One rollout, from the server that has had a free place for longest.

        EngineError where the answer is not a whole completion with a log-prob and a version for every token.
        """
        server, name = await self._places.get(), uuid.uuid4().hex
        try:
            got = await self._completion(server, name, request, sampling)
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):  # a closed connection alone does not always end it there
                await self._abort(server, name)
            raise
        finally:
            self._places.put_nowait(server)
        ids, logprobs, count = got["token_ids"], np.array(got["logprobs"], dtype=np.float32), len(got["token_ids"])
        spans = [span for span in got["weight_versions"] or () if span["start"] < count]
        whole = spans and len(logprobs) == count and (logprobs > MISSING_LOGPROB).all()
        known = all(span["version"].isdigit() for span in spans)  # "default": no update yet
        if server.lost or not (whole and known and got["finish_reason"] in ("stop", "length")):
            what = f"{count} tokens, {len(logprobs)} log-probs, ended by {got['finish_reason']}, weights {spans}"
            raise server.error(server.lost or f"no whole completion of known weights: {what}")
        return Rollout(
            ordinal=request.ordinal, index=request.index, token_ids=np.array(ids, dtype=np.int64),
            behavior_logprobs=logprobs, loss_mask=np.ones(count, dtype=np.bool_), engine_id=self.engine_id,
            segments=np.zeros(count, dtype=np.int64), finish_reason=got["finish_reason"],
            text=str(self.tokenizer.decode(ids, skip_special_tokens=True)), version_spans=tuple(
                VersionSpan(version=int(s["version"]), start=s["start"], end=min(s["end"], count)) for s in spans
            ),
        )  # fmt: skip

    async def _completion(
        self, server: Server, name: str, request: GenerationRequest, sampling: SamplingParams
    ) -> dict[str, Any]:
        """The one choice of a server's answer; followed token by token for stop strings: servers have no tokenizer."""
        # Only what is listed here ends a completion, and nothing truncates the distribution.
        params: dict[str, Any] = dict(temperature=sampling.temperature, max_tokens=sampling.max_tokens, logprobs=0)
        params |= dict(stop_token_ids=sampling.stop_token_ids, ignore_eos=True, top_k=0, top_p=1.0, detokenize=False)
        follow = bool(sampling.stop_strings)
        body = {"request_id": name, "token_ids": request.prompt_token_ids.tolist(), "sampling_params": params}
        ids, logprobs, stop = list[int](), list[float](), None
        last: dict[str, Any] = {"finish_reason": None, "weight_versions": None}
        async with self._post(server, GENERATE, self.settings.request_timeout_s, body | {"stream": follow}) as answer:
            async for line in answer.aiter_lines():
                if not (line := line.removeprefix("data: ")).startswith("{"):
                    continue  # blank, or the mark of the end
                for part in self._read(server, line, "choices"):
                    done = len(ids)
                    ids += part["token_ids"]
                    logprobs += [token["logprob"] for token in part["logprobs"]["content"]]
                    last = part
                    if follow and stop is None and part["token_ids"]:
                        lengths, stopped = stop_positions(torch.tensor([ids]), done, sampling, self.tokenizer)
                        stop = int(lengths[0]) if stopped[0] else None
                        if stop and part["finish_reason"] is None:  # it still says which versions made the tokens
                            await self._abort(server, name)
        reason = last["finish_reason"] if stop is None else "stop"
        return last | {"token_ids": ids[:stop], "logprobs": logprobs[:stop], "finish_reason": reason}

    async def _abort(self, server: Server, name: str) -> None:
        await self._call(server, "/abort_requests", {"request_ids": [f"generate-tokens-{name}"]}, timeout_s=ABORT_S)

    async def score(self, token_ids: IntArray) -> dict[str, FloatArray]:
        """Log-probs of tokens 1, 2, ... of a sequence given those before, [T - 1] by server URL: to verify weights."""
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        body, scores = {"token_ids": token_ids.tolist(), "sampling_params": params}, {}
        for server in self.servers:
            rows = self._read(server, await self._call(server, GENERATE, body), "prompt_logprobs")
            pairs = zip(token_ids[1:], rows[1:], strict=True)
            scores[server.url] = np.array([row[str(token)]["logprob"] for token, row in pairs], dtype=np.float32)
            if server.url in self.awaiting:
                await self._arrival(server, server.version)  # the learner may have sent others meanwhile
        return scores

    async def healthy(self) -> None:
        """Every server's engine core answers between two of its steps, or EngineError."""
        limit_s = self.settings.silence_s
        for server in self.servers:
            try:
                (await self._client.get(f"{server.url}/is_sleeping", timeout=limit_s)).raise_for_status()
            except httpx.HTTPError as error:
                raise server.error(f"it was silent for {limit_s:g} s: {error!r}") from error

    async def update_weights(self, version: int, snapshot: Snapshot | None) -> None:
        """Serve `version` from a file that server and learner both see; by nccl, wait for the learner.

        A server that refuses it goes on with its old weights; one that does not say what it did is not used again.
        Raises EngineError in both cases, once all servers are done.
        """
        if self.settings.weight_transfer == "nccl":
            updates = [self._arrival(server, version) for server in self.servers]
        elif snapshot is None:
            raise EngineError("a vLLM server needs a snapshot file", key="version", value=version)
        else:
            info = {"path": str(Path(snapshot.path).resolve()), "checksum": snapshot.checksum}
            updates = [self._update(server, version, info) for server in self.servers]
        for failed in await asyncio.gather(*updates, return_exceptions=True):
            if failed is not None:
                raise failed

    async def _arrival(self, server: Server, version: int) -> None:
        """Until the learner has sent `version` or a newer one (`rlkit.learner.broadcast`)."""
        try:
            async with asyncio.timeout(self.settings.update_timeout_s):
                while True:  # of a learner that was started again, it may have had newer ones before
                    answer = await self._client.get(f"{server.url}/weight_info")
                    label = self._read(server, answer.text, "weight_version")
                    server.version = int(label) if label.isdigit() else -1
                    if server.version >= version:
                        return
                    await asyncio.sleep(POLL_S)
        except (TimeoutError, httpx.HTTPError) as error:
            raise server.error(f"version {version} did not arrive: {type(error).__name__} {error}") from error

    async def _update(self, server: Server, version: int, info: dict[str, str]) -> None:
        init, doubt = {"init_info": {"folder": str(self.snapshots.resolve())}}, None
        await self._call(server, "/init_weight_transfer_engine", init)
        try:
            await self._call(server, f"/pause?mode={'keep' if self.settings.update == 'in_flight' else 'wait'}")
            await self._call(server, "/start_weight_update")
            doubt = f"nobody knows whether it has the weights of version {server.version} or {version}"
            try:
                await self._call(server, "/update_weights", {"update_info": info})
            except Refused:
                doubt = None
                raise
            await self._call(server, "/finish_weight_update", {"weight_version": str(version)})
            server.version, doubt = version, None
        finally:
            server.lost = doubt  # what it samples from now on is not used
            try:
                await asyncio.shield(self._call(server, "/resume", timeout_s=self.settings.silence_s))
            except BaseException:
                server.lost = doubt or "it may be paused for ever"
                raise

    async def move(self, asleep: bool) -> None:
        """Finish what is under way and free the GPU (weights wait in main memory), or take it back."""
        path = "/sleep?level=1&mode=wait" if asleep else "/wake_up"
        await asyncio.gather(*(self._call(server, path) for server in self.servers))

    async def close(self) -> None:
        """Close the connections; the servers go on."""
        await self._client.aclose()

    async def _call(self, server: Server, path: str, body: Any = None, timeout_s: float | None = None) -> str:
        """The answer to a call that takes no sample's time."""
        async with self._post(server, path, timeout_s or self.settings.update_timeout_s, body) as answer:
            return (await answer.aread()).decode()

    @contextlib.asynccontextmanager
    async def _post(self, server: Server, path: str, timeout_s: float, body: Any) -> AsyncIterator[httpx.Response]:
        """An answer of status 200, to be read within `timeout_s` of its request; EngineError for any other, or none."""
        if server.lost and path != "/resume":
            raise server.error(server.lost)
        try:
            async with asyncio.timeout(timeout_s), self._client.stream("POST", server.url + path, json=body) as answer:
                if not answer.is_success:
                    text = (await answer.aread())[:SHOWN].decode(errors="replace")
                    raise server.error(f"{path}: status {answer.status_code}: {text}", Refused)
                yield answer
        except (TimeoutError, httpx.HTTPError) as error:
            late = isinstance(error, TimeoutError)
            what = f"no answer within {timeout_s:g} s" if late else f"{type(error).__name__} {error}"
            raise server.error(f"{path}: {what}") from error

    def _read(self, server: Server, text: str, key: str) -> Any:
        try:
            return json.loads(text)[key]
        except (ValueError, KeyError) as error:
            raise server.error(f"no {key} in its answer {text[:SHOWN]}") from error
