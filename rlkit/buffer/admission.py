"""Admission and order: which ordinals may be requested, taken, dropped and trained on, on an open transaction.

These rules are the whole of the staleness bound; its proof is in docs/buffer.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, insert, select, update

from rlkit.buffer.checks import at_least, groups_in
from rlkit.buffer.leases import insert_slices
from rlkit.buffer.protocol import GroupRequest, require
from rlkit.buffer.tables import OPEN, UNENDED, UNLEASED, groups, meta, position, slices, update_each, versions
from rlkit.types import GroupState


def capacity(now: Any) -> int:
    """Ordinals that may be requested at position `now`, up to (step + S + 1) * P + refused."""
    bound = (now.step + now.max_staleness + 1) * now.prompts_per_step + now.refused
    return int(max(0, bound - now.next_ordinal))


def request(
    connection: Connection, requests: Sequence[GroupRequest], prompts: Sequence[bytes], slice_samples: int, clock: float
) -> None:
    """Admit groups (prompts: their encoded prompts) and cut them into slices."""
    now = position(connection)
    ordinals = [x.ordinal for x in requests]
    expected = list(range(now.next_ordinal, now.next_ordinal + len(requests)))
    problem, fix = "ordinals must continue without a gap", "request from stats().next_ordinal on"
    require(ordinals == expected, problem, key="ordinals", value=ordinals, expected=str(expected), fix=fix)
    problem, most = "more groups than the staleness bound admits now", f"at most capacity() = {capacity(now)}"
    fix = "wait for the next publish, or raise max_staleness"
    require(len(requests) <= capacity(now), problem, key="requests", value=len(requests), expected=most, fix=fix)
    fields = {"state": GroupState.REQUESTED, "min_version": now.version, "requested_at": clock}
    rows = []
    for x, prompt in zip(requests, prompts, strict=True):
        name = x.prompt.id.encode("utf-8", "replace").decode()
        rows.append(fields | {"ordinal": x.ordinal, "samples": x.samples, "prompt_id": name, "prompt": prompt})
    connection.execute(insert(groups), rows)
    insert_slices(connection, {x.ordinal: x.samples for x in requests}, slice_samples)
    connection.execute(update(meta).values(next_ordinal=expected[-1] + 1))


def lowest_open(connection: Connection, count: int) -> list[Any] | None:
    """Group rows of the `count` lowest open ordinals, or None unless all of them are scored."""
    query = select(groups).where(groups.c.state.in_(OPEN)).order_by(groups.c.ordinal)
    rows = connection.execute(query.limit(count)).all()
    ready = len(rows) == count and all(row.state == GroupState.SCORED for row in rows)
    return list(rows) if ready else None


def slices_of(connection: Connection, ordinals: Sequence[int]) -> dict[int, list[Any]]:
    """Slice rows of each group, in order of sample index."""
    found: dict[int, list[Any]] = {ordinal: [] for ordinal in ordinals}
    query = select(slices).where(slices.c.ordinal.in_(ordinals))
    for row in connection.execute(query.order_by(slices.c.ordinal, slices.c.start)):
        found[row.ordinal].append(row)
    return found


def drop(connection: Connection, ordinals: Sequence[int], reason: str) -> None:
    """Open or taken groups become DROPPED, their leases void; the bound rises."""
    groups_in(connection, ordinals, UNENDED, "dropped")
    update_each(connection, groups, ordinals, state=GroupState.DROPPED, drop_reason=reason)
    # scored slices stay: a rollback may bring the group back
    unfinished = slices.c.ordinal.in_(ordinals) & (slices.c.state != GroupState.SCORED)
    connection.execute(update(slices).where(unfinished).values(state=GroupState.DROPPED, **UNLEASED))
    connection.execute(update(meta).values(refused=meta.c.refused + len(ordinals)))


def publish(connection: Connection, version: int, trained: Sequence[int], clock: Callable[[], float]) -> None:
    """TAKEN groups become TRAINED; a new live version, a step on."""
    now = position(connection)
    at_least("version", version, now.next_version)
    groups_in(connection, trained, (GroupState.TAKEN,), "trained")
    query = select(groups.c.ordinal).where(groups.c.state == GroupState.TAKEN)
    left = sorted(set(connection.execute(query).scalars()) - set(trained))
    problem = "a step trains on every taken group, prompts_per_step of them"
    value, expected = f"{len(trained)} groups; taken besides: {left}", f"all taken groups: {now.prompts_per_step}"
    fix = "drop the groups the step leaves out and take as many again"
    whole = not left and len(trained) == now.prompts_per_step
    require(whole, problem, key="trained", value=value, expected=expected, fix=fix)
    update_each(connection, groups, trained, state=GroupState.TRAINED, trained_step=now.step)
    step = now.step + 1
    connection.execute(insert(versions).values(version=version, step=step, published_at=clock()))
    connection.execute(update(meta).values(step=step, version=version, next_version=version + 1))
