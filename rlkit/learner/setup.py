"""What training, warm start, evaluation and parity checks set up alike."""

import contextlib
import ctypes
import dataclasses
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import filelock
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewards.base import Sample
from rewards.pool import VerifierPool
from rlkit.buffer.sql import SqlBuffer
from rlkit.config.components import build, import_target
from rlkit.config.schema import Config, ModelConfig, RewardConfig
from rlkit.data.prompts import PromptSet, load_prompts
from rlkit.errors import ConfigError, Interrupted, RlkitError
from rlkit.learner.model import load_model, load_tokenizer, resolve_dtype
from rlkit.learner.policy import Policy
from rlkit.learner.update import Learner, Objective, never_stop
from rlkit.rollout.engine import Engine
from rlkit.types import Prompt, SamplingParams

REPEAT_S = 0.5  # a second signal within this is the first one again, and not a wish to leave at once
RANK_TIMEOUT = timedelta(hours=2)  # for ranks that wait for the slowest one's samples, or for rank 0's scores
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True, slots=True)
class Session:
    """What every command works with, on one rank."""

    config: Config
    resolved: Mapping[str, Any]  # the same as plain values, for files and sinks
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    check_stop: Callable[[], None]

    @classmethod
    def open(cls, config: Config, resolved: Mapping[str, Any], check_stop: Callable[[], None] = never_stop) -> Self:
        """Start this rank: threads, determinism, device and precision, then the process group if there is one."""
        learner = config.learner
        transformers.logging.disable_progress_bar()  # bars of a millisecond in the logs of every checkpoint
        if learner.num_threads is not None:
            torch.set_num_threads(learner.num_threads)
        if learner.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        on_gpu = learner.device != "cpu" and torch.cuda.is_available()
        if learner.device == "cuda" and not on_gpu:
            problem, fix = "no CUDA device is visible", "set learner.device=auto"
            raise ConfigError(problem, key="learner.device", value="cuda", fix=fix)
        # glibc's malloc, where it is one, would give every large tensor's memory back and fault it in again.
        if not on_gpu and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
            mallopt(M_MMAP_THRESHOLD, 2**26)
            mallopt(M_TRIM_THRESHOLD, 2**30)
        precision = learner.mixed_precision
        if precision == "auto":
            precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"
        # Language models have no buffers that training changes.
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        handlers = [InitProcessGroupKwargs(timeout=RANK_TIMEOUT), ddp]
        accelerator = Accelerator(cpu=not on_gpu, mixed_precision=precision, kwargs_handlers=handlers)
        return cls(config, resolved, accelerator, load_tokenizer(config.model), check_stop)

    def component(self, key: str) -> Any:
        """What the recipe has at a key, made; None where that is null."""
        spec = operator.attrgetter(key)(self.config)
        return None if spec is None else build(spec, key=key)

    def policy(self, source: ModelConfig, seed: int, temperature: float) -> Policy:
        """A model in the recipe's dtype, on the CPU, with the log-prob head; `seed` is that of weights made new."""
        dtype = resolve_dtype(self.config.model.dtype, self.accelerator.device)
        model = load_model(source, self.tokenizer, dtype, seed)
        return Policy(model, temperature=temperature, chunk_logits=self.config.learner.logprob_chunk_logits)

    def learner(self, source: ModelConfig, start: ModelConfig) -> Learner:
        """The learner of the weights `source`; a reference model, where the KL needs one, from `start`."""
        config = self.config
        objective = Objective(
            **{name: self.component(f"algorithm.{name}") for name in ("loss", "aggregation", "kl")},
            old_policy=self.component("old_policy"), likelihood=self.component("reward.likelihood"),
            entropy_coefficient=config.algorithm.entropy_coefficient,
        )  # fmt: skip
        made = partial(self.policy, seed=config.seed, temperature=config.rollout.temperature)
        policy, device = made(source), self.accelerator.device
        reference = made(start).requires_grad_(False).to(device) if objective.kl.needs_reference else None
        return Learner(policy, reference, objective, config.learner, self.accelerator, config.steps)

    def engine(self, model: PreTrainedModel, key: str = "rollout.engine") -> Engine:
        """The recipe's inference engine, on the weights of `model`."""
        settings, rank = self.component(key), self.accelerator.process_index
        if not settings.in_process:
            problem, value = "here the model itself is sampled from", type(settings).__name__
            raise ConfigError(
                problem, key=key, value=value, fix="rollout=embedded, or (rlkit eval) an evaluation.engine"
            )
        return cast(Engine, settings.open(model, self.tokenizer, self.check_stop, rank))

    def sampling(self, temperature: float, seed: int) -> SamplingParams:
        """Sampling with the recipe's limits and stops."""
        rollout, end = self.config.rollout, int(self.tokenizer.eos_token_id)
        return SamplingParams(
            temperature=temperature, seed=seed, max_tokens=rollout.max_completion_tokens,
            stop_token_ids=(end,), stop_strings=tuple(rollout.stop),
        )  # fmt: skip

    def prompt_sets(self) -> tuple[PromptSet, dict[str, PromptSet]]:
        """Training prompts and held-out sets. A reward without `needs_reference = False` or a likelihood needs one."""
        data, reward = self.config.data, self.config.reward
        targets = (import_target(spec["_target_"], f"reward.rewards.{name}") for name, spec in reward.rewards.items())
        needed = bool(reward.likelihood) or any(getattr(target, "needs_reference", True) for target in targets)
        held_out = {k: load_prompts(d, self.tokenizer, f"data.eval.{k}", needed) for k, d in data.eval.items()}
        return load_prompts(data.train, self.tokenizer, "data.train", needed), held_out


def interruptible(body: Callable[[Callable[[], None]], None]) -> int:
    """Run `body(check_stop)`; return 0, or 128 + signal number after SIGINT or SIGTERM, as a shell reports it.

    The first signal is acted on at the next safe point, where `check_stop` raises Interrupted, a second one at once.
    """
    received: list[tuple[signal.Signals, float]] = []  # with the time

    def handle(number: int, frame: object) -> None:
        # os.write: print is not safe inside a signal handler.
        if received and time.monotonic() - received[0][1] < REPEAT_S:
            return  # the same request: Ctrl-C reaches a group and its leader, a parent's death every child thrice
        if received:
            os.write(sys.stderr.fileno(), b"\nsecond signal: leaving at once\n")
            os._exit(128 + number)
        received.append((signal.Signals(number), time.monotonic()))
        os.write(sys.stderr.fileno(), f"\n{received[0][0].name}: stopping at the next safe point\n".encode())

    def check_stop() -> None:
        if received:
            raise Interrupted(f"stopped by {received[0][0].name}; the same command goes on from the checkpoint")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        body(check_stop)
    except Interrupted as stopped:
        print(stopped)
        return 128 + (received[0][0] if received else signal.SIGTERM)  # or another rank was signalled
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def model_at(model: ModelConfig, path: Path) -> ModelConfig:
    """The same model settings, with weights and tokenizer of a checkpoint folder."""
    return dataclasses.replace(model, path=str(path), architecture=None, tokenizer=None, alphabet=None)


@contextlib.contextmanager
def locked(
    folder: Path, busy: RlkitError, *, key: str, wait_s: float = 0.0, check_stop: Callable[[], None] = never_stop
) -> Iterator[None]:
    """Make a folder and hold it; raises `busy` where another process does for `wait_s`, ConfigError if it cannot."""
    lock, deadline = filelock.FileLock(folder / ".lock"), time.monotonic() + wait_s
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            check_stop()
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=min(wait_s, 0.5))
            if not lock.is_locked and time.monotonic() >= deadline:
                raise busy
    except OSError as error:
        problem, expected = f"it cannot be written: {error.strerror or error}", "a folder that can be made and written"
        raise ConfigError(problem, key=key, value=str(folder), expected=expected) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def open_buffer(config: Config) -> Iterator[SqlBuffer]:
    """The run's buffer, closed with the block. Raises BufferError."""
    folder = Path(config.output_dir) / config.name
    buffer = SqlBuffer(
        config.buffer.url or f"sqlite:///{(folder / 'buffer.db').absolute()}", payload_dir=folder / "payloads",
        run=config.name, prompts_per_step=config.prompts_per_step, max_staleness=config.max_staleness,
        slice_samples=config.rollout.slice_samples,
    )  # fmt: skip
    with contextlib.closing(buffer):
        yield buffer


def open_pool(reward: RewardConfig) -> contextlib.AbstractContextManager[VerifierPool | None]:
    """Start the verifier processes, none without rewards. Raises RewardError."""
    if not reward.rewards:
        return contextlib.nullcontext()
    size, sandbox = reward.batch_size, reward.sandbox
    return VerifierPool(reward.rewards, reward.workers, reward.timeout_s, batch_size=size, sandbox=sandbox)


async def preflight(pool: VerifierPool, prompts: Sequence[Prompt]) -> None:
    """Score the prompts' reference answers; ConfigError for a NaN, or where none of them gets a score."""
    samples = [Sample(p.text, p.reference or "", p.reference, p.metadata, "stop", 1) for p in prompts]
    scores = await pool.score(samples)
    reasons = [s.reason or "no reason given" for s in scores if s.score is None]
    not_a_number = [r for r in reasons if "NaN from reward" in r]
    if not_a_number or len(reasons) == len(scores):
        problem = f"no score for {len(reasons)} of {len(scores)} completions that are the reference answer"
        why, fix = sorted(set(not_a_number or reasons))[:3], "call the reward on one row, or look at its settings"
        raise ConfigError(problem, key="reward.rewards", value=why, expected="a finite number for each", fix=fix)


def message_of(name: str, kept: int, left_out: Mapping[str, int]) -> str:
    """One line about the rows of a data set that were left out."""
    return f"{name}: {kept} prompts; left out: {', '.join(f'{n} {why}' for why, n in left_out.items()) or 'none'}"
