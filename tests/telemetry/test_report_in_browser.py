"""The report of a real run, opened in headless Chromium: what a reader sees, and that nothing is fetched or fails."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import TINY

from rlkit.telemetry.record import RunRecord

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--remote-debugging-pipe", "--window-size=1280,2000",
]  # fmt: skip


def find_browser() -> str:
    """Path of a Chromium; where there is none the test is skipped, on CI it fails."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if path := next(filter(None, map(shutil.which, names)), None):
        return path
    reason = f"no browser is installed, none of {', '.join(names)}"
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{reason}; .ci/run installs one")
    pytest.skip(reason)


class Browser:
    """Chromium's debugging protocol over its pipe: commands and events are JSON messages that end with a zero byte."""

    def __init__(self, commands: int, answers: int) -> None:
        self.commands, self.answers, self.buffer, self.last = commands, answers, b"", 0
        self.events: list[dict[str, Any]] = []
        self.until = time.monotonic() + DEADLINE_S
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    session: str | None = None

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.answers], [], [], max(0.0, self.until - time.monotonic()))
            assert ready, f"the browser said nothing in {DEADLINE_S:.0f} s"
            data = os.read(self.answers, 1 << 20)
            assert data, "the browser ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(message))

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self.last += 1
        command = {"id": self.last, "method": method, "params": params}
        os.write(self.commands, json.dumps(command | ({"sessionId": self.session} if self.session else {})).encode())
        os.write(self.commands, b"\0")
        while (message := self.receive()).get("id") != self.last:
            self.events.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def wait(self, method: str) -> None:
        """Until an event has come."""
        while not any(event["method"] == method for event in self.events):
            self.events.append(self.receive())

    def evaluate(self, expression: str) -> Any:
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@contextmanager
def browser(path: str, profile: Path) -> Iterator[Browser]:
    """A browser of our own, whose whole process group is gone afterwards."""
    pipes = [*os.pipe(), *os.pipe()]
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes]  # out of the way of 3 and 4
    for end in pipes:
        os.close(end)
    in_read, in_write, out_read, out_write = ends

    def join() -> None:  # the browser reads its descriptor 3 and writes 4
        os.dup2(in_read, 3)
        os.dup2(out_write, 4)

    command = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=join,
        pass_fds=(3, 4), start_new_session=True, env=os.environ | {"HOME": str(profile)},
    )  # fmt: skip
    os.close(in_read)
    os.close(out_write)
    try:
        yield Browser(in_write, out_read)
    finally:
        own = [p for p in psutil.process_iter() if p.is_running() and group(p.pid) == process.pid]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        _, alive = psutil.wait_procs(own, timeout=10)
        os.close(in_write)
        os.close(out_read)
        assert not alive


def group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@dataclass(frozen=True)
class Seen:
    """A page as the browser has it. images: (natural width, shown width, text); failures: errors of any kind."""

    text: str
    dom: str
    images: list[tuple[int, int, str]]
    overflow: int
    screenshot: bytes
    requested: list[str]
    failures: list[str]


def look_at(place: Path, profile: Path) -> Seen:
    with browser(find_browser(), profile) as page:
        for domain in ("Page", "Network", "Runtime", "Log"):
            page(f"{domain}.enable")
        page("Page.navigate", url=place.as_uri())
        page.wait("Page.loadEventFired")
        decoded = "i.decode().catch(() => 0).then(() => [i.naturalWidth, i.clientWidth, i.alt])"
        images = page.evaluate(f"Promise.all([...document.images].map(i => {decoded}))")
        text = page.evaluate("document.body.innerText")
        dom = page.evaluate("document.documentElement.outerHTML")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        shot = base64.b64decode(page("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
    requested = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    bad = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Network.loadingFailed")
    failures = [event["method"] for event in page.events if event["method"] in bad]
    return Seen(text, dom, images, overflow, shot, requested, failures)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of a few steps."""
    parent = tmp_path_factory.mktemp("browser")
    more = [f"output_dir={parent}", f"sft.cache_dir={parent}/cache", "name=seen", "steps=3", "telemetry.report=true"]
    command = [sys.executable, "-m", "rlkit", "train", *TINY, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return parent / "seen"


@pytest.mark.slow
def test_the_report_of_a_real_run_in_a_browser(trained: Path, tmp_path: Path) -> None:
    report = trained / "report.html"
    page = look_at(report, tmp_path / "profile")
    run = RunRecord(trained)
    (curve,) = run.averages
    assert curve.before is not None and curve.after is not None and curve.change is not None
    for shown in (f"{curve.before.value:.3f} \u2192 {curve.after.value:.3f}", f"{curve.change.value:+.3f}", "3 of 3"):
        assert shown in " ".join(page.text.split())
    assert "What stands out" in page.text and "Sample completions" in page.text and "</figure>" in page.dom
    pictures = list((trained / "plots").glob("*.png"))
    assert len(page.images) == len(pictures) > 5
    assert all(natural > 0 and shown > 0 and alt for natural, shown, alt in page.images)
    assert page.overflow <= 0  # nothing sticks out to the side
    assert page.screenshot.startswith(b"\x89PNG") and len(page.screenshot) > 20_000
    own = report.as_uri()
    assert own in page.requested
    assert all(url == own or url.startswith("data:image/svg+xml") for url in page.requested), page.requested
    assert page.failures == []


@pytest.mark.slow
def test_a_page_that_fetches_and_fails_is_noticed(tmp_path: Path) -> None:
    place, outside = tmp_path / "page.html", "http://127.0.0.1:9/x.png"
    place.write_text(f"<p>seen<img src='{outside}' alt=x><script>throw new Error('no')</script>")
    page = look_at(place, tmp_path / "profile")
    assert page.text.strip().startswith("seen") and page.images[0][0] == 0
    assert outside in page.requested
    assert {"Runtime.exceptionThrown", "Network.loadingFailed"} <= set(page.failures)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_without_a_browser_ci_fails_and_others_skip(
    monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(outcome, match="no browser is installed"):
        find_browser()
