"""What is known of one vLLM server."""

from dataclasses import dataclass

from rlkit.errors import EngineError


class Refused(EngineError):
    """A server's answer has another status than 200."""


@dataclass(slots=True)
class Server:
    """What the engine knows of one server."""

    url: str
    version: int = -1  # of its weights; -1: not known
    lost: str | None = None  # why it cannot be used: an update whose outcome is not known

    def error(self, problem: str, kind: type[EngineError] = EngineError) -> EngineError:
        return kind(problem, key="server", value=self.url, fix="see the server's log; start it again if it has ended")
