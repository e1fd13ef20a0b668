"""The corpus: every broken artefact is named with its cause, no healthy one raises an alarm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from preflight_corpus import BROKEN, HEALTHY, Case, Workshop

from pytest_qvl.preflight import preflight
from pytest_qvl.releases import installed


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("corpus"))


def judged(case: Case, shop: Workshop):
    arguments = dict(case.build(shop, case.family))
    return preflight(str(arguments.pop("base")), **arguments)


# Kinds whose siblings go the same way through the code: with ``--slow`` only.
SIBLINGS = frozenset(
    {
        *("key-projections-trained-whole", "merged-with-a-trained-merger", "by-parameters", "started-by-pissa"),
        *("merged-from-olora-in-float32", "merged-from-pissa-with-dora", "another-checkpoint-of-pissa-merged"),
        *("pissa-served-by-vllm", "adapter-of-integers", "tower-cast-to-eight-bits", "adapter-in-eight-bits"),
        *("epsilon-of-another-model", "image-token-of-another-model", "heads-of-another-tower"),
        *("only-the-tokenizer-beside-the-merge", "index-of-the-merge-lost", "biases-switched-off-afterwards"),
        *("merged-with-alpha-and-quantized", "packed-base-saved-in-place-of-the-merge", "merged-from-random-pissa"),
    }
)


def parameters(cases: Sequence[Case]) -> list[Any]:
    """Each kind once and without ``--slow`` on one family, another from kind to kind; siblings and the rest with it."""
    families: dict[str, list[Case]] = {}
    for case in cases:
        families.setdefault(case.name, []).append(case)
    found = []
    for number, group in enumerate(families.values()):
        found += [
            pytest.param(case, id=case.id, marks=() if place == number % len(group) and not slow else pytest.mark.slow)
            for place, case in enumerate(group)
            for slow in [case.name in SIBLINGS]
        ]
    return found


@pytest.mark.parametrize("case", parameters(BROKEN))
def test_what_is_broken_is_named(case, shop):
    report = judged(case, shop)
    red = {finding.name for finding in report.red}
    if case.versions and not SpecifierSet(case.versions).contains(installed("transformers"), prereleases=True):
        assert not set(case.red) & red
        return
    assert set(case.red) <= red, report.red
    said = " ".join(f"{f.line} {f.cause} {f.fix}" for f in report.red if f.name in case.red)
    assert case.words in said
    assert not [finding for finding in report.not_judged if "error of its own" in finding.line]


def test_a_merge_is_not_judged_where_every_load_has_another_start(shop):
    (case,) = (case for case in BROKEN if case.name == "merged-from-random-pissa")
    found = judged(case, shop).of(7)
    assert {finding.state for finding in found} == {"not judged"}
    assert "not-compared" in {finding.name for finding in found}


@pytest.mark.parametrize("case", parameters(HEALTHY))
def test_what_is_healthy_raises_no_alarm(case, shop):
    report = judged(case, shop)
    assert not report.red
    assert not [finding for finding in report.not_judged if "error of its own" in finding.line]


def test_the_corpus_is_what_the_documentation_says():
    assert len({case.name for case in BROKEN if case.thread}) >= 40
    assert len(HEALTHY) >= 50
    assert {case.family for case in BROKEN} == {case.family for case in HEALTHY}
    assert {case.name for case in (*BROKEN, *HEALTHY)} >= SIBLINGS
    assert not [id_ for id_, count in Counter(case.id for case in (*BROKEN, *HEALTHY)).items() if count > 1]
    assert all(case.red and case.words for case in BROKEN)
