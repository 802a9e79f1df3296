from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.chain_sum import ChainSumTeacher
from rlkit.data.sources import ReasoningGym
from rlkit.data.text import Template
from rlkit.errors import ConfigError, DataError

STEP = re.compile(r"(-?\d+)([+-])(-?\d+)=(-?\d+)")
terms = st.lists(st.tuples(st.sampled_from("+-"), st.integers(-99, 99)), max_size=6)


def row(expression: str) -> dict[str, Any]:
    return {"metadata": {"expression": expression}}


def slips(text: str, max_error: int) -> list[bool]:
    """Which steps are wrong; asserts that the chain hangs together."""
    chain, _, answer = text.rpartition("#")
    wrong, carried = [], None
    for step in chain.split(";"):
        found = STEP.fullmatch(step)
        assert found is not None, text
        left, operator, right, result = int(found[1]), found[2], int(found[3]), int(found[4])
        assert carried is None or left == carried
        off = abs(result - (left + right if operator == "+" else left - right))
        assert off <= max_error
        wrong.append(off > 0)
        carried = result
    assert carried == int(answer)
    return wrong


def test_the_documented_example() -> None:
    assert ChainSumTeacher(error_rate=0.0)(row("4 - 1 + 7"), 0) == "4-1=3;3+7=10#10"
    assert ChainSumTeacher(error_rate=0.0)(row("-4"), 0) == "#-4"


@given(st.integers(-99, 99), terms, st.booleans())
def test_without_errors_the_answer_is_right(first: int, rest: list[Any], spaces: bool) -> None:
    gap = " " if spaces else ""
    expression = str(first) + "".join(f"{gap}{op}{gap}{term}" for op, term in rest)
    total = first + sum(term if op == "+" else -term for op, term in rest)
    assert ChainSumTeacher(error_rate=0.0)(row(expression), 0).endswith(f"#{total}")


@given(st.integers(0, 99), terms.filter(bool), st.integers(0, 999), st.integers(0, 9))
def test_errors_are_near_carried_on_and_fixed_by_seed(first: int, rest: list[Any], index: int, seed: int) -> None:
    item = row(str(first) + "".join(f" {op} {term}" for op, term in rest))
    text = ChainSumTeacher(error_rate=0.5, seed=seed, max_error=2)(item, index)
    assert len(slips(text, max_error=2)) == len(rest)
    assert text == ChainSumTeacher(error_rate=0.5, seed=seed, max_error=2)(item, index)


def test_steps_err_at_the_given_rate_and_seeds_differ() -> None:
    rows = ReasoningGym(task="chain_sum", size=1500, settings={"min_terms": 4, "max_terms": 4, "max_digits": 1}).rows()
    teacher, other = ChainSumTeacher(error_rate=0.3), ChainSumTeacher(error_rate=0.3, seed=1)
    wrong = [slip for n, item in enumerate(rows) for slip in slips(teacher(item, n), 3)]
    share = sum(wrong) / len(wrong)
    assert len(wrong) == 4500
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 4500) ** 0.5
    assert any(teacher(item, n) != other(item, n) for n, item in enumerate(rows[:20]))


@pytest.mark.parametrize("settings", [{"error_rate": 1.0}, {"error_rate": -0.1}, {"max_error": 0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ChainSumTeacher(**settings)


@pytest.mark.parametrize("expression", ["4 * 2", "", "4 -", "four", None])
def test_rows_without_a_sum_are_refused(expression: str | None) -> None:
    with pytest.raises(DataError, match="row 7"):
        ChainSumTeacher()({"metadata": {"expression": expression}}, 7)


def test_template_teacher() -> None:
    teacher = Template(template="{solution}\n#### {answer}")
    assert teacher({"solution": "2+2=4", "answer": 4}, 0) == "2+2=4\n#### 4"
    with pytest.raises(DataError, match="row 3 is null"):
        teacher({"solution": None, "answer": 4}, 3)
    with pytest.raises(DataError, match="row 3 has no field 'solution'"):
        teacher({"answer": 4}, 3)


def test_hard_sums_have_an_error_rate_of_their_own() -> None:
    """Of 4 terms or more; the others are as without the setting."""
    teacher = ChainSumTeacher(error_rate=0.0, hard_terms=4, hard_error_rate=0.9, seed=1)
    rows = [{"metadata": {"expression": " + ".join("1" * terms)}} for terms in (2, 3, 4, 5) for _ in range(50)]
    right = [
        teacher(row, n).endswith(f"#{terms}")
        for n, (row, terms) in enumerate(zip(rows, sorted([2, 3, 4, 5] * 50), strict=True))
    ]
    assert all(right[:100]) and sum(right[100:]) < 20
    assert ChainSumTeacher(hard_terms=4)(rows[0], 0) == ChainSumTeacher()(rows[0], 0)
