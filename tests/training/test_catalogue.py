"""Every planted mistake stops a real training at or before step 1, by the check and in the words of its cause."""

from __future__ import annotations

import json

import pytest
import transformers
from packaging.version import Version

from pytest_qvl.training import Guard, GuardError

from .catalogue import MISTAKES
from .catalogue.page import PAGE, page

BEFORE_5 = Version(transformers.__version__).major < 5
# One of each check and of each moment; the others, which find the same way, run with --slow.
QUICK = {
    "fp4-by-default",
    "seven-names-hit-the-vision-tower",
    "never-wrapped-by-peft",
    "adapter-merged-before-training",
    "resumed-adapter-thrown-away",
    "base-written-to-in-a-forward",
    "optimizer-before-the-adapter",
    "schedule-made-for-no-steps",
    "reentrant-checkpointing-without-input-gradients",
    "a-layer-cut-off",
    "gradients-zeroed-by-a-hook",
    "gradients-not-finite",
    "loss-not-finite",
    "unfrozen-by-a-callback",
    "vision-back-propagated",
    "weights-put-back-after-the-step",
    "base-moved-by-a-callback",
    "prompt-in-the-loss",
    "token-types-dropped",
    "image-truncated",
    "packed-rows-see-each-other",
    "packed-rows-with-a-cache",
}


@pytest.mark.parametrize(
    "mistake",
    [pytest.param(each, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, each in MISTAKES.items()],
)
def test_stops_by_step_1(mistake, bench, tmp_path):
    if mistake.since_5 and BEFORE_5:
        pytest.skip("no mistake before Transformers 5")
    settings = dict(mistake.guard)
    if "lora_config" in settings:
        settings["lora_config"] = bench.lora(**settings["lora_config"])
    with mistake.plant(bench, tmp_path, Guard(**settings)) as trainer:
        with pytest.raises(GuardError) as stopped:
            trainer.train()
        assert trainer.state.global_step <= 2 if "resumed" in mistake.name else trainer.state.global_step <= 1
    error = stopped.value
    print(error)
    assert error.check == mistake.check
    assert not [word for word in mistake.words if word not in str(error).partition("\nrecord:")[0]]
    record = json.loads((tmp_path / "qvl_guard.json").read_text())
    assert record["state"] == "stopped"
    assert record["findings"][0]["check"] == mistake.check


def test_there_are_enough_of_them_each_with_a_source():
    assert len(MISTAKES) >= 30
    assert MISTAKES.keys() > QUICK
    assert all("#" in each for mistake in MISTAKES.values() for each in mistake.source.split(","))


def test_the_page_has_all_of_them():
    assert PAGE.read_text(encoding="utf-8") == page(MISTAKES)


@pytest.mark.parametrize("other", ["docs/guard.md", "README.md"])
def test_pages_that_point_there_count_them(other):
    assert f"[{len(MISTAKES)} mistakes](" in (PAGE.parents[1] / other).read_text(encoding="utf-8")
