"""Readers of strangers' files: what could do harm is refused in one sentence, and nothing of it is run or printed raw."""

from __future__ import annotations

import json
import os
import re

import pytest

from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.adapter import find_adapter
from pytest_qvl.preflight.files import folder as folders
from pytest_qvl.preflight.files.folder import Folder, UnsafeFileError
from pytest_qvl.preflight.files.headers import INDEX, read_header, read_headers
from pytest_qvl.preflight.findings import Finding, Report, neutral, numbers
from pytest_qvl.preflight.output import as_json, as_markdown, as_text
from pytest_qvl.preflight.timing import patience

EVIL = "\x1b]0;owned\x07\x1b[31m<script>alert(1)</script>|`x`\u202e\n\r"


def write(path, header, data=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(content) if length is None else length).to_bytes(8, "little") + content + data)


def entry(dtype="F32", shape=(2, 2), begin=0, end=16):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_a_plain_file_is_read_by_its_header(tmp_path):
    write(tmp_path / "a.safetensors", {"w": entry(), "__metadata__": {"format": "pt"}}, bytes(16))
    found = read_header(Folder(tmp_path), "a.safetensors")
    assert {name: (t.dtype, t.shape, t.nbytes, t.numel) for name, t in found.items()} == {"w": ("F32", (2, 2), 16, 4)}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry(shape=(2**40, 2**40))}, bytes(16), "cannot be"),
        ({"w": entry(shape=(-2, -2))}, bytes(16), "that no tensor has"),
        ({"w": entry(shape=(2, True))}, bytes(16), "that no tensor has"),
        ({"w": entry(shape=[1] * 20)}, bytes(16), "that no tensor has"),
        ({"w": entry(dtype="PICKLE")}, bytes(16), "does not know"),
        ({"w": entry(), "v": entry()}, bytes(16), "overlap others or leave a gap"),
        ({"w": entry(begin=16, end=32)}, bytes(32), "overlap others or leave a gap"),
        ({"w": entry(end=2**50)}, bytes(16), "that no tensor has"),
        (b'{"w": 1, "w": 2}', b"", "twice"),
        ({"w" * 600: entry()}, bytes(16), "600 characters"),
        (b"[" * 200_000, b"", "without end"),
    ],
)
def test_a_header_that_says_what_cannot_be_is_refused(tmp_path, header, data, words):
    write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(UnsafeFileError, match=words):
        read_header(Folder(tmp_path), "a.safetensors")


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"w": entry()}, bytes(8), "is corrupt"),
        ({"w": entry()}, bytes(17), "is corrupt"),
        (b"{not json", b"", "is corrupt"),
        (b"[1]", b"", "no JSON object"),
        (b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", "is no text"),
        ({"w": {"dtype": "F32"}}, b"", "lacks dtype, shape or data_offsets"),
    ],
)
def test_a_broken_file_is_named(tmp_path, header, data, words):
    write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ModelSourceError, match=words) as caught:
        read_header(Folder(tmp_path), "a.safetensors")
    assert not isinstance(caught.value, UnsafeFileError)


def test_header_bombs_are_not_read(tmp_path):
    bomb = tmp_path / "a.safetensors"
    write(bomb, b"{}", length=90_000_000)
    os.truncate(bomb, 100_000_000)  # sparse: no byte of it is on the disk
    with pytest.raises(UnsafeFileError, match="header of 86 MiB"):
        read_header(Folder(tmp_path), bomb.name)
    write(bomb, b"{}", length=2**63)
    with pytest.raises(ModelSourceError, match="cannot hold its header"):
        read_header(Folder(tmp_path), bomb.name)


def test_links_and_names_that_lead_out_are_not_opened(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "inside"
    inside.mkdir()
    outside.write_text("{}")
    (inside / "config.json").symlink_to(outside)
    (inside / "nowhere.json").symlink_to(tmp_path / "missing")
    os.mkfifo(inside / "pipe.json")
    folder = Folder(inside)
    for name, words in [
        ("config.json", "link to a file outside"),
        ("../outside", "leads out of the folder"),
        (str(outside), "leads out of the folder"),
        ("a\0b", "leads out of the folder"),
        ("nowhere.json", "leads nowhere"),
        ("pipe.json", "no regular file"),
    ]:
        with pytest.raises(UnsafeFileError, match=words):
            folder.json(name)


def test_an_index_that_names_files_outside_is_refused(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    write(tmp_path / "out.safetensors", {"w": entry()}, bytes(16))
    (inside / INDEX).write_text(json.dumps({"weight_map": {"w": "../out.safetensors"}}))
    with pytest.raises(UnsafeFileError, match="leads out of the folder"):
        read_headers(Folder(inside))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "x").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/x")
    assert Folder(snapshot).json("config.json") == {"a": 1}


def test_json_has_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "JSON_LIMIT", 100)
    (tmp_path / "config.json").write_text(json.dumps({"a": "x" * 200}))
    (tmp_path / "deep.json").write_text("[" * 99)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "nan.json").write_text('{"a": NaN}')
    with pytest.raises(UnsafeFileError, match="has more than"):
        Folder(tmp_path).json("config.json")
    for name, words in [("deep.json", "not readable JSON"), ("list.json", "not a JSON object"), ("nan.json", "NaN")]:
        with pytest.raises(ModelSourceError, match=words):
            Folder(tmp_path).json(name)


def test_a_pickled_adapter_is_refused_unopened(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(UnsafeFileError, match=r"adapter_model\.bin.*is a pickle"):
        find_adapter(tmp_path)


def test_endless_expressions_are_stopped():
    with pytest.raises(UnsafeFileError, match="backtracks without end"), patience("it", 0.3):
        re.fullmatch(r"(a+)+$", "a" * 40 + "b")


def report():
    bad = Finding(3, "x", "red", f"key {EVIL}", cause=EVIL, fix=EVIL, keeps_green=f"pytest {EVIL}", notes=(EVIL,))
    return Report(f"base {EVIL}", f"adapter {EVIL}", (bad,), {"peft": "1"})


def test_what_strangers_wrote_stays_text():
    for text in (as_text(report()), as_markdown(report()), as_json(report())):
        assert not set(text) & set("\x1b\x07\x9b\u202e\r")
    assert "<script>" in as_text(report())  # a terminal has no markup but escapes
    assert "<" not in as_markdown(report())
    assert "<" not in as_json(report())
    assert as_markdown(report()).count("\n") == 7 - 1
    rows = [line for line in as_markdown(report()).splitlines() if line.startswith("| 3")]
    assert len(rows) == 1
    assert rows[0].count("|") == 6
    assert json.loads(as_json(report()))["findings"][0]["name"] == "x"


def test_texts_are_cut_and_lines_stay_lines():
    assert neutral("a\nb\tc") == r"a\nb\tc"
    assert neutral("é\ud800") == r"é\ud800"
    assert neutral("x" * 50, 10) == "x" * 10 + "[... 40 more characters]"
    assert numbers([12, 1, 10, 11, 19]) == "1, 10-12, 19"


def test_a_red_finding_has_cause_and_fix():
    with pytest.raises(ValueError, match="lacks its cause or its fix"):
        Finding(1, "x", "red", "broken")
