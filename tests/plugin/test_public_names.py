"""What other people's code may rely on, against a committed list: moving modules about changes none of it."""

import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("public_names.json")
PATHS = {
    "pytest_qvl.evidence": ("CannotJudge", "CheckFailed", "Evidence"),
    "pytest_qvl.models.backends": ("BACKENDS", "Backend", "Registration"),
    "pytest_qvl.vram.meter": ("Meter",),
    "pytest_qvl.vram.scripted": (),
    "pytest_qvl.vram.forecast": ("forecast",),
    "pytest_qvl.samples": ("make_batch", "scenes"),
    "pytest_qvl.training": ("Guard", "GuardError", "GuardWarning"),
    "pytest_qvl.preflight": ("Finding", "Report", "preflight", "require_green"),
}


def parameters(function):
    return [str(p).partition(":")[0].partition("=")[0].strip() for p in inspect.signature(function).parameters.values()]


def public():
    """Everything by kind: names of checks with their parameters, fixtures, settings and documented paths."""
    import pytest_qvl.checks as checks
    import pytest_qvl.fixtures as fixtures
    from pytest_qvl.options import SETTINGS

    functions = {name: getattr(checks, name) for name in checks.__all__}
    return {
        "checks": {name: parameters(f) if inspect.isfunction(f) else None for name, f in sorted(functions.items())},
        "fixtures": sorted(name for name in vars(fixtures) if name.startswith("qvl_")),
        "settings": {s.name: [s.flag, s.env, s.ini_type, s.default] for s in SETTINGS},
        "paths": {module: [n for n in names if hasattr(import_module(module), n)] for module, names in PATHS.items()},
    }


@pytest.mark.parametrize("kind", ["checks", "fixtures", "settings", "paths"])
def test_names_are_those_of_the_committed_list(kind):
    assert public()[kind] == json.loads(LIST.read_text(encoding="utf-8"))[kind]


def test_the_suite_has_the_tests_of_the_committed_list(pytester, with_torch):
    result = pytester.runpytest_inprocess("--collect-only", "-q", "--qvl-device", "cpu", "--pyargs", "pytest_qvl.suite")
    ids = [line.rpartition("suite/")[2] for line in result.outlines if "::" in line]
    assert ids == json.loads(LIST.read_text(encoding="utf-8"))["tests"]
