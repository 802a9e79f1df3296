"""Weights for servers that the learner sends them to, tensor by tensor; which servers there are, their workers report.

A server that fails is left: its worker gives it up as well, and comes with another one. Nothing here is waited for
without a deadline.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlkit.buffer.sql import SqlBuffer
from rlkit.errors import EngineError
from rlkit.learner.shards import whole
from rlkit.learner.update import Learner

ABORT_S = 30.0  # until a sender that was closed must have ended


def tensors(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters, each whole until the next one. Collective."""
    return ((name, whole(parameter.detach())) for name, parameter in learner.model.named_parameters())


def replay(learner: Learner) -> None:
    """What the other ranks do while rank 0 sends."""
    for _ in tensors(learner):
        pass


@dataclass(slots=True)
class Broadcast:
    """Rank 0's senders, by URL."""

    buffer: SqlBuffer
    learner: Learner
    engine: Any  # settings; `sender` connects to a server, in `update_timeout_s`, as all that is done with it
    within_s: float  # a worker that has not reported for so long is gone, and its servers with it
    senders: dict[str, Any] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)  # the version that a server has; -1: it has failed

    def serve(self, version: int) -> None:
        """Every server that is there takes `version`, unless it has it. EngineError if one holds up this process."""
        there = self.buffer.servers(self.within_s)
        for url in self.senders.keys() - there:
            self.senders.pop(url).close()
        for url in sorted(there):
            if self.sent.get(url) not in (version, -1):
                problem = self.learner.together(replay, partial(self._send, url, version))
                self.sent[url] = -1 if problem else version
                if problem:
                    print(f"weights: {url} is left: {type(problem).__name__} {problem}")

    def _send(self, url: str, version: int, learner: Learner) -> Exception | None:
        """What went wrong, if something did."""
        failed, parts = list[Exception](), tensors(learner)

        def run() -> None:
            try:
                if torch.cuda.is_available():
                    torch.cuda.set_device(learner.accelerator.device)  # of this thread
                if url not in self.senders:
                    self.senders[url] = self.engine.sender(url, learner.model)
                self.senders[url].send(version, parts)
            except (
                Exception
            ) as error:  # of any kind, in this thread: handed to the caller, which says it and leaves the server
                failed.append(error)

        thread = threading.Thread(target=run, name=f"send to {url}", daemon=True)
        thread.start()
        thread.join(limit_s := self.engine.update_timeout_s)
        if late := thread.is_alive():
            failed.append(TimeoutError(f"version {version} was not taken within {limit_s:g} s"))
        if failed and (sender := self.senders.pop(url, None)):
            sender.close()
        thread.join(ABORT_S)
        if late and thread.is_alive():
            raise EngineError(str(failed[0]), key="server", value=url, fix="the learner must be started again")
        for _ in parts:
            pass  # the other ranks gather them all
        return failed[0] if failed else None
