"""An option's value is no path to tests: the project's own ini and conftest.py count, however the option is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.session.rootdir import joined

SEES = """
    import pytest

    def test_it(pytestconfig, seen):
        print("ROOTDIR", pytestconfig.rootpath, "INI", pytestconfig.getini("qvl_seed"), seen)
"""
CONFTEST = """
    import pytest

    def pytest_addoption(parser):
        parser.addoption("--mine", default="nothing")

    @pytest.fixture
    def seen(pytestconfig):
        return "OVERRIDDEN " + pytestconfig.getoption("--mine")
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """A project in a folder of its own, a model folder and a record outside of it."""
    folder = pytester.mkdir("project")
    monkeypatch.chdir(folder)
    (folder / "pytest.ini").write_text("[pytest]\nqvl_seed = 7\n")
    for name, source in (("conftest", CONFTEST), ("test_sees", SEES)):
        pytester.makepyfile(**{f"project/{name}": source})
    (pytester.path / "elsewhere").mkdir()
    (pytester.path / "elsewhere" / "out.json").write_text('{"schema":"pytest-qvl/record/1"}')
    (pytester.path / "elsewhere" / "model").symlink_to(embedded_model_dir())
    return folder


def test_joined():
    there = str(Path.cwd())
    assert joined(["--qvl-model", there, "-x", "--qvl-require-gpu", there]) == (
        [f"--qvl-model={there}", "-x", "--qvl-require-gpu", there],
        True,
    )
    assert joined(["--qvl-model", "embedded", "--qvl-seed=1"]) == (["--qvl-model=embedded", "--qvl-seed=1"], False)
    assert joined(["--", "--qvl-model", there]) == (["--", "--qvl-model", there], False)
    assert joined(["--qvl-model"]) == (["--qvl-model"], False)
    assert joined(["--qvl-record", "-x", there]) == (["--qvl-record", "-x", there], False)
    assert joined(["--qvl-images", "x" * 5000]) == ([f"--qvl-images={'x' * 5000}"], False)


@pytest.mark.parametrize(
    ("flag", "name", "written"),
    [
        ("--qvl-model", "model", "apart"),
        ("--qvl-record", "out.json", "apart"),
        ("--qvl-images", "model", "joined"),
        ("--qvl-record", "out.json", "environment"),
        ("--qvl-record", "out.json", "file"),
    ],
)
def test_a_path_does_not_move_the_rootdir(pytester, run_light, project, monkeypatch, flag, name, written):
    path = pytester.path / "elsewhere" / name
    arguments = {"apart": [flag, str(path)], "joined": [f"{flag}={path}"], "environment": [], "file": ["@arguments"]}
    if written == "environment":
        monkeypatch.setenv("PYTEST_ADDOPTS", f"{flag} '{path}'")
    (project / "arguments").write_text(f"{flag}\n{path}\n")
    result = run_light("-s", "--mine", "this", "-p", "no:cacheprovider", *arguments[written])
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"*ROOTDIR {project} INI 7 OVERRIDDEN this*"])
    assert result.stdout.str().count("test session starts") == 1
    assert f"{path.resolve()} ({flag})" in result.stdout.str()


def test_exit_status_and_usage_errors_of_a_run_that_started_over(pytester, run_light, project):
    pytester.makepyfile(**{"project/test_red": "def test_red(): assert False"})
    record = str(pytester.path / "elsewhere" / "out.json")
    assert run_light("--qvl-record", record).ret == pytest.ExitCode.TESTS_FAILED
    result = run_light("--qvl-record", record, "--nonsense")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unrecognized arguments: --nonsense*"])


OVERRIDES = """
    import pytest
    @pytest.fixture(scope="session")
    def qvl_lora_config(): return 1
    @pytest.fixture(name="qvl_model")
    def _mine(): return 2
    @pytest.fixture
    def other(): return 3
"""


def test_the_header_names_what_is_overridden_where(pytester, run_light, monkeypatch):
    pytester.makeini("[pytest]")
    pytester.makeconftest(OVERRIDES)
    pytester.makepyfile(**{"mine": OVERRIDES, "sub/conftest": OVERRIDES, "sub/test_it": "def test_it(): pass"})
    pytester.syspathinsert()
    monkeypatch.chdir(pytester.path / "sub")
    result = run_light("-p", "mine", "--collect-only")
    result.stdout.fnmatch_lines_random(
        [
            "qvl: ../conftest.py overrides qvl_lora_config, qvl_model",
            "qvl: ../mine.py overrides qvl_lora_config, qvl_model",
            "qvl: conftest.py overrides qvl_lora_config, qvl_model, not for pytest_qvl.suite",
        ]
    )
    assert "WARNING: the rootdir" not in result.stdout.str()
    result = run_light("--collect-only", "--pyargs", "pytest_qvl.suite.test_vision")
    result.stdout.fnmatch_lines([f"qvl: WARNING: the rootdir {pytester.path} is not {pytester.path}/sub, where*"])
    result = run_light("--collect-only", "--pyargs", "pytest_qvl.suite.test_vision", "--rootdir=.")
    result.stdout.fnmatch_lines(["qvl: conftest.py overrides qvl_lora_config, qvl_model"])
    assert "WARNING: the rootdir" not in result.stdout.str()
