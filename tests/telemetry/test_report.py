"""Reports and summaries of all kinds of runs, whole and broken."""

import html.parser
import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rlkit.telemetry.figures import LINES, smooth
from rlkit.telemetry.findings import findings
from rlkit.telemetry.names import TelemetryError
from rlkit.telemetry.record import RunRecord
from rlkit.telemetry.report import main, print_summary, write_report, write_summary


class Page(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.references: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        for name, value in attributes:
            self.attributes.add(name)
            if name in {"src", "href", "action", "data"}:
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style"} & set(self.open):
            self.text += data


def page_of(run_dir: Path) -> Page:
    page = Page(write_report(run_dir).read_text())
    assert page.open == []
    return page


def texts(run_dir: Path, level: str | None = None) -> str:
    found = findings(RunRecord(run_dir))
    return "\n".join(f.text for f in found if level in {None, f.level})


def few(_: int, row: dict) -> dict:
    """Only a few metrics of a step, for pages that are drawn quickly."""
    return {name: row[name] for name in ("reward/mean", "group/dead_frac", "time/step")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_run_class) -> Path:
    """A resumed run with everything in it, and its report."""
    run_dir = make_run_class(tmp_path_factory.mktemp("runs"))(steps=60, resumed_at=31, sft_steps=50)
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def whole_page(whole: Path) -> Page:
    return Page((whole / "report.html").read_text())


def test_the_page_needs_nothing_else_and_runs_nothing(whole: Path, whole_page: Page) -> None:
    page = whole_page
    assert page.open == []
    assert page.references and all(r.startswith("data:image/svg+xml") for r in page.references)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert not any(name.startswith("on") for name in page.attributes)
    assert "<script>alert(1)</script>" in page.text  # as text
    source = (whole / "report.html").read_text()
    assert not set(source) & {"\x1b", "\x00", "\u202e"}
    assert "hunter2" not in source and "***@db" in page.text


def test_the_page_says_what_was_learnt(whole_page: Page) -> None:
    text = " ".join(whole_page.text.split())
    assert "0.210 \u2192 0.760" in text and "+0.550 \u00b1 0.042" in text
    assert "avg@4 on held_out rose by 0.550" in text
    assert "the run was resumed there" in text and "resumed 1 times" in text
    assert "seed 7" in text and "60 of 60" in text
    for kind in ("right 1", "wrong 0", "unscored"):
        assert kind in text
    assert "Step 1 " in text and "Step 60 " in text


def test_every_picture_is_there_and_is_a_picture(whole: Path) -> None:
    pictures = {path.stem: path.read_bytes() for path in (whole / "plots").iterdir()}
    assert pictures.keys() == {"learning_curve", "evaluations", "named_rewards", *LINES}
    assert all(data.startswith(b"\x89PNG") and len(data) > 5000 for data in pictures.values())


def test_the_same_run_gives_the_same_bytes(whole: Path) -> None:
    first = (whole / "report.html").read_bytes()
    pictures = {p.name: p.read_bytes() for p in (whole / "plots").iterdir()}
    assert write_report(whole).read_bytes() == first
    assert {p.name: p.read_bytes() for p in (whole / "plots").iterdir()} == pictures


def test_summary_has_the_first_sets_figures(whole: Path) -> None:
    summary = write_summary(whole)
    assert json.loads((whole / "summary.json").read_text()) == summary
    assert summary["avg@4_before"] == pytest.approx(0.21)
    assert summary["avg@4_after"] == pytest.approx(0.76)
    assert summary["avg@4_after_se"] == pytest.approx(math.sqrt(0.76 * 0.24 / 200))
    assert (summary["name"], summary["seed"], summary["steps"]) == ("chain_sum", 7, 60)
    assert summary["eval_set"] == "held_out"
    assert summary["eval"]["longer"]["avg@4_after"] == pytest.approx(0.29)
    rows = RunRecord(whole).rows
    assert summary["seconds"] == rows[-1].seconds < rows[-1].time - rows[0].time  # less the pause


def test_the_table_names_figures_and_paths(whole: Path) -> None:
    out = io.StringIO()
    print_summary(whole, Console(file=out, width=120))
    text = out.getvalue()
    assert "0.210 +- 0.029" in text and "0.760 +- 0.030" in text and "+0.550" in text
    assert str(whole / "report.html") in text and "learning_curve.png" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0, "eval_steps": ()}, "No training step has been logged yet."),
        ({"steps": 1}, "mean of the first and last 1 of 1 steps"),
        ({"steps": 0, "eval_steps": (0,)}, "has not been measured after training yet"),
        ({"steps": 3, "eval_steps": (3,)}, "was not measured before training"),
        ({"steps": 3, "eval_steps": ()}, "No held-out evaluation was logged."),
        ({"steps": 3, "rollouts": False}, "No rollouts were kept"),
        ({"steps": 3, "config": False}, "config.yaml is missing."),
        ({"steps": 3, "planned": 50}, "The run stands at step 3 of 50."),
    ],
)
def test_what_is_missing_is_said(make_run, options: dict, said: str) -> None:
    run_dir = make_run(**options, change=few)
    assert said in " ".join(page_of(run_dir).text.split())
    write_summary(run_dir)
    print_summary(run_dir, Console(file=io.StringIO()))


def test_an_empty_folder_is_a_page_and_no_folder_an_error(tmp_path: Path) -> None:
    page_of(tmp_path)
    assert write_summary(tmp_path)["steps"] == 0
    with pytest.raises(TelemetryError, match="no such folder"):
        main(tmp_path / "missing")


def test_torn_and_broken_files(make_run) -> None:
    torn = make_run("torn", steps=2, change=few)
    metrics = torn / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    assert "step" in page_of(torn).text
    broken = make_run("parquet", steps=2, change=few)
    (broken / "rollouts" / "step_1.parquet").write_bytes(b"nothing of the kind")
    assert "The rollouts cannot be read" in page_of(broken).text
    middle = make_run("middle", steps=2, change=few)
    metrics = middle / "metrics.jsonl"
    metrics.write_text("{\n" + metrics.read_text())
    with pytest.raises(TelemetryError, match="line 1"):
        write_report(middle)
    config = make_run("config", steps=2, change=few)
    (config / "config.yaml").write_text("a: [")
    with pytest.raises(TelemetryError, match=r"config\.yaml"):
        write_report(config)


def test_a_stale_picture_is_removed(make_run) -> None:
    run_dir = make_run(steps=2, change=few)
    (run_dir / "plots").mkdir()
    stale = run_dir / "plots" / "warm_start.png"
    stale.write_bytes(b"old")
    write_report(run_dir)
    assert not stale.exists()


def test_a_long_completion_keeps_head_and_tail(make_run) -> None:
    run_dir = make_run(steps=1, rollouts=False, change=few)
    text = "HEAD" + "x" * 5000 + "TAIL"
    make_run.save_rollouts(run_dir, 1, make_run.scored_group(1, 1.0, text=text))
    page = page_of(run_dir).text
    left_out = len(text) - 1200 - 500  # characters at head and tail that stay
    assert "HEADx" in page and "xTAIL" in page and f"[{left_out} characters left out]" in page


PROBLEMS = {
    "all correct": {"group/all_correct_frac": 0.62},
    "all wrong": {"group/all_wrong_frac": 0.7},
    "dead (all scores equal)": {"group/dead_frac": 0.6},
    "could not be scored": {"reward/unscored_frac": 0.05},
    "time limit": {"reward/timeout_frac": 0.05},
    "cut at the length limit": {"completion/truncated_frac": 0.3},
    "clipped from above": {"policy/clip_frac/high": 0.5},
    "Engine and learner disagree": {"mismatch/logprob_absdiff/mean": 0.2},
    "Not finite in at least one step: policy/loss": {"policy/loss": None},
    "Training reward did not move": {"reward/mean": 0.3},
}
HEALTHY = {"group/all_correct_frac": 0.1, "group/all_wrong_frac": 0.1, "group/dead_frac": 0.2}


def test_a_healthy_run_has_no_problems(make_run) -> None:
    assert texts(make_run(steps=60, change=lambda _, row: row | HEALTHY), "problem") == ""


@pytest.mark.parametrize("said", PROBLEMS)
def test_each_problem_is_found_alone(make_run, said: str) -> None:
    run_dir = make_run(steps=60, change=lambda _, row: row | HEALTHY | PROBLEMS[said])
    problems = texts(run_dir, "problem").splitlines()
    assert len(problems) == 1 and said in problems[0]


def test_percentages_are_of_the_last_steps(make_run) -> None:
    def late(step: int, row: dict) -> dict:
        return row | HEALTHY | ({"group/all_correct_frac": 0.62} if step > 40 else {})

    text = texts(make_run(steps=60, change=late), "problem")
    assert text == "62 % of groups in the last 20 steps are all correct: they carry no signal."


@pytest.mark.parametrize(("rate", "said"), [(-0.08, "Entropy collapsed"), (0.05, "Entropy grew")])
def test_entropy_trends(make_run, rate: float, said: str) -> None:
    run_dir = make_run(steps=60, change=lambda step, row: row | HEALTHY | {"policy/entropy": math.exp(rate * step)})
    assert said in texts(run_dir, "problem")


def test_evaluation_verdicts(make_run) -> None:
    def shift(run_dir: Path, value: float, error: float) -> Path:
        path = run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if "eval/held_out/avg@4" in row:
                row["eval/held_out/avg@4"] = 0.5 + (value if row["step"] else 0.0)
                row["eval/held_out/avg@4_se"] = error
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run_dir

    assert "fell by 0.200" in texts(shift(make_run("a", steps=3), -0.2, 0.03), "problem")
    assert "rose by 0.200" in texts(shift(make_run("b", steps=3), 0.2, 0.03), "good")
    assert "within noise" in texts(shift(make_run("c", steps=3), 0.02, 0.03), "note")


def test_names_with_markup_are_only_text(make_run) -> None:
    run_dir = make_run(steps=3, change=few)
    path = run_dir / "metrics.jsonl"
    path.write_text(path.read_text().replace("eval/longer/", "eval/$x^<b>_{/"))
    assert "$x^<b>_{" in page_of(run_dir).text
    assert "$x^<b>_{" in write_summary(run_dir)["eval"]


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([1.0, 3.0]) == [1.0, 3.0]
