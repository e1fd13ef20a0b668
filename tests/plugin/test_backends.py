"""Several backends in one run: a process for each, one report, and what becomes of a process that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pytest_qvl.models import backends

OTHER = """
    from pytest_qvl.models import backends
    backends.BACKENDS["other"] = backends.Registration("other:Nothing")
"""
# The parent's process number, for tests to compare with their own.
CONFTEST = """
    import os
    os.environ.setdefault("PARENT", str(os.getpid()))
"""
BOTH = ("-p", "other", "--qvl-device", "cpu", "--qvl-backend", "transformers", "--qvl-backend", "other")
# Whether this process had the plugin before its assertions could be rewritten depends on how it is installed.
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")


@pytest.fixture(autouse=True)
def _only_this_plugin(pytester, monkeypatch):
    """Other plugins of whoever runs this cost seconds in each process; and lines of the summary in full."""
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "pytest_qvl.plugin")
    monkeypatch.delenv("PARENT", raising=False)
    pytester.makepyfile(other=OTHER)
    pytester.syspathinsert()
    pytester.makeconftest(CONFTEST)


@pytest.fixture
def run_both(pytester, monkeypatch):
    """Run the tests of this folder with two backends; the parent in this process."""

    def run(*args):
        return pytester.runpytest_inprocess(*BOTH, *QUIET, *args)

    yield run
    backends.BACKENDS.pop("other", None)


def test_each_backend_has_a_process_of_its_own_and_this_one_runs_nothing(pytester, run_both):
    pytester.makepyfile(
        """
    import os, pytest
    @pytest.fixture(autouse=True)
    def elsewhere(): assert os.environ["PARENT"] != str(os.getpid())
    def test_model(qvl_target, qvl_backend, record_property):
        assert qvl_backend == qvl_target.backend
        record_property("pid", os.getpid())
        record_property("settings", qvl_backend)
    def test_plain(record_property): record_property("pid", os.getpid())
    """
    )
    result = run_both("-v", "--junitxml", "out.xml", "--strict-markers")
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        [
            "test_*.py::test_model[[]embedded-cpu] PASSED*",
            "test_*.py::test_plain PASSED*",
            "test_*.py::test_model[[]embedded-cpu-other] PASSED*",
        ]
    )
    text = (pytester.path / "out.xml").read_text()
    pids = re.findall(r'name="pid" value="(\d+)"', text)
    assert len(pids) == 3
    assert pids[0] == pids[1] != pids[2]
    assert 'tests="3"' in text


def test_one_report_with_evidence_failures_skips_and_warnings_of_both(pytester, run_both):
    pytester.makepyfile(
        """
    import warnings, pytest
    class OwnWarning(UserWarning): pass
    def test_kept(qvl_target, qvl_backend):
        from pytest_qvl.evidence import Judge
        judge = Judge("alignment", "promise")
        judge.at_most("drift", 0.5, 1.0 if qvl_backend == "transformers" else 0.1, else_say="the logits drift")
        judge.verdict()
    def test_skipped(qvl_target): pytest.skip("not today")
    @pytest.mark.xfail(reason="known")
    def test_known(qvl_target): assert False
    def test_warns(qvl_backend):
        print("heard from", qvl_backend)
        warnings.warn(OwnWarning("careful"))
        assert qvl_backend == "transformers", "only the baseline"
    """
    )
    result = run_both("-rs", "--qvl-record", "record.json")
    result.assert_outcomes(passed=2, failed=2, skipped=2, xfailed=2, warnings=2)
    result.stdout.fnmatch_lines(
        ["*test_kept[[]embedded-cpu-other]*", "*heard from other", "*OwnWarning: careful", "SKIPPED [[]2]*: not today"]
    )
    result.stdout.fnmatch_lines(
        [
            "qvl: embedded on cpu: 1 check kept",
            "qvl: embedded on cpu by other: BROKEN: alignment",
        ]
    )
    record = json.loads((pytester.path / "record.json").read_text())
    assert [check["target"] for check in record["checks"]] == ["embedded on cpu", "embedded on cpu by other"]
    assert record["tests"] == {"passed": 2, "skipped": 4, "failed": 2}
    assert "--qvl-record" in record["command"]


def test_what_both_measured_is_compared(pytester, run_both):
    pytester.makepyfile(
        """
    def test_it(qvl_target, qvl_backend):
        from pytest_qvl.evidence import Judge
        rows = [("language", 28, 28 if qvl_backend == "transformers" else 20)]
        Judge("quantization_census", "promise").verdict(("group", "linears", "quantized"), rows)
    """
    )
    result = run_both("--qvl-record", "record.json")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(
        [
            "=* backends side by side =*",
            "embedded on cpu: what is quantized",
            "   group     backend       linears  quantized",
            "   --------*",
            "   language  transformers  28       28",
            "   language  other         28       20",
        ]
    )
    (compared,) = json.loads((pytester.path / "record.json").read_text())["comparison"]
    assert compared["rows"] == [["language", "transformers", 28, 28], ["language", "other", 28, 20]]


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "died with signal 9 (SIGKILL)"),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", "died with signal 11 (SIGSEGV)", marks=pytest.mark.slow),
        pytest.param("os._exit(3)", "ended with exit status 3", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_dies_fails_its_tests_by_name_and_nobody_elses(pytester, run_both, death, how):
    pytester.makepyfile(
        f"""
    import os, signal
    def test_before(qvl_backend): pass
    def test_dies(qvl_backend):
        if qvl_backend == "transformers": {death}
    def test_after(qvl_backend): pass
    """
    )
    result = run_both("-rf", "--junitxml", "out.xml", "--tb=line")
    result.assert_outcomes(passed=4, failed=2)
    died = f"backend transformers's process {how} while running *::test_dies[[]embedded-cpu]"
    result.stdout.fnmatch_lines(
        [f"FAILED *::test_dies[[]embedded-cpu] - {died}", f"FAILED *::test_after[[]embedded-cpu] - not run: {died}"]
    )
    assert 'failures="2"' in (pytester.path / "out.xml").read_text()
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_process_that_dies_on_its_way_out_fails_the_session(pytester, run_both):
    pytester.makepyfile("import atexit, os\ndef test_it(qvl_backend): atexit.register(os._exit, 7)")
    result = run_both("--qvl-record", "record.json")
    result.assert_outcomes(passed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert json.loads((pytester.path / "record.json").read_text())["exit_status"] == result.ret
    result.stdout.fnmatch_lines(["qvl: backend other's process ended with exit status 7 after its last test"])


def test_what_only_one_process_cannot_import_fails_there(pytester, run_both):
    pytester.makepyfile(
        test_a="def test_a(qvl_backend): pass",
        test_b="""
    import os
    if os.environ["PARENT"] != str(os.getpid()): raise RuntimeError("not in this process")
    def test_b(): pass
    """,
    )
    result = run_both("-rfE")
    result.stdout.fnmatch_lines(["ERROR test_b.py - RuntimeError: not in this process"])
    result.stdout.fnmatch_lines(["FAILED test_a.py::test_a[[]embedded-cpu-other] - not run: *1 error during coll*"])


FAILS = """
    def test_a(qvl_backend): assert qvl_backend != "transformers"
    def test_b(qvl_backend): assert False
    def test_c(qvl_backend): pass
"""


@pytest.mark.parametrize(
    ("arguments", "failed", "passed", "says"),
    [
        pytest.param(["-x"], 1, 0, "stopping after 1 fail*", marks=pytest.mark.slow),
        (["--maxfail=3"], 3, 2, "stopping after 3 fail*"),
    ],
    ids=["x", "maxfail"],
)
def test_failures_are_counted_over_processes(pytester, run_both, arguments, failed, passed, says):
    pytester.makepyfile(FAILS)
    result = run_both(*arguments)
    result.assert_outcomes(failed=failed, passed=passed)
    result.stdout.fnmatch_lines([f"!*{says}!*"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.slow
def test_last_failed_keywords_and_stepwise(pytester, run_both):
    pytester.makepyfile(FAILS)
    run_both().assert_outcomes(failed=3, passed=3)
    result = run_both("--lf", "-v")
    result.assert_outcomes(failed=3)
    result.stdout.fnmatch_lines(["*test_b[[]embedded-cpu-other] FAILED*"])
    result = run_both("-k", "other and not test_b")
    result.assert_outcomes(passed=2, deselected=4)
    run_both("--sw").assert_outcomes(failed=1)


def test_output_that_is_not_captured_comes_in_order(pytester):
    pytester.makepyfile("def test_it(qvl_backend): print('SAID', qvl_backend)")
    result = pytester.runpytest_subprocess(*BOTH, "-s", "-v")
    result.stdout.fnmatch_lines(
        ["*test_it[[]embedded-cpu] SAID transformers", "PASSED", "*[[]embedded-cpu-other] SAID other", "PASSED"]
    )


@pytest.mark.parametrize("flag", ["--pdb", "--trace"])
def test_a_debugger_is_refused(pytester, run_both, flag):
    pytester.makepyfile("def test_it(qvl_backend): pass")
    result = run_both(flag)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {flag} needs the tests in this process*choose one with --qvl-backend"])


def test_exit_ends_the_whole_run(pytester, run_both):
    pytester.makepyfile("import pytest\ndef test_it(qvl_backend): pytest.exit('enough', returncode=9)")
    result = run_both()
    assert result.ret == 9
    result.stdout.fnmatch_lines(["!*Exit: backend transformers: enough*!"])


def test_ctrl_c_ends_the_processes_and_shows_what_was_found(pytester):
    pytester.makepyfile(
        """
    import os, pathlib, time, pytest
    @pytest.fixture
    def tidy():
        yield
        pathlib.Path("tidied").touch()
    def test_first(qvl_backend): pass
    def test_long(qvl_backend, tidy):
        pathlib.Path("pid.tmp").write_text(str(os.getpid()))
        os.rename("pid.tmp", "pid")
        time.sleep(60)
    """
    )
    command = [sys.executable, "-m", "pytest", *BOTH]

    def heed_ctrl_c():  # a shell's background jobs, and all they start, ignore it
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        command, cwd=pytester.path, stdout=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        deadline = time.monotonic() + 60
        while not (pytester.path / "pid").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    assert "KeyboardInterrupt" in text
    assert "1 passed" in text
    assert (pytester.path / "tidied").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((pytester.path / "pid").read_text()), 0)


def test_a_required_gpu_is_looked_for_in_all_processes(pytester, run_both):
    pytester.makepyfile(
        """
    import pytest
    def test_plain(): pass
    @pytest.mark.gpu
    def test_card(qvl_backend):
        if qvl_backend == "other": pytest.skip("no card here")
    """
    )
    result = run_both("--qvl-require-gpu", "-rf")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["FAILED *test_card[[]embedded-cpu-other] - *a GPU test was skipped: no card here"])
    result.stdout.fnmatch_lines(["qvl: --qvl-require-gpu: no GPU test was executed: 1 marked gpu ran and *"])
    result = run_both("--qvl-require-gpu", "-k", "plain", "--qvl-record", "record.json")
    assert json.loads((pytester.path / "record.json").read_text())["exit_status"] == result.ret
    result.stdout.fnmatch_lines(["qvl: --qvl-require-gpu: no GPU test was executed"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_limits_on_the_session_are_held_in_each_process(pytester, run_both):
    pytester.makepyfile(
        """
    import pytest
    @pytest.mark.limit_vram("1 GiB", scope="session")
    def test_it(qvl_backend): pass
    """
    )
    result = run_both()
    result.stdout.fnmatch_lines(["qvl: vram limits: 0 held, 0 exceeded, 2 not measured"])


def test_collecting_starts_no_process(pytester, run_both):
    pytester.makepyfile("def test_it(qvl_backend): pass")
    result = run_both("--collect-only", "-q")
    assert [line for line in result.outlines if "::" in line] == [
        f"test_collecting_starts_no_process.py::test_it[embedded-cpu{by}]" for by in ("", "-other")
    ]


def test_workers_belong_to_each_backends_process(pytester):
    pytester.makepyfile(
        """
    import os
    def test_a(qvl_backend, worker_id): assert worker_id != "master" and "QVL_CHILD_BACKEND" not in os.environ
    def test_b(qvl_backend): assert qvl_backend == "other"
    """
    )
    result = pytester.runpytest_subprocess("-p", "xdist", *BOTH, "-n", "1", "-v")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*test_b[[]embedded-cpu] FAILED*", "*test_b[[]embedded-cpu-other] PASSED*"])
    result.stdout.no_fnmatch_line("*bringing up nodes*")


def test_a_device_that_a_backend_lacks_is_one_clear_error(pytester, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "fast", backends.Registration("fast:Fast", devices=("cuda",)))
    pytester.makepyfile("def test_it(qvl_backend): pass")
    result = pytester.runpytest_inprocess("--qvl-backend", "fast", "--qvl-device", "cpu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --qvl-device: backend 'fast' runs on cuda only, not on 'cpu'; choose *"])
    result = pytester.runpytest_inprocess("--qvl-backend", "fast", "--collect-only", "-q")
    assert [line.partition("::")[2] for line in result.outlines if "::" in line] == ["test_it[embedded-cuda-fast]"]
