"""The wandb workspace: built offline from what runs logged, and saved where there is an account."""

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlkit.telemetry.names import TelemetryError
from rlkit.telemetry.record import RunRecord

pytest.importorskip("wandb_workspaces")

from rlkit.telemetry.dashboard import build, main  # noqa: E402

ROOT = Path(__file__).parents[2]


def sections_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    bank = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [panel["config"] for panel in section["panels"]] for section in bank}


def test_it_shows_every_metric_of_the_runs_once_in_its_section(make_run) -> None:
    runs = [RunRecord(make_run("a", steps=2)), RunRecord(make_run("b", steps=1, sft_steps=2))]
    workspace = build(runs, entity="", project="p")
    sections = sections_of(json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)))
    assert list(sections) == ["Headline", "Health", "Lengths", "Speed", "Off-policy", "Processes", "Optimiser"]
    headline = [panel.get("metrics") for panel in sections["Headline"]]
    assert headline[:2] == [["eval/held_out/avg@4", "eval/longer/avg@4"], ["reward/mean"]]
    assert [panel["metrics"][0] for panel in sections["Health"][:3]] == [
        "group/dead_frac", "policy/entropy", "policy/clip_frac/high",
    ]  # fmt: skip
    by_step = [p for panels in sections.values() for p in panels if p.get("xAxis") == "learner/step"]
    shown = [name for panel in by_step for name in panel["metrics"]]
    logged = {name for run in runs for row in run.training for name in row.metrics if not name.endswith("_se")}
    assert sorted(shown) == sorted(logged)
    (by_time,) = (p for p in sections["Headline"] if p.get("xAxis") == "run/seconds")
    assert by_time["metrics"] == ["reward/mean"]
    assert '"completions"' in json.dumps(sections["Headline"])


def test_runs_of_several_projects_are_refused(make_run) -> None:
    first, second = make_run("a", steps=1), make_run("b", steps=1)
    with (second / "config.yaml").open("a") as file:
        file.write("telemetry: {wandb_project: other}\n")
    with pytest.raises(TelemetryError, match="one dashboard for each project"):
        main([str(first), str(second), "--dry-run"])


def dashboard(home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rlkit", "dashboard", *map(str, arguments)]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    environment = {**kept, "HOME": str(home), "WANDB_ERROR_REPORTING": "false", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.slow
def test_without_an_account_it_is_written_and_says_how_to_publish(make_run, tmp_path: Path) -> None:
    run_dir = make_run("a run", steps=2)
    done = dashboard(tmp_path, run_dir)
    assert done.returncode == 0, done.stderr
    assert "no wandb account" in done.stdout and f"wandb sync '{run_dir}'/wandb/offline-run-*" in done.stdout
    assert sections_of(json.loads((run_dir / "dashboard.json").read_text()))["Headline"]
    done = dashboard(tmp_path, run_dir, "--dry-run", WANDB_API_KEY="a" * 40)
    assert done.returncode == 0 and "as asked" in done.stdout


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers the few GraphQL queries that saving takes, as wandb's server does; keeps the saved views."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/graphql":  # the client's own statistics
                self.send_error(404)
                return
            request = json.loads(gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body)
            data: dict[str, Any] = {"viewer": {"id": "u", "username": "me", "entity": "me", "teams": {"edges": []}}}
            if "upsertView" in request["query"]:
                self.server.views.append(request["variables"])  # type: ignore[attr-defined]
                data = {"upsertView": {"view": {"id": "V1", "name": "nw-abc-v"}, "inserted": True}}
                if self.server.refusal:  # type: ignore[attr-defined]
                    data = {"errors": [{"message": self.server.refusal}]}  # type: ignore[attr-defined]
            answer = json.dumps(data if "errors" in data else {"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.views, server.refusal = [], ""  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.mark.slow
def test_with_an_account_it_is_saved_in_the_project(make_run, tmp_path: Path, server: Any) -> None:
    url = f"http://127.0.0.1:{server.server_port}"
    done = dashboard(tmp_path, make_run(steps=2), WANDB_API_KEY="a" * 40, WANDB_BASE_URL=url)
    assert done.returncode == 0, done.stderr
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "rlkit", "rlkit")
    assert "Headline" in sections_of({"spec": json.loads(view["spec"])})
    assert f"saved: {url}/me/rlkit" in done.stdout


@pytest.mark.slow
def test_a_refusal_of_the_server_is_an_error_with_a_way_out(make_run, tmp_path: Path, server: Any) -> None:
    server.refusal = "no such project"
    url = f"http://127.0.0.1:{server.server_port}"
    done = dashboard(tmp_path, make_run(steps=1), "--entity", "x", WANDB_API_KEY="a" * 40, WANDB_BASE_URL=url)
    assert done.returncode == 2 and "wandb did not save the workspace" in done.stderr, done.stderr
    assert "no such project" in done.stderr and "--entity" in done.stderr and "Traceback" not in done.stderr
