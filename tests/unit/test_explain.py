"""``pytest-qvl explain``: every check has its promise, method, cause and fix, and names faults and threads."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_qvl.checks.declared import declared
from pytest_qvl.cli import main
from pytest_qvl.promises import PROMISES
from pytest_qvl.records.explain import docstring, explain, faults_of, links
from pytest_qvl.records.remedies import REMEDIES


def test_every_check_has_a_remedy_and_no_other_has():
    assert set(REMEDIES) == set(declared())
    for remedy in REMEDIES.values():
        assert all(text.endswith(".") and len(text) > 20 for text in remedy)


@pytest.mark.parametrize("name", declared())
def test_every_check_is_explained(name):
    text = explain(name)
    first, method = docstring(declared()[name])
    assert first and method and first in text and method.partition("docs/")[0].rstrip("`") in text
    assert ".md" not in text, "a file that no wheel has"
    assert PROMISES[declared()[name].promise - 1].title in text
    assert "Args:" not in text
    assert REMEDIES[name].fix in text
    for fault in faults_of(name):
        assert fault.name in text
        for link in links(fault.source) if fault.source else ():
            assert link in text


def test_limits_are_found_by_the_heading_that_derives_them():
    assert '(the documentation\'s Limits, "own rounding")' in explain("generation_batch_invariance")
    assert "derived in the documentation's Limits\n" in explain("alignment")


def test_releases_with_a_known_defect_are_named():
    assert "transformers >=5.2,<5.4" in explain("position_state")


@pytest.mark.parametrize(("name", "says"), [("feature_scater", "'feature_scatter'"), ("xyz", "they are: peak_vram")])
def test_a_check_that_nobody_knows_is_refused_with_the_nearest(capsys, name, says):
    assert main(["explain", name]) == 2
    assert says in capsys.readouterr().err


def test_a_test_of_the_suite_is_a_check_too(capsys):
    assert main(["explain", "test_causality"]) == 0
    assert capsys.readouterr().out.startswith("causality: ")


def test_explaining_imports_no_torch():
    code = (
        "import sys; from pytest_qvl.cli import main; main(['explain', 'alignment']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_threads_are_addresses():
    assert links("a/b#1, c-d/e.f#22") == ["https://github.com/a/b/issues/1", "https://github.com/c-d/e.f/issues/22"]
    assert links("arXiv:2104.09864") == ["arXiv:2104.09864"]
