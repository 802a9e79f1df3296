"""A hub that cannot be reached costs seconds, one that answers is used."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import pytest
from huggingface_hub import constants

from rlkit.data.sources import HubDataset, offline_unless_reachable
from rlkit.errors import ConfigError, DataError
from rlkit.learner.model import ModelConfig, load_tokenizer


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """The hub's address is a local port that nobody has asked yet."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    offline_unless_reachable.cache_clear()
    yield server
    server.server_close()
    offline_unless_reachable.cache_clear()


def test_unreachable_hub_fails_fast(endpoint: HTTPServer) -> None:
    endpoint.server_close()
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"model\.path.*nobody/nothing"):
        load_tokenizer(ModelConfig(path="nobody/nothing"))
    with pytest.raises(DataError, match="nobody/nothing"):
        HubDataset(name="nobody/nothing").rows()
    assert time.monotonic() - start < 15  # retries alone take 46 s
    assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_used(endpoint: HTTPServer) -> None:
    thread = threading.Thread(target=endpoint.handle_request)
    thread.start()
    offline_unless_reachable()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
