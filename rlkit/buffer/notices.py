"""What the processes of a run tell each other besides rollouts: evaluations, how workers fare, the end."""

from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import delete, insert, select, update

from rlkit.buffer.database import Database
from rlkit.buffer.payloads import decode, encode
from rlkit.buffer.snapshots import Snapshot
from rlkit.buffer.tables import evaluations, meta, position, workers


class Notices:
    """Verbs of evaluators, and of whoever reports; SqlBuffer adds the others."""

    _db: Database
    _clock: Callable[[], float]
    snapshot: Callable[[int], Snapshot | None]

    def ask(self, step: int, version: int) -> None:
        """Have the weights of `version`, those after `step`, evaluated; their snapshot stays until then. Idempotent."""
        with self._db.write() as connection:
            if connection.execute(select(evaluations).where(evaluations.c.step == step)).first() is None:
                connection.execute(insert(evaluations).values(step=step, version=version))

    def asked(self) -> dict[int, Snapshot | None]:
        """Evaluations that are wanted, by step, and their snapshots; None for one that is not written yet, or lost."""
        query = select(evaluations).where(evaluations.c.metrics.is_(None)).order_by(evaluations.c.step)
        with self._db.read() as connection:
            rows = connection.execute(query).all()
        return {row.step: self.snapshot(row.version) for row in rows}

    def answer(self, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """The evaluation of a version is done; passed over where a rollback has put another one in its place."""
        own = update(evaluations).where(evaluations.c.step == step, evaluations.c.version == version)
        with self._db.write() as connection:
            connection.execute(own.values(metrics=encode(dict(metrics), f"metrics of step {step}")))

    def answers(self) -> dict[int, dict[str, float]]:
        """Metrics of all evaluations that are done, by step."""
        query = select(evaluations).where(evaluations.c.metrics.is_not(None)).order_by(evaluations.c.step)
        with self._db.read() as connection:
            return {row.step: decode(row.metrics, dict[str, float]) for row in connection.execute(query)}

    def report(self, name: str, status: Mapping[str, float], servers: Sequence[str] = ()) -> bool:
        """Say how this process fares, and which servers of its wait for weights; returns whether the run goes on."""
        row = {"name": name, "seen_at": self._clock(), "status": encode((dict(status), list(servers)), "status")}
        with self._db.write() as connection:
            connection.execute(delete(workers).where(workers.c.name == name))
            connection.execute(insert(workers).values(row))
            return not position(connection).ended

    def reports(self, within_s: float) -> dict[str, dict[str, float]]:
        """The status of every process that has reported within so many seconds."""
        return {name: status for name, (status, _) in self._reports(within_s).items()}

    def servers(self, within_s: float) -> set[str]:
        """URLs of the servers that wait for weights, by the same reports."""
        return {url for _, urls in self._reports(within_s).values() for url in urls}

    def _reports(self, within_s: float) -> dict[str, tuple[dict[str, float], list[str]]]:
        query = select(workers).where(workers.c.seen_at >= self._clock() - within_s).order_by(workers.c.name)
        with self._db.read() as connection:
            rows = connection.execute(query).all()
        return {row.name: decode(row.status, tuple[dict[str, float], list[str]]) for row in rows}

    def end(self) -> None:
        """Workers and evaluators may go: nothing more will be requested, until a rollback begins a new part."""
        with self._db.write() as connection:
            connection.execute(update(meta).values(ended=True))
