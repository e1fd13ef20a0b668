"""docs/qlora-on-qwen3.5.md and the cards are what the records give; intervals hold what they say."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
transformers = pytest.importorskip("transformers")
stats = pytest.importorskip("scipy.stats")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="not in a checkout"),
    pytest.mark.skipif(
        not hasattr(transformers, "Qwen3_5ForConditionalGeneration"),
        reason=f"Transformers {transformers.__version__} has no Qwen3.5",
    ),
]
MADE = "run: python tools/nf4_page.py"


@pytest.fixture(scope="module")
def tool() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        patch.delitem(sys.modules, "nf4_page", raising=False)
        import nf4_page

        yield nf4_page


@pytest.fixture(scope="module")
def records(tool: Any) -> dict[str, Any]:
    return tool.read_records()


@pytest.fixture(scope="module")
def shapes(tool: Any) -> Any:
    return tool.all_sizes()


def test_the_page_is_what_the_records_give(tool: Any, records: dict[str, Any], shapes: Any) -> None:
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(records, shapes), MADE


@pytest.mark.parametrize("family", ["qwen3.5", "qwen3-vl"])
def test_cards_and_weights_are_those_of_the_records(family: str, tool: Any, records: dict[str, Any]) -> None:
    folder = tool.CARDS[family]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == tool.written(card, records[family]), MADE
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert records[family]["models"][0]["sha256"] == weights, "the record is of other weights than are committed"
    with pytest.raises(ValueError, match="the card has no place for accuracies"):
        tool.written("# Card", records[family])


def test_at_least_five_seeds_of_each_family(records: dict[str, Any]) -> None:
    for record in records.values():
        digests = [model["sha256"] for model in record["models"]]
        assert len(set(digests)) == len(digests) >= 5
        assert all(model["scenes"] == 10 * record["per_skill"] for model in record["models"])


def test_records_agree_with_themselves(records: dict[str, Any], tool: Any) -> None:
    """Flips are what right answers differ by; nothing quantized diverges by nothing."""
    for record in records.values():
        for model in record["models"]:
            for condition in tool.CONDITIONS:
                entries = model[condition]["float32"]
                assert (entries["nothing"]["kl"], entries["nothing"]["agreeing"]) == (0, model["answer_tokens"])
                for entry in entries.values():
                    net = sum(entries["nothing"]["right"]) - sum(entry["right"])
                    assert net == entry["lost"] - entry["gained"]
                    assert entry["kl"] >= 0


@pytest.mark.parametrize("total", [1, 7, 40])
@pytest.mark.parametrize("rate", [0.0, 0.02, 0.3, 0.5, 1.0])
def test_the_interval_of_a_share_holds_it_as_often_as_it_says(total: int, rate: float, tool: Any) -> None:
    """Over every possible count with its exact probability."""
    held = 0.0
    for count in range(total + 1):
        low, high = tool.share_interval(count, total, 0.95)
        held += stats.binom.pmf(count, total, rate) * (low <= rate <= high)
    assert held >= 0.95 - 1e-12


def test_the_interval_of_no_flip_by_hand(tool: Any) -> None:
    """None of n: the rate at which none has a probability of half the error is the upper end."""
    low, high = tool.net_loss_interval(0, 0, 1000)
    assert high == pytest.approx(1 - (0.05 / 4) ** (1 / 1000))
    assert low == -high


@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.1, 0.0), (0.05, 0.05), (0.3, 0.1), (0.5, 0.5)])
def test_the_interval_of_net_loss_holds_it_as_often_as_it_says(lost: float, gained: float, tool: Any) -> None:
    """Over every possible number of answers lost and gained, of 12, with its exact probability."""
    total, held = 12, 0.0
    for first in range(total + 1):
        for second in range(total + 1 - first):
            counts = [first, second, total - first - second]
            chance = stats.multinomial.pmf(counts, total, [lost, gained, max(1 - lost - gained, 0)])
            low, high = tool.net_loss_interval(first, second, total)
            held += chance * (low <= lost - gained <= high)
    assert held >= 0.95 - 1e-12


def test_the_interval_of_net_loss_tells_a_loss_from_none(tool: Any) -> None:
    low, high = tool.net_loss_interval(60, 10, 1000)
    assert 0 < low < 0.05 < high
    assert tool.net_loss_interval(10, 60, 1000) == pytest.approx((-high, -low))


def _bought(tool: Any, gates: list[float], rest: list[float]) -> Any:
    return tool.Bought(tuple(gates), tuple(rest), (1.0,) * len(gates), 0, 0)


@pytest.mark.parametrize(
    ("alone", "left_out", "said"),
    [
        (
            ([1, 1], [2, 2]),
            ([1, 1], [2, 2]),
            "**No: the rest buys more, in 2 of 2 models and every comparison below.**",
        ),
        (([3, 3], [2, 2]), ([3, 3], [2, 2]), "**Yes: they buy more, in 2 of 2 models and every comparison below.**"),
        (([1, 1], [2, 2]), ([1, 3], [2, 2]), "**No: alone the rest costs more in 2 of 2 models; with other groups"),
        (
            ([1, 3], [2, 2]),
            ([1, 3], [2, 2]),
            "**Not decided: by comparison, the rest buys more in 1 to 1 of 2 models.**",
        ),
    ],
)
def test_the_finding_goes_with_the_figures(alone: Any, left_out: Any, said: str, tool: Any) -> None:
    first, second = list(tool.QUESTIONS)[:2]
    found = {("clear", first): _bought(tool, *alone), ("clear", second): _bought(tool, *left_out)}
    assert tool.finding(found).startswith(said)


def test_what_is_bought_is_what_no_longer_diverges(tool: Any, records: dict[str, Any]) -> None:
    """And the pairs that the script compared scene by scene are these differences, the same way round."""
    record = records["qwen3.5"]
    for condition in tool.CONDITIONS:
        for number, question in enumerate(tool.QUESTIONS):
            one = tool.bought(record, condition, question)
            for index, model in enumerate(record["models"]):
                more = model[condition]["pairs"][number]["kl_more"]
                whole = model[condition]["float32"]["everything"]["kl"]
                assert math.isclose(one.rest[index] - one.gates[index], more, abs_tol=1e-3 * whole, rel_tol=1e-3)
    alone = tool.bought(record, "clear", "each quantized alone")
    assert alone.gates == tuple(m["clear"]["float32"]["only in_proj_a and in_proj_b"]["kl"] for m in record["models"])
    kept = tool.bought(record, "clear", "the language backbone in NF4")
    for saved, model in zip(kept.rest, record["models"], strict=True):
        entries = model["clear"]["float32"]
        assert saved == entries["language"]["kl"] - entries["language without the rest of linear_attn"]["kl"]


def test_per_mib_is_by_the_released_shape(tool: Any, shapes: Any) -> None:
    gates, rest = _bought(tool, [8.85], [2279.5]).per_mib(shapes["qwen3.5-9b"])
    assert gates == pytest.approx(1, rel=1e-3)
    assert rest == pytest.approx(1, rel=1e-3)


def test_an_answer_that_moves_on_clear_scenes_is_named(tool: Any, records: dict[str, Any]) -> None:
    record = deepcopy(records["qwen3.5"])
    for model in record["models"]:
        for entry in model["clear"]["float32"].values():
            entry.update(agreeing=model["answer_tokens"], lost=0, gained=0)
    assert "no configuration in float32 moves a top-1 token or an answer" in tool.clear_flips(record)
    record["models"][2]["clear"]["float32"]["only in_proj_b"].update(
        agreeing=record["models"][2]["answer_tokens"] - 3, lost=2, gained=1
    )
    said = tool.clear_flips(record)
    assert said.startswith("On clear scenes 1 of 38 configurations")
    assert said.endswith("the most is 3, with 2 answers lost and 1 gained (only `in_proj_b`).")


def test_every_group_has_its_rows(tool: Any, records: dict[str, Any], shapes: Any) -> None:
    made = tool.page(records, shapes)
    for group in tool.groups_of(records["qwen3.5"]):
        assert len(re.findall(rf"^\| (?:but for )?{re.escape(tool.code(group))} \|", made, re.MULTILINE)) >= 3, group
