"""Which parts of the plugin listen to reports and to the end of a session, and in which order."""

from __future__ import annotations

import re

from pytest_qvl.session import phases

SHOW = """
def ordered(hook):
    impls = hook.get_hookimpls()  # pluggy calls the last first; wrappers are around, the last outermost
    return [i for i in reversed(impls) if not i.wrapper] + [i for i in impls if i.wrapper]

def pytest_collection_finish(session):
    for name in ("pytest_runtest_logreport", "pytest_sessionfinish", "pytest_terminal_summary"):
        for impl in ordered(getattr(session.config.hook, name)):
            print(name, impl.function.__module__)
"""
ALL_OF_IT = ("--qvl-record", "r.json", "--qvl-require-gpu", "--qvl-fault", "skip-list-visual", "--junitxml", "j.xml")
ALL_OF_IT += ("--qvl-html", "p.html", "--qvl-compare", "shipped")


def test_the_end_of_a_session_goes_in_the_order_that_is_written_down(pytester, run_light):
    pytester.makeconftest(SHOW)
    pytester.makepyfile("def test_plain(): pass")
    found = [line.split() for line in run_light("-s", *ALL_OF_IT).outlines if line.startswith("pytest_")]
    heard = {name: [module for hook, module in found if hook == name] for name, _ in found}
    written = re.findall(r"^\d+\. ``([\w.]+)``: ", phases.__doc__, re.MULTILINE)
    assert len(written) == 11
    ends = [module for module in heard["pytest_sessionfinish"] if module in written]
    assert ends == [*written[:-1], "pytest_qvl.report.record", written[-1]]
    own = {name: [m for m in modules if m.startswith("pytest_qvl.")] for name, modules in heard.items()}
    assert [module for module in own["pytest_sessionfinish"] if module not in written] == []
    assert own["pytest_runtest_logreport"] == ["pytest_qvl.report.run_results"]
    # What a fault did is said below all else, by the second.
    assert own["pytest_terminal_summary"] == [
        "pytest_qvl.report.terminal",
        "pytest_qvl.report.base_comparison",
        "pytest_qvl.report.terminal",
    ]
