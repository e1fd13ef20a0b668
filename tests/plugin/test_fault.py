"""``--qvl-fault``: the shipped suite on a damaged model, as a user meets it."""

from __future__ import annotations

import json

import pytest

SUITE = ("--pyargs", "pytest_qvl.suite")
MODEL = "qvl: model embedded (default), device cpu (--qvl-device), compute dtype float32 (--qvl-compute-dtype)"


@pytest.fixture(scope="module")
def healthy_once(real_stack):
    """The real healthy case, made once: each fault puts back what it damages (tests/faults/test_named.py)."""
    from functools import cache

    from pytest_qvl.faults import healthy_case

    return cache(healthy_case)


@pytest.fixture
def run_fault(run_real, healthy_once, monkeypatch):
    """Run some checks of the suite with a fault."""
    monkeypatch.setattr("pytest_qvl.faults.healthy_case", healthy_once)

    def run(fault, checks, *args):
        return run_real(*SUITE, "--qvl-fault", fault, "-k", checks, "-rN", *args)

    return run


def test_the_suite_shows_what_a_fault_looks_like(run_fault):
    result = run_fault("scatter-off-by-one", "feature_scatter or placeholder_counts")
    result.assert_outcomes(failed=2, passed=3)
    result.stdout.fnmatch_lines(
        [
            f"{MODEL}, fault scatter-off-by-one (--qvl-fault)",
            "*still holds the placeholder's own text embedding*",
            "*features land on their placeholders *BROKEN *",
            "qvl: fault scatter-off-by-one: Every visual token lands one place to the right of its placeholder.",
            "qvl: feature_scatter must catch it, and caught it; so did no other check",
        ]
    )


def test_a_fault_in_the_users_own_optimizer_reaches_the_suite(pytester, run_fault):
    result = run_fault("optimizer-holds-vision", "adapter_census", "--qvl-record", "r.json")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["qvl: adapter_census must catch it, and caught it; so did no other check"])
    record = json.loads((pytester.path / "r.json").read_text(encoding="utf-8"))
    fault, (subject,) = record["fault"], record["subjects"]
    # The fault's own setup, not the one that the user's fixtures made.
    assert (subject["lora"]["r"], subject["lora"]["lora_alpha"], subject["family"]) == (8, 16, "Qwen2.5-VL")
    assert (fault["name"], fault["check"], fault["state"]) == ("optimizer-holds-vision", "adapter_census", "caught")
    assert (fault["also"], fault["reference"]) == ([], "")


def test_a_fault_whose_check_was_not_run_says_so(run_light, pytester):
    pytester.makepyfile("def test_mine(): pass")
    result = run_light("--qvl-fault", "scatter-off-by-one")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["qvl: feature_scatter must catch it, and was not run"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scatter-of"], "--qvl-fault: no fault is called 'scatter-of'; did you mean *"),
        (["scatter-off-by-one", "--qvl-images", "."], "*rendered scenes and *; drop qvl_images (--qvl-images)"),
    ],
)
def test_nonsense_is_one_line(pytester, arguments, says):
    result = pytester.runpytest_inprocess("--qvl-fault", *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {says}"])


@pytest.mark.parametrize(
    ("arguments", "collected", "left_out"),
    [
        ([], "embedded-cpu", "embedded-cuda"),
        (["--qvl-device", "cuda"], "embedded-cuda", "embedded-cpu"),
        (["--qvl-model", "synthetic:qwen2.5-vl-7b"], "qwen2.5-vl-7b-cuda", "qwen2.5-vl-7b-cpu"),
    ],
)
def test_a_fault_is_made_on_the_model_and_device_asked_for(pytester, arguments, collected, left_out):
    chosen = ("--qvl-fault", "scatter-off-by-one", "--collect-only", "-q", *arguments)
    result = pytester.runpytest_inprocess(*SUITE, *chosen)
    assert result.ret == 0
    assert f"test_feature_scatter[{collected}-left]" in result.stdout.str()
    assert left_out not in result.stdout.str()


def test_a_fault_in_a_batch_reaches_the_training_checks(run_fault):
    result = run_fault("pixels-require-grad", "vision_not_backpropagated and plain")
    result.stdout.fnmatch_lines(["qvl: vision_not_backpropagated must catch it, and caught it*"])


@pytest.mark.parametrize("fault", ["data-answers-truncated", pytest.param("data-user-learned", marks=pytest.mark.slow)])
def test_a_fault_in_a_collator_reaches_the_check_of_the_data(run_fault, fault):
    result = run_fault(fault, "test_batch")
    result.stdout.fnmatch_lines(["qvl: batch must catch it, and caught it; so did no other check"])
