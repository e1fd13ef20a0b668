"""A base on the hub: what is fetched of it, over a real connection to a small server of the same interface."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from preflight_corpus import Workshop
from preflight_corpus.making import CONFIG, edit

from pytest_qvl.models.sources import hub
from pytest_qvl.preflight import preflight
from pytest_qvl.preflight.base import SMALL_FILES
from pytest_qvl.preflight.files.folder import limit_of
from pytest_qvl.preflight.files.headers import INDEX


class Hub:
    """What the server has of somebody/model, and what it was asked for.

    Attributes:
        folder: The files.
        asked: Names of files.
        sent: Bytes of each file that went out, by its name.
        address: Of the server.
    """

    def __init__(self, folder):
        self.folder, self.asked, self.sent, self.address = folder, [], Counter(), ""

    def answer(self, request, body):
        """One request, as the hub answers it: a file, a range of it, or that there is none."""
        name = request.path.rpartition("/resolve/")[2].partition("/")[2]
        ours = request.path.startswith("/somebody/model/resolve/")  # huggingface_hub has questions of its own
        if ours:
            self.asked.append(name)
        file = self.folder / name
        if not ours or not file.is_file():
            request.send_response(404)
            request.send_header("X-Error-Code", "EntryNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content, size = file.read_bytes(), file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        request.send_response(206 if asked else 200)
        if asked:
            first, last = int(asked[1]), min(int(asked[2]), size - 1)
            content = content[first : last + 1]
            request.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        for key, value in {"ETag": f'"{size}-{name}"', "X-Repo-Commit": "b" * 40}.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            self.sent[name] += len(content)
            request.wfile.write(content)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("made"))


@pytest.fixture
def served(shop, tmp_path, monkeypatch):
    """A hub that has somebody/model: a copy of the tiny Qwen2.5-VL, to be changed by the test."""
    from huggingface_hub import constants

    ours = Hub(shop.copy(shop.base("qwen2_5_vl")))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            ours.answer(self, body=True)

        def do_HEAD(self):
            ours.answer(self, body=False)

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    ours.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # the environment may say otherwise
    monkeypatch.setattr(constants, "ENDPOINT", ours.address)
    template = ours.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    hub._cache_only.cache_clear()
    hub._hub_config.cache_clear()
    yield ours
    hub._cache_only.cache_clear()
    hub._hub_config.cache_clear()
    server.shutdown()
    server.server_close()
    thread.join()


def in_shards(folder, count=2):
    """Write the one file of weights again as shards with an index; returns their names."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {f"model-{i + 1:05}-of-{count:05}.safetensors": list(tensors)[i::count] for i in range(count)}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return list(shards)


def judged():
    """The report, and the names of what question 5 found."""
    report = preflight("somebody/model", skip=["model.visual", "lm_head"])
    return report, [finding.name for finding in report.of(5)]


@pytest.mark.parametrize("sharded", [False, True])
def test_only_small_files_and_headers_are_fetched(served, sharded):
    shards = in_shards(served.folder) if sharded else ["model.safetensors"]
    for shard in shards:
        os.truncate(served.folder / shard, 2**24)  # what is downloaded whole would be seen
    report, names = judged()
    assert report.state == "green"
    assert set(served.asked) <= {"config.json", *SMALL_FILES, *shards}
    assert all(0 < served.sent[shard] <= 100_001 for shard in shards)
    assert names == ["complete", "values-not-fetched"]
    assert "by their headers; the weights stay on the hub" in report.of(0)[0].line
    assert "the processor of the base" in report.of(6)[0].line


def test_an_adapter_alone_is_judged_on_the_base_that_it_names(served, shop):
    adapter = shop.adapter("qwen2_5_vl")
    edit(adapter / CONFIG, base_model_name_or_path="somebody/model")
    report = preflight(adapter)
    assert (report.state, report.base, report.adapter) == ("green", "somebody/model", str(adapter))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", INDEX]
)
def test_a_file_beyond_its_limit_is_not_fetched(served, name):
    (served.folder / name).touch()
    os.truncate(served.folder / name, limit_of(name) + 1)
    report = preflight("somebody/model")
    assert [finding.name for finding in report.red] == ["base-unsafe"]
    assert f"{name!r} of somebody/model on the hub has more than" in report.red[0].line
    assert not served.sent
    os.truncate(served.folder / name, limit_of(name))  # zeros, which no file is made of
    preflight("somebody/model")
    assert served.sent[name] == limit_of(name)


def test_headers_tell_what_does_not_fit(served):
    edit(served.folder / "config.json", lambda content: content["text_config"].update(intermediate_size=96))
    assert judged()[1] == ["incomplete", "values-not-fetched"]


def test_a_base_in_four_bits_is_judged_by_its_headers(served, shop):
    served.folder = shop.packed("qwen2_5_vl")
    report = preflight("somebody/model")
    assert report.state == "green"
    assert [finding.name for finding in report.of(5)] == ["complete", "values-not-fetched", "states"]


def test_a_base_in_four_bits_without_its_configuration_is_red(served, shop):
    served.folder = shop.copy(shop.packed("qwen2_5_vl"))
    edit(served.folder / "config.json", lambda content: content.pop("quantization_config"))
    assert [finding.name for finding in judged()[0].red] == ["configuration-lost"]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}"), "corrupt"),
        (lambda folder: (folder / "model.safetensors").write_bytes((5).to_bytes(8, "little") + b"[[1]]"), "corrupt"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "corrupt"),
        (lambda folder: (folder / in_shards(folder)[1]).unlink(), f"which {INDEX} names"),
    ],
    ids=["larger-than-the-file", "no-object", "no-header", "no-shard"],
)
def test_a_broken_header_is_red(served, break_it, said):
    break_it(served.folder)
    report, _ = judged()
    assert [finding.name for finding in report.red] == ["base-unreadable"]
    assert said in report.red[0].line


@pytest.mark.parametrize("name", ["../../other/resolve/main/model.safetensors", "/etc/passwd", "a\\b"])
def test_an_index_leads_to_no_other_file(served, name):
    (served.folder / "model.safetensors").unlink()
    (served.folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    report, _ = judged()
    assert [finding.name for finding in report.red] == ["base-unsafe"]
    assert set(served.asked) <= {"config.json", *SMALL_FILES}


def test_a_model_without_safetensors_is_judged_by_its_configuration(served):
    (served.folder / "model.safetensors").unlink()
    report, names = judged()
    assert names == ["not-judged"]
    assert "no safetensors weights on the hub" in report.of(5)[0].line


def test_weights_in_the_cache_are_read_there(served):
    from huggingface_hub import hf_hub_download

    for name in [*in_shards(served.folder), INDEX]:
        hf_hub_download("somebody/model", name)
    assert judged()[1] == ["complete", "base-values"]


@pytest.mark.slow  # two processes
def test_the_command_asks_the_hub_that_the_environment_names(served, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "pytest_qvl.cli", "preflight", "somebody/model"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the weights stay on the hub" in done.stdout
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "127.0.0.1:1 does not answer" in done.stderr
    assert done.stderr.count("\n") == 1
