"""The record says what was judged: digests of model, adapter, samples and processor, and how torch computed."""

from __future__ import annotations

import json

import pytest

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.samples import scenes
from pytest_qvl.session import subjects

SUITE = ("--pyargs", "pytest_qvl.suite", "-k", "adapter_census", "--qvl-record", "record.json")


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_what_was_judged_stands_in_the_record(pytester, run_real):
    run_real(*SUITE, "--qvl-seed", "3").assert_outcomes(passed=1)
    record = json.loads((pytester.path / "record.json").read_text(encoding="utf-8"))
    (found,) = record["subjects"]
    assert (found["target"], found["device"], found["backend"]) == ("embedded on cpu", "cpu", "transformers")
    assert (found["model"], found["family"], found["adapter"]) == ("embedded", "Qwen2.5-VL", None)
    assert found["digest"] == subjects.folder_digest(embedded_model_dir())
    assert found["quantization"] == {"type": "nf4", "double": True, "compute_dtype": "float32"}
    assert (found["lora"]["r"], found["torch"]["threads"]) == (16, 1)
    assert {"name": "qvl_seed", "value": "3", "source": "--qvl-seed"} in record["configuration"]
    assert record["suite"] == 1
    assert record["machine"]["cores"] >= 1


def test_a_digest_is_that_of_the_files_that_count(folder, monkeypatch):
    before = subjects.folder_digest(folder)
    (folder / "README.md").write_text("another text")
    assert subjects.folder_digest(folder) == before
    (folder / "config.json").write_text("another text")
    assert subjects.folder_digest(folder) != before


def test_of_a_large_file_the_beginning_and_the_size_count(folder, monkeypatch):
    monkeypatch.setattr(subjects, "WHOLE_FILE", 4)
    monkeypatch.setattr(subjects, "HEAD", 8)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"12345678 9")
    before = subjects.folder_digest(folder)
    weights.write_bytes(b"12345678 0")
    assert subjects.folder_digest(folder) == before
    for other in (b"1234567  9", b"12345678 90"):
        weights.write_bytes(other)
        assert subjects.folder_digest(folder) != before


def test_samples_are_told_by_pixels_and_answers():
    first, other = scenes(0, 2)[:2], scenes(1, 2)[:2]
    assert subjects.samples_digest(first) == subjects.samples_digest(scenes(0, 2)[:2])
    assert len({subjects.samples_digest(each) for each in (first, other, first[:1], first[::-1])}) == 4


def test_a_value_of_an_override_that_says_nothing_is_left_out(pytester, run_light):
    """An override without the attributes that are described is no reason to fail."""
    pytester.makeconftest(
        """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_lora_config(): return object()
    """
    )
    pytester.makepyfile("def test_it(qvl_lora_config, qvl_backend): pass")
    run_light("--qvl-record", "record.json").assert_outcomes(passed=1)
    (found,) = json.loads((pytester.path / "record.json").read_text(encoding="utf-8"))["subjects"]
    assert (found["target"], found["lora"]) == ("embedded on cpu", None)
