"""Inner pytest runs: light ones with stand-ins for the model, and a few with the real one."""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files

import hypothesis  # noqa: F401 - its plugin imports it at the end of a run, and inner runs would each time anew
import jsonschema
import numpy  # noqa: F401 - cannot be loaded twice; Pillow 10.4 imports it, in an inner run that drops what it imports
import pytest

from pytest_qvl.gpu.lease import SESSION_VARIABLE, TOKEN_VARIABLE
from pytest_qvl.gpu.lock_file import DIRECTORY_VARIABLE

SCHEMA = json.loads(files("pytest_qvl").joinpath("report", "record.schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(autouse=True)
def _every_record_has_one_shape(request):
    """Whatever an inner run was about: its record is valid, with the keys in their order."""
    folder = request.getfixturevalue("pytester").path if "pytester" in request.fixturenames else None
    yield
    for file in folder.glob("*.json") if folder else ():
        text = file.read_text(encoding="utf-8")
        if '"schema": "pytest-qvl/record/' in text:
            found = json.loads(text)
            VALIDATOR.validate(found)
            assert list(found) == list(SCHEMA["properties"])


@pytest.fixture(autouse=True)
def _nobody_has_spoken(monkeypatch):
    """No setting of whoever runs these tests reaches an inner run; a GPU that they lease does."""
    for name in list(os.environ):
        if name in {TOKEN_VARIABLE, SESSION_VARIABLE, DIRECTORY_VARIABLE}:
            continue
        if name.startswith(("QVL_", "PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_DISABLE", "GITHUB_STEP_SUMMARY")):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_module_is_older_than_its_source(monkeypatch):
    """pytest 9.0 tells a rewritten test module by size and full seconds; some tests write two within one second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture(scope="session")
def with_torch():
    """Import torch once: it cannot be loaded twice, and an inner run in this process drops what it imports."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_stack(with_torch):
    """Import all that a real model needs, once."""
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from pytest_qvl.models.backends import LoadRequest
    from pytest_qvl.models.owner import ModelOwner
    from pytest_qvl.models.sources.embedded import embedded_model_dir
    from pytest_qvl.models.sources.model_source import parse_model
    from pytest_qvl.models.sources.processors import load_processor
    from pytest_qvl.samples import make_batch, scenes

    owner = ModelOwner(print)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = owner.base(LoadRequest(parse_model("embedded"), quantization, "cpu", "float32"), "transformers")
    model = owner.adapted(base, "transformers", LoraConfig(r=2, target_modules=["q_proj"]), None, 0)
    batch = make_batch(load_processor(embedded_model_dir()), scenes(0, 1)[:1])
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    owner.release()


@pytest.fixture
def run_real(pytester, real_stack):
    """Run pytest in this process, with the real model on the CPU, in float32 unless the dtype is the subject.

    Not every CPU multiplies 16-bit numbers in hardware; the shipped suite itself runs in bfloat16.
    """

    def run(*args, dtype="float32", **kwargs):
        chosen = ("--qvl-device", "cpu", "--qvl-compute-dtype", dtype, "-p", "no:cacheprovider")
        return pytester.runpytest_inprocess(*chosen, *args, **kwargs)

    return run


@pytest.fixture
def run_light(pytester):
    """Run pytest in this process, on CPU targets only, so that nothing asks torch for a GPU."""

    def run(*args, **kwargs):
        return pytester.runpytest_inprocess("--qvl-device", "cpu", *args, **kwargs)

    return run


@pytest.fixture
def run_apart(pytester, monkeypatch):
    """Run pytest in a process of its own, with this plugin and those named: importing all others takes seconds."""

    def run(*args, plugins=()):
        if "xdist" in plugins:
            pytest.importorskip("xdist", reason="pytest-xdist is not installed")
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        named = [argument for name in ("qvl", *plugins) for argument in ("-p", name)]
        return pytester.runpytest_subprocess(*named, *args)

    return run


@pytest.fixture(scope="session")
def failures():
    """Tells the lines of the report of each failed test or set-up, by the test's name without parameters."""

    def failures(result):
        found, name = {}, None
        for line in result.outlines:
            if line.startswith("____"):
                name = line.strip("_ ").rpartition(" of ")[2].partition("[")[0]
            elif line.startswith(("====", "qvl: ")):
                name = None
            elif name is not None:
                found.setdefault(name, []).append(line)
        return found

    return failures
