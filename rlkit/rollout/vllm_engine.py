"""vLLM servers as an engine: token ids in, token ids out, and the servers' own word which version made which token.

Every sample is a request of its own; as many are under way as the servers decode at a time. A request that is given up
here is aborted there. New weights reach a server while its requests are held (`in_flight`: they go on under the new
weights, their prefix computed again) or once they are done (`drain`).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlkit.errors import ConfigError, EngineError
from rlkit.rollout.engine import GenerationRequest
from rlkit.rollout.sampler import stop_positions
from rlkit.settings import Checked, choice, number
from rlkit.types import FloatArray, IntArray, Rollout, SamplingParams, VersionSpan

CONNECTION_TRIES = 3  # a connection that was not made sent nothing: only that is tried again
IDLE_CONNECTION_S = 2.0  # below the 5 s after which a server closes one, which would race with the next request
MISSING_LOGPROB = -9999.0  # what a server writes for NaN and -inf
BODY_CHARACTERS = 600  # of an answer, in an error


@dataclass(frozen=True, slots=True)
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
    sleep_mode: bool = False  # the server can give its GPU away: learner and server on one device
    enforce_eager: bool = False  # no compilation and no CUDA graphs: starts sooner, decodes slower
    host: str = "127.0.0.1"  # address to listen on; whoever reaches it may set weights and run methods
    port: int = number(0, 0, 65535)  # 0: a free one
    extra_args: tuple[str, ...] = ()  # further arguments of the server's command line
    start_timeout_s: float = number(600.0, 1)  # until a server answers
    request_timeout_s: float = number(1800.0, 0.1)  # until a sample is there, time in the server's queue included
    update_timeout_s: float = number(600.0, 0.1)  # of each call of a weight update; draining takes a completion's time

    def open(
        self, urls: Sequence[str], tokenizer: PreTrainedTokenizerBase, snapshots: Path, engine_id: str
    ) -> VllmClient:
        """The engine on running servers; its weights have no version until `update_weights`. `snapshots`: their folder."""
        if not urls:
            problem, fix = "no server", "start some with rlkit.rollout.vllm_server, or set rollout.engine.urls"
            raise ConfigError(problem, key="rollout.engine.urls", value=urls, expected="one or more URLs", fix=fix)
        return VllmClient(self, tokenizer, snapshots, engine_id, [Server(url.rstrip("/")) for url in urls])


class Refused(EngineError):
    """A server's answer has another status than 200."""


_T = TypeVar("_T")


class _Token(msgspec.Struct):
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: str | None = None
    weight_versions: list[_Span] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class _Scores(msgspec.Struct):
    prompt_logprobs: list[dict[str, _Token] | None]


@dataclass(slots=True)
class Server:
    """What the engine knows of one server."""

    url: str
    version: int = -1  # of its weights; -1: not known
    lost: str | None = None  # why it cannot be used: an update whose outcome is not known


@dataclass(slots=True)
class VllmClient:
    """Implements `rlkit.rollout.engine.Engine` on vLLM servers; belongs to one event loop."""

    settings: VllmEngine
    tokenizer: PreTrainedTokenizerBase
    snapshots: Path
    engine_id: str
    servers: list[Server]
    _client: httpx.AsyncClient = field(init=False)
    _slots: asyncio.Queue[Server] = field(init=False)
    _numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        limits = httpx.Limits(max_connections=None, keepalive_expiry=IDLE_CONNECTION_S)
        transport = httpx.AsyncHTTPTransport(retries=CONNECTION_TRIES, limits=limits)
        self._client = httpx.AsyncClient(transport=transport, timeout=None)  # deadlines are set around whole calls
        self._slots = asyncio.Queue()
        for server in self.servers * self.settings.max_num_seqs:
            self._slots.put_nowait(server)

    @property
    def capacity(self) -> int:
        """Samples that are decoded at a time."""
        return len(self.servers) * self.settings.max_num_seqs

    @property
    def version(self) -> int:
        """Of the weights of all servers, the oldest; -1 before the first `update_weights`."""
        return min(server.version for server in self.servers)

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> AsyncGenerator[list[Rollout], None]:
        """Yield rollouts as they finish. Raises EngineError for the first that a server fails.

        Draws come from the servers' own generators: `sampling.seed` has no effect (on the CPU, vLLM dies of a
        request's seed once it computes its prefix again).
        """
        finished: asyncio.Queue[asyncio.Task[Rollout]] = asyncio.Queue()
        tasks = [asyncio.create_task(self._sample(request, sampling)) for request in requests]
        for task in tasks:
            task.add_done_callback(finished.put_nowait)
        try:
            remaining = len(tasks)
            while remaining:
                done = [await finished.get()]
                while not finished.empty():
                    done.append(finished.get_nowait())
                remaining -= len(done)
                yield [task.result() for task in done]
        finally:
            for task in tasks:
                task.cancel()  # closes its connection, on which the server aborts the request
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, request: GenerationRequest, sampling: SamplingParams) -> Rollout:
        """One rollout, on the server that has had a free place for longest."""
        name = f"{self.engine_id}-{request.ordinal}-{request.index}-{next(self._numbers)}"
        # Only what is listed here ends a completion, and nothing truncates the distribution.
        params = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "logprobs": 0, "top_k": 0}
        params |= {"stop_token_ids": sampling.stop_token_ids, "ignore_eos": True, "top_p": 1.0, "detokenize": False}
        body = {"request_id": name, "token_ids": request.prompt_token_ids.tolist(), "sampling_params": params}
        server = await self._slots.get()
        try:
            if sampling.stop_strings:
                chosen = await self._watched(server, body, sampling)
            else:
                answer = await self._call(server, "/inference/v1/generate", self.settings.request_timeout_s, body)
                chosen = self._decoded(server, answer, _Answer).choices[0]
        finally:
            self._slots.put_nowait(server)
        if server.lost is not None:
            raise self._error(server, server.lost)
        return self._rollout(server, request, chosen)

    async def _watched(self, server: Server, body: dict[str, Any], sampling: SamplingParams) -> _Choice:
        """A completion followed token by token, and ended at the first stop string: servers have no tokenizer."""
        whole = _Choice([], _Logprobs([]))
        stop: int | None = None

        async def follow(response: httpx.Response) -> None:
            nonlocal stop
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                for part in self._decoded(server, line[6:].encode(), _Answer).choices:
                    done = len(whole.token_ids)
                    whole.token_ids += part.token_ids
                    whole.logprobs.content += part.logprobs.content
                    whole.finish_reason, whole.weight_versions = part.finish_reason, part.weight_versions
                    if stop is None and part.token_ids:
                        tokens = torch.tensor([whole.token_ids])
                        lengths, stopped = stop_positions(tokens, done, sampling, self.tokenizer)
                        if stopped[0]:
                            stop = int(lengths[0])
                            if part.finish_reason is None:
                                names = {"request_ids": [f"generate-tokens-{body['request_id']}"]}
                                await self._call(server, "/abort_requests", self.settings.request_timeout_s, names)

        stream = body | {"stream": True}
        await self._call(server, "/inference/v1/generate", self.settings.request_timeout_s, stream, follow)
        if stop is not None:
            whole.token_ids, whole.finish_reason = whole.token_ids[:stop], "stop"
            whole.logprobs.content = whole.logprobs.content[:stop]
        return whole

    def _rollout(self, server: Server, request: GenerationRequest, chosen: _Choice) -> Rollout:
        """Raises EngineError where the answer is not a whole completion with a version and a log-prob for each token."""
        count = len(chosen.token_ids)
        logprobs = np.array([token.logprob for token in chosen.logprobs.content], dtype=np.float32)
        spans = [s for s in chosen.weight_versions or () if s.start < count]
        whole = len(logprobs) == count > 0 and bool(spans) and (logprobs > MISSING_LOGPROB).all()
        if not whole or chosen.finish_reason not in ("stop", "length") or not all(s.version.isdigit() for s in spans):
            versions = [s.version for s in spans]
            problem = f"no whole completion: {count} tokens, {len(logprobs)} log-probs, ended by {chosen.finish_reason}"
            raise self._error(server, f"{problem}, weights of versions {versions} (has it had an update?)")
        return Rollout(
            ordinal=request.ordinal, index=request.index, token_ids=np.array(chosen.token_ids, dtype=np.int64),
            behavior_logprobs=logprobs, loss_mask=np.ones(count, dtype=np.bool_),
            segments=np.zeros(count, dtype=np.int64), engine_id=self.engine_id,
            text=self.tokenizer.decode(chosen.token_ids, skip_special_tokens=True), finish_reason=chosen.finish_reason,
            version_spans=tuple(VersionSpan(version=int(s.version), start=s.start, end=min(s.end, count)) for s in spans),
        )  # fmt: skip

    async def score(self, token_ids: IntArray) -> dict[str, FloatArray]:
        """Log-probs of tokens 1, 2, ... of a sequence given those before, [T - 1] by server URL, to verify weights."""
        params = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": token_ids.tolist(), "sampling_params": params}

        async def one(server: Server) -> FloatArray:
            answer = await self._call(server, "/inference/v1/generate", self.settings.request_timeout_s, body)
            table = self._decoded(server, answer, _Scores).prompt_logprobs[1:]
            pairs = zip(token_ids[1:], table, strict=True)
            return np.array([(scores or {})[str(token)].logprob for token, scores in pairs], dtype=np.float32)

        return dict(zip((s.url for s in self.servers), await asyncio.gather(*map(one, self.servers)), strict=True))

    async def update_weights(self, version: int, snapshot: Path | None, checksum: str | None = None) -> None:
        """Serve `version` from the file `snapshot`, whose xxh3-128 (hex) is `checksum`.

        A server that refuses it goes on with its old weights and says so in the EngineError; one that gives no answer
        is not used again, since nobody knows what it serves.
        """
        if snapshot is None or checksum is None:
            raise EngineError("a vLLM server needs a snapshot file and its checksum", key="version", value=version)
        init = {"folder": str(self.snapshots.resolve())}
        info = {"path": str(snapshot.resolve()), "checksum": checksum}
        results = await asyncio.gather(
            *(self._update(s, version, init, info) for s in self.servers), return_exceptions=True
        )
        for result in results:
            if result is not None:
                raise result

    async def _update(self, server: Server, version: int, init: dict[str, str], info: dict[str, str]) -> None:
        async def call(path: str, body: Any = None) -> None:
            await self._call(server, path, self.settings.update_timeout_s, body)

        await call("/init_weight_transfer_engine", {"init_info": init})
        started = loaded = False
        try:
            await call(f"/pause?mode={'keep' if self.settings.update == 'in_flight' else 'wait'}")
            await call("/start_weight_update")
            started = True
            await call("/update_weights", {"update_info": info})
            loaded = True
            await call("/finish_weight_update", {"weight_version": str(version)})
            server.version = version
        except BaseException as error:
            if loaded or (started and not isinstance(error, Refused)):
                server.lost = f"nobody knows whether it serves version {version} or {server.version}: {error}"
            raise
        finally:
            try:
                await asyncio.shield(call("/resume"))
            except BaseException as error:
                server.lost = server.lost or f"it may be paused for ever: {error}"
                raise

    async def sleep(self) -> None:
        """Finish what is under way and give the GPU away; weights wait in main memory. Needs `sleep_mode`."""
        await self._placed("/sleep?level=1&mode=wait")

    async def wake_up(self) -> None:
        """Take the GPU back."""
        await self._placed("/wake_up")

    async def _placed(self, path: str) -> None:
        if not self.settings.sleep_mode:
            raise EngineError(
                "servers sleep on GPUs only", key="rollout.engine.sleep_mode", value=False, expected="true"
            )
        await asyncio.gather(*(self._call(server, path, self.settings.update_timeout_s) for server in self.servers))

    async def close(self) -> None:
        """Close the connections; the servers go on."""
        await self._client.aclose()

    async def _call(
        self, server: Server, path: str, timeout_s: float, body: Any = None,
        follow: Callable[[httpx.Response], Awaitable[None]] | None = None,
    ) -> bytes:  # fmt: skip
        """POST; the answer's body, or b"" where `follow` has read it. EngineError for any other status, or none."""
        if server.lost is not None:
            raise self._error(server, server.lost)
        content = b"" if body is None else msgspec.json.encode(body)
        url, headers = f"{server.url}{path}", {"content-type": "application/json"}
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client.stream("POST", url, content=content, headers=headers) as got,
            ):
                if follow is not None and got.is_success:
                    await follow(got)
                    return b""
                answer = await got.aread()
        except (TimeoutError, httpx.HTTPError) as error:
            late = isinstance(error, TimeoutError)
            what = f"no answer within {timeout_s:g} s" if late else f"{type(error).__name__} {error}"
            raise self._error(server, f"{path}: {what}") from error
        if not got.is_success:
            raise self._error(server, f"{path}: status {got.status_code}: {answer[:BODY_CHARACTERS]!r}", kind=Refused)
        return answer

    def _decoded(self, server: Server, answer: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(answer, type=kind)
        except msgspec.DecodeError as error:
            raise self._error(server, f"not understood ({error}): {answer[:BODY_CHARACTERS]!r}") from error

    def _error(self, server: Server, problem: str, kind: type[EngineError] = EngineError) -> EngineError:
        return kind(problem, key="server", value=server.url, fix="see the server's log; start it again if it has ended")
