"""Statistics over seeds against definitions, and the table of made-up runs against what was put in."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.errors import RlkitError
from rlkit.experiments.compare import (
    compare,
    differing_keys,
    find_variants,
    improvement_probability,
    main,
    over_seeds,
    paired_difference,
)

values = st.dictionaries(st.integers(0, 9), st.integers(0, 20).map(lambda x: x / 20), min_size=2, max_size=5)


@settings(max_examples=30, deadline=None)
@given(values, values)
def test_improvement_probability_counts_pairs(x: dict[int, float], y: dict[int, float]) -> None:
    """Agarwal et al. 2021, arXiv 2108.13264, section 4.3."""
    pairs = [(a, b) for a, b in itertools.product(x.values(), y.values())]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    found = improvement_probability(x, y)
    assert found == pytest.approx(expected)
    assert improvement_probability(y, x) == pytest.approx(1 - expected)


@settings(max_examples=30, deadline=None)
@given(values)
def test_mean_error_and_interval(x: dict[int, float]) -> None:
    found, array = over_seeds(x), np.array(list(x.values()))
    assert found.value == pytest.approx(array.mean())
    assert found.error == pytest.approx(array.std(ddof=1) / len(array) ** 0.5)
    assert array.min() - 1e-9 <= found.low <= found.high <= array.max() + 1e-9


def test_differences_are_paired_by_seed() -> None:
    base = {0: 0.1, 1: 0.5, 2: 0.9, 7: 0.0}
    found = paired_difference({seed: base[seed] + 0.05 for seed in (0, 1, 2)}, base)
    assert found is not None and found.value == pytest.approx(0.05)
    assert found.error == pytest.approx(0.0, abs=1e-12) and found.seeds == 3
    assert paired_difference({5: 1.0}, base) is None


def make_run(folder: Path, seed: int, rate: float, after: float) -> None:
    folder.mkdir(parents=True)
    config = {"name": folder.name, "seed": seed, "steps": 2, "learner": {"learning_rate": rate}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    step = {"perf/sampled_tokens": 200.0, "time/step": 2.0, "reward/mean": 0.5}
    rows = [{"eval/held/avg@4": 0.25}, step, step, {"eval/held/avg@4": after}]
    numbered = enumerate(zip((0, 1, 2, 2), rows, strict=True))
    lines = [{"step": step, "time": float(i), "seconds": float(i), **row} for i, (step, row) in numbered]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for name, rate, gain in (("slow", 1e-4, 0.0), ("fast", 1e-3, 0.125)):
        for seed in range(3):
            make_run(tmp_path / name / f"seed_{seed}", seed, rate, 0.5 + 0.0625 * seed + gain)
    return tmp_path


def test_the_table_holds_what_the_runs_logged(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variants = find_variants([sweep])
    rows = compare(variants, "held/avg@4", "slow")
    assert [row.variant.name for row in rows] == ["fast", "slow"]
    assert rows[0].after.value == pytest.approx(0.6875)
    assert rows[0].difference is not None and rows[0].difference.value == pytest.approx(0.125)
    assert rows[0].improvement == pytest.approx(8.5 / 9)
    assert {
        seed: spent[-1].tolist() for seed, spent in zip(rows[0].variant.runs, rows[0].variant.spent, strict=True)
    } == dict.fromkeys(range(3), [400, 4])
    assert list(differing_keys(variants)) == ["learner.learning_rate"]
    assert main([str(sweep), "--baseline", "slow"]) == 0
    text = (sweep / "compare.txt").read_text()
    assert "0.688 +- 0.036" in text and "+0.125 +- 0.000" in text and "learner.learning_rate" in text
    assert "0.688 +- 0.036" in (sweep / "compare.html").read_text()
    assert (sweep / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "0.688" in capsys.readouterr().out


def test_bad_input_is_named(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(RlkitError, match="Did you mean"):
        compare(find_variants([sweep]), "held/avg@8", "slow")
    with pytest.raises(RlkitError, match="--baseline"):
        compare(find_variants([sweep]), "held/avg@4", "nothing")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RlkitError, match="no run here"):
        find_variants([empty])
    make_run(sweep / "fast" / "seed_0b", 0, 1e-3, 1.0)
    with pytest.raises(RlkitError, match="two runs of fast have seed 0"):
        find_variants([sweep])
