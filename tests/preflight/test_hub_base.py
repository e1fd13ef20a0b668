"""A base on the hub: what is fetched of it, over a real connection to a small server of the same interface."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from preflight_corpus import Workshop

from pytest_qvl.models.sources import hub
from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.base import SMALL_FILES

COMMIT = "b" * 40


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub that has somebody/model; gives the names of the files that were asked for."""
    from huggingface_hub import constants

    folder = Workshop(tmp_path / "made").base("qwen2_5_vl")
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def answer(self, body):
            name = self.path.rpartition("/")[2]
            ours = self.path.startswith("/somebody/model/resolve/")  # huggingface_hub has questions of its own
            if ours:
                asked.append(name)
            file = folder / name
            if not ours or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            self.send_response(200)
            for key, value in {"ETag": f'"{len(content)}-{name}"', "X-Repo-Commit": COMMIT}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def do_GET(self):
            self.answer(body=True)

        def do_HEAD(self):
            self.answer(body=False)

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    hub._cache_only.cache_clear()
    hub._hub_config.cache_clear()
    yield asked
    hub._cache_only.cache_clear()
    hub._hub_config.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


def test_only_small_files_are_fetched(served):
    report = preflight("somebody/model", skip=["model.visual", "lm_head"])
    assert report.state == "green"
    assert set(served) <= {"config.json", *SMALL_FILES}
    assert "the processor of the base" in report.of(6)[0].line
    assert [finding.state for finding in report.of(5)] == ["not judged"]
