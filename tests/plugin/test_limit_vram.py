"""``limit_vram`` from collection to summary, in pytest runs whose GPU is a script."""

from __future__ import annotations

import pickle
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import pytest_qvl
from pytest_qvl.session.limit_vram import VramLimits
from pytest_qvl.session.mark_expressions import insists_on

ROOT = Path(pytest_qvl.__file__).parents[1]

CONFTEST = """
import pytest
from pytest_qvl.report.run_results import ResultsBuilder
from pytest_qvl.report.terminal import limit_lines
from pytest_qvl.session.limit_vram import LIMIT_VRAM_HELP, VramLimits
from pytest_qvl.session.session_limits import SessionLimits
from pytest_qvl.vram.meter import Meter
from pytest_qvl.vram.scripted import ScriptedAllocator, ScriptedProcess
from pytest_qvl.vram.units import parse_bytes

MiB = 1 << 20
CARD = ScriptedAllocator(started={started})
METER = Meter(CARD, ScriptedProcess(CARD, 600 * MiB))

def pytest_addoption(parser):
    parser.addini("default", "", default=None)
    parser.addoption("--required", action="store_true")

def pytest_configure(config):
    config.addinivalue_line("markers", LIMIT_VRAM_HELP)
    default = config.getini("default")
    limits = VramLimits(
        config, METER, default=default and parse_bytes(default), required=config.getoption("--required")
    )
    config.pluginmanager.register(limits, "limits")
    config.pluginmanager.register(SessionLimits(METER), "session-limits")
    config.pluginmanager.register(ResultsBuilder(), "results")

def pytest_sessionfinish(session):
    limits = session.config.pluginmanager.get_plugin("session-limits")
    for evidence in limits.evidence():
        for problem in evidence.problems:
            print("SESSION", problem)
            session.exitstatus = 1

def pytest_terminal_summary(terminalreporter, config):
    plugin = config.pluginmanager.get_plugin
    for line in limit_lines([*plugin("results").results().limits, *plugin("session-limits").outcomes]):
        terminalreporter.write_line(line)

@pytest.fixture
def card():
    return CARD

@pytest.fixture
def meter():
    return METER

@pytest.fixture(scope="session")
def model():
    with METER.phase("load", exclusive=True):
        with CARD.taken(900 * MiB):
            pass
        address = CARD.take(400 * MiB)
    yield address
    CARD.free(address)
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run a test file; ``started`` says whether CUDA is in use from the beginning.

    A process of its own, and its workers, import no plugins but those named.
    """

    def run_file(text, *args, started=True, subprocess=False, **more_files):
        pytester.makeconftest(CONFTEST.format(started=started))
        pytester.makepyfile(
            "import pytest, unittest\nMiB = 1 << 20\nmark = pytest.mark.limit_vram\n" + text, **more_files
        )
        if subprocess:
            monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        start = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return start("-p", "no:qvl", "--strict-markers", "-W", "error", *args)

    return run_file


# -- nonsense ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("'15'", "'15' is not a size: write a number and a unit, as in '15 GiB'"),
        ("'15 Gib of junk'", "'15 Gib of junk' is not a size"),
        ("15.5", "15.5 is not a size"),
        ("0", "it must be at least one byte"),
        ("", "missing 1 required positional argument: 'limit'"),
        ("'1 GiB', 'reserved'", "takes 1 positional argument"),
        ("'1 GiB', off='reserved'", "unexpected keyword argument 'off'"),
        ("'1 GiB', of='used'", "of='used' is none of allocated, reserved, process, fit"),
        ("'1 GiB', scope='class'", "scope='class' is none of call, test, session"),
        ("None, of='reserved'", "None lifts every limit, so it takes no of= and no scope="),
    ],
)
def test_nonsense_is_refused_before_any_test_runs(run, arguments, says):
    result = run(f"def test_fine(): print('RAN')\n@mark({arguments})\ndef test_wrong(): pass\n", "-s")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *::test_wrong: limit_vram({arguments}): *{says}*"])
    assert "RAN" not in result.stdout.str()
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()


def test_all_nonsense_is_told_at_once(run):
    result = run("@mark('a')\ndef test_a(): pass\n@mark('b')\nclass TestB:\n def test_b(self): pass\n")
    result.stderr.fnmatch_lines(["*::test_a: limit_vram('a')*", "*::TestB::test_b: limit_vram('b')*"])


def test_nonsense_in_a_worker_is_an_error_of_its_test(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = run("@mark('15')\ndef test_wrong(): pass\ndef test_fine(): pass\n", "-n1", "-p", "xdist", subprocess=True)
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(["*::test_wrong: limit_vram('15'): '15' is not a size*"])
    assert "INTERNALERROR" not in result.stdout.str()


def test_a_mark_that_a_fixture_adds_is_checked_and_enforced(run):
    result = run(
        """
@pytest.fixture
def limited(request): request.node.add_marker(mark(request.param))
@pytest.mark.parametrize("limited", ["700 MiB"], indirect=True)
def test_over(limited, card): card.take(200 * MiB)
@pytest.mark.parametrize("limited", ["700"], indirect=True)
def test_wrong(limited, card): pass
"""
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*fit 800 MiB*test_over*", "*'700' is not a size*"])


def test_the_marker_is_documented(run):
    result = run("", "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.limit_vram(limit, [*], of='fit', scope='call'): fail the test*"])


# -- what a limit measures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [399, 400, 401])
def test_a_limit_is_inclusive(run, peak):
    result = run(f"@mark('1000 MiB')\ndef test_it(card): card.free(card.take({peak} * MiB))")
    result.assert_outcomes(passed=int(peak <= 400), failed=int(peak > 400))


@pytest.mark.parametrize(("of", "value"), [("allocated", 300), ("reserved", 400), ("process", 1000), ("fit", 1000)])
def test_each_number_can_be_bounded(run, of, value):
    body = f"(card): card.free(card.take({300 if of == 'allocated' else 400} * MiB))"
    result = run(
        f"@mark('{value} MiB', of='{of}')\ndef test_in{body}\n"
        f"@mark('{value - 1} MiB', of='{of}')\ndef test_over{body}\n"
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines([f"*{of} {value} MiB*is 1 MiB above the limit of {value - 1} MiB in *::test_over *"])


def test_a_failure_names_phase_number_limit_and_holders(run, pytester):
    result = run(
        """
@mark("2 GiB", of="reserved")
def test_train(card, meter):
    card.take(512 * MiB, "embed")
    with meter.phase("prefill"), card.taken(256 * MiB, "attend"):
        pass
    with meter.phase("train step"), card.taken(2048 * MiB, "cross_entropy"):
        pass
"""
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "peak reserved 2.50 GiB is 512 MiB above the limit of 2.00 GiB in *::test_train *",
            "note: 0 B were allocated before it began*",
            "note: at the peak 2.00 GiB held by scripted/model.py:* cross_entropy",
            "note: at the peak 512 MiB held by scripted/model.py:* embed",
            "phase *allocated*reserved*process*fit*seconds",
            "train step *2.50 GiB*",
            "prefill *768 MiB*",
            "altogether *2.50 GiB*",
            "allocator snapshot: *-test-train-*.pickle *",
        ]
    )
    assert "markers.py" not in result.stdout.str()
    (kept,) = (pytester.path / ".pytest_cache/d/qvl-vram").iterdir()
    assert pickle.loads(kept.read_bytes()) == {"scripted": 5}


def test_without_a_cache_nothing_is_written(run, pytester):
    result = run("@mark('1 MiB')\ndef test_it(card): card.take(MiB)", "-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    assert "snapshot" not in result.stdout.str()


ORDERS = """
@mark("1050 MiB")
def test_small(card): card.free(card.take(50 * MiB))
def test_large(card): card.free(card.take(900 * MiB))
def test_leaves_cached(card): card.free(card.take(700 * MiB))
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_the_verdict_does_not_depend_on_what_ran_before(run, order):
    names = ["test_small", "test_large", "test_leaves_cached"]
    chosen = [f"test_the_verdict_does_not_depend_on_what_ran_before.py::{n}" for n in names]
    run(ORDERS, *(chosen if order == "first" else chosen[::-1])).assert_outcomes(passed=3)


def test_loading_a_session_fixture_is_not_charged_to_the_first_test(run):
    result = run(
        """
@mark("1010 MiB")
@mark("1010 MiB", scope="test")
def test_first(model, card): card.free(card.take(10 * MiB))
@mark("1010 MiB")
@mark("1010 MiB", scope="test")
def test_second(model, card): card.free(card.take(10 * MiB))
@mark("1009 MiB")
def test_over(model, card): card.free(card.take(10 * MiB))
"""
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["note: 400 MiB were allocated before it began (fixtures and earlier code)"])


FIXTURES = """
@pytest.fixture
def batch(card):
    card.free(card.take({setup} * MiB))
    yield
    card.free(card.take({teardown} * MiB))
@mark("900 MiB", scope="{scope}")
def test_it(batch, card): card.free(card.take({body} * MiB))
"""


@pytest.mark.parametrize(
    ("scope", "setup", "body", "teardown", "over"),
    [
        ("call", 900, 100, 900, False),
        ("call", 100, 900, 100, True),
        ("test", 900, 100, 100, True),
        ("test", 100, 900, 100, True),
        ("test", 100, 100, 900, True),
        ("test", 100, 100, 100, False),
    ],
)
def test_scopes(run, scope, setup, body, teardown, over):
    result = run(FIXTURES.format(scope=scope, setup=setup, body=body, teardown=teardown))
    if scope == "call":
        result.assert_outcomes(failed=int(over), passed=int(not over))
    else:
        result.assert_outcomes(passed=1, errors=int(over))
    assert ("fit 1.46 GiB" in result.stdout.str()) == over


def test_scope_session_counts_loading_and_is_nobodys_failure(run):
    result = run(
        """
@mark("1400 MiB", scope="session")
def test_first(model): pass
@mark("2 GiB", scope="session")
def test_second(model): pass
@mark("1 MiB", scope="session")
def test_deselected(): pass
""",
        "-k",
        "not deselected",
    )
    result.assert_outcomes(passed=2, deselected=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["*SESSION fit 1.46 GiB * is 100 MiB above the limit of 1.37 GiB in session *"])


# -- where a limit comes from --------------------------------------------------------------------------------


def test_marks_from_every_place(run):
    result = run(
        """
def use(card, size): card.free(card.take(size * MiB))

@mark("700 MiB")
class Base:
    def test_in(self, card): use(card, 100)
    def test_over(self, card): use(card, 101)
    @mark("800 MiB")
    def test_own_in(self, card): use(card, 200)
    @mark(None)
    def test_lifted(self, card): use(card, 900)
    @mark("50 MiB", of="allocated")
    def test_two_numbers_over(self, card): use(card, 60)

@mark("650 MiB")
class TestDerived(Base):
    def test_derived_in(self, card): use(card, 50)
    def test_derived_over(self, card): use(card, 51)

@mark("700 MiB")
@pytest.mark.parametrize("size", [
    100,
    pytest.param(200, marks=mark("800 MiB"), id="200-in"),
    pytest.param(201, marks=mark("800 MiB"), id="201-over"),
    pytest.param(901, marks=mark(None), id="901-lifted"),
])
def test_values(card, size): use(card, size)

@mark("700 MiB")
class TestOldStyle(unittest.TestCase):
    def setUp(self):
        from conftest import CARD
        self.card = CARD
    def test_in(self): use(self.card, 100)
    def test_over(self): use(self.card, 101)
    @mark("800 MiB")
    def test_own_in(self): use(self.card, 200)
""",
        "-rA",
    )
    outcome = {
        line.split("::", 1)[1].split(" - ")[0]: line.split()[0]
        for line in result.stdout.lines
        if line.startswith(("PASSED", "FAILED"))
    }
    assert outcome == {
        "TestDerived::test_in": "FAILED",
        "TestDerived::test_over": "FAILED",
        "TestDerived::test_own_in": "PASSED",
        "TestDerived::test_lifted": "PASSED",
        "TestDerived::test_two_numbers_over": "FAILED",
        "TestDerived::test_derived_in": "PASSED",
        "TestDerived::test_derived_over": "FAILED",
        "test_values[100]": "PASSED",
        "test_values[200-in]": "PASSED",
        "test_values[201-over]": "FAILED",
        "test_values[901-lifted]": "PASSED",
        "TestOldStyle::test_in": "PASSED",
        "TestOldStyle::test_over": "FAILED",
        "TestOldStyle::test_own_in": "PASSED",
    }


def test_a_default_for_every_test(run):
    result = run(
        """
def test_in(card): card.free(card.take(100 * MiB))
def test_over(card): card.free(card.take(101 * MiB))
@mark("800 MiB")
def test_more(card): card.free(card.take(200 * MiB))
@mark(None)
def test_lifted(card): card.free(card.take(900 * MiB))
@mark("1 GiB", of="allocated")
def test_both_over(card): card.free(card.take(101 * MiB))
""",
        "-o",
        "default=700 MiB",
        "-rf",
    )
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*limits: 3 held, 2 exceeded, 0 not measured",
            "FAILED *::test_over *",
            "FAILED *::test_both_over *",
        ]
    )


def test_no_limit_no_work(run):
    result = run("def test_it(card): card.take(MiB); assert card.settled == 0")
    result.assert_outcomes(passed=1)
    assert "vram limits" not in result.stdout.str()


# -- where nothing is measured -------------------------------------------------------------------------------


def test_without_cuda_the_body_runs_and_the_limit_is_counted(run):
    result = run(
        """
@mark("1 MiB")
def test_body(): print("BODY RAN")
@mark("1 MiB", scope="test")
def test_whole(): pass
@mark("1 MiB")
def test_own_failure(): assert 1 == 2
""",
        "-s",
        started=False,
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*BODY RAN*",
            "vram limits: 0 held, 0 exceeded, 3 not measured",
            "  not measured: CUDA was never used (3 ×)",
        ]
    )


def test_where_a_gpu_is_required_an_unmeasured_mark_is_an_error(run):
    result = run(
        "@mark('1 MiB')\ndef test_marked(): pass\ndef test_default(): pass",
        "--required",
        "-o",
        "default=1 GiB",
        started=False,
    )
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*::test_marked: its limit_vram was not measured, and a GPU is required: CUDA was*"])


def test_a_skipped_body_is_no_verdict(run):
    result = run("@mark('1 MiB')\ndef test_it(card):\n    card.take(9 * MiB)\n    pytest.skip('no data')")
    result.assert_outcomes(skipped=1)
    assert "vram limits" not in result.stdout.str()


# -- together with other verdicts ----------------------------------------------------------------------------


def test_a_failing_test_keeps_its_own_failure_and_shows_the_number(run):
    result = run("@mark('1 MiB')\ndef test_it(card):\n    card.take(MiB)\n    assert 'mine' == 'yours'")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E *assert 'mine' == 'yours'",
            "*Captured vram call*",
            "*fit 601 MiB*above the limit of 1 MiB*",
        ]
    )
    assert "exceeded" in result.stdout.str()


def test_running_out_of_memory_shows_who_held_it(run):
    result = run(
        """
class OutOfMemoryError(RuntimeError): pass
@mark("16 GiB")
def test_it(card, meter):
    with meter.phase("train step"):
        card.take(900 * MiB, "cross_entropy")
        raise OutOfMemoryError("CUDA out of memory")
"""
    )
    result.stdout.fnmatch_lines(
        [
            "*::test_it: ran out of memory",
            "at the peak 900 MiB held by scripted/model.py:* cross_entropy",
            "*snapshot: *",
        ]
    )


def test_an_expected_failure_stays_expected(run):
    run("@pytest.mark.xfail(strict=True)\n@mark('1 MiB')\ndef test_it(card): card.take(MiB)").assert_outcomes(xfailed=1)


def test_a_broken_device_fails_the_test_that_broke_it(run):
    result = run(
        """
@mark("16 GiB")
def test_breaks(card): card.trouble = "CUDA error: device-side assert triggered"
@mark("16 GiB")
def test_after(): pass
"""
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(
        [
            "*CudaBroken: CUDA broke in '*::test_breaks': CUDA error: device-side assert triggered*",
            "  not measured: CUDA broke in '*::test_breaks': CUDA error: device-side assert triggered (1 ×)",
        ]
    )


def test_numbers_are_in_junit(run, pytester):
    run("@mark('2 GiB')\ndef test_it(card): card.free(card.take(100 * MiB))", "--junitxml=out.xml")
    properties = ET.parse(pytester.path / "out.xml").iter("property")
    assert {p.get("name"): int(p.get("value")) >> 20 for p in properties} == {
        "qvl_vram_call_allocated": 100,
        "qvl_vram_call_reserved": 100,
        "qvl_vram_call_process": 700,
        "qvl_vram_call_fit": 700,
    }


def test_workers_report_to_the_controller(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    result = run(
        """
@mark("700 MiB")
@pytest.mark.parametrize("size", [100, 101, 99])
def test_it(card, size): card.free(card.take(size * MiB))
""",
        "-n2",
        "-p",
        "xdist",
        subprocess=True,
    )
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["vram limits: 2 held, 1 exceeded, 0 not measured"])


def test_every_kind_of_item_is_measured(run, pytester):
    pytester.makefile(".txt", test_doc=">>> from conftest import CARD\n>>> _ = CARD.take(101 << 20)\n")
    run("", "--doctest-glob=*.txt", "-o", "default=700 MiB").assert_outcomes(failed=1)


def test_the_module_imports_nothing_heavy(pytester):
    result = pytester.runpython_c(
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pytest_qvl.session.limit_vram; "
        "print([n for n in sys.modules if n.startswith(('torch', 'pytest_qvl.'))])"
    )
    light = ["session", "report", "releases", "evidence", "report.report_data", "session.keys", "session.limit_vram"]
    assert result.stdout.lines[-1] == str([f"pytest_qvl.{name}" for name in light])
    assert VramLimits.__module__ == "pytest_qvl.session.limit_vram"


# -- did this run ask for GPUs? ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "asked"),
    [
        ("gpu", True),
        ("gpu and not slow", True),
        ("not (slow or not gpu)", True),
        ("(gpu and a) or (gpu and b)", True),
        ("gpu(n=1)", True),
        ("", False),
        ("slow", False),
        ("not gpu", False),
        ("gpu or slow", False),
        ("not (gpu or slow)", False),
        ("gpus", False),
        ("gpu and not gpu", False),
        ("gpu and", False),
        (" and ".join(["gpu", *(f"not m{i}" for i in range(20))]), True),
        (" or ".join(["gpu", *(f"m{i}" for i in range(20))]), False),
    ],
)
def test_an_expression_that_insists_on_gpu(expression, asked):
    assert insists_on("gpu", expression) is asked
