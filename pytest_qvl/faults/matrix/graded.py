"""Graded defects: the smallest dose of each that is caught, on a model of any size."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.definitions.adapters import another_adapter
from pytest_qvl.faults.definitions.disk import scaled, trained
from pytest_qvl.faults.definitions.layers import attention_times, product_times, rotary_base_times, tower_eps
from pytest_qvl.faults.definitions.lora import low_rank_of
from pytest_qvl.faults.definitions.positions import at_images
from pytest_qvl.faults.definitions.quantization import four_bit
from pytest_qvl.faults.matrix.panel import UNDECIDED, judge
from pytest_qvl.faults.tools import all_of, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import mergers, vision_blocks
from pytest_qvl.models.taps import features_replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.faults.case import Case

Dose = Callable[["Case"], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Graded:
    """One defect in growing doses, each held against the checks that could see it."""

    defect: str
    checks: tuple[str, ...]
    doses: tuple[tuple[str, Dose], ...]


@dataclass(frozen=True)
class Smallest:
    """The smallest dose of a defect that one check catches.

    Attributes:
        defect: What is wrong.
        check: Which check judged.
        caught: The dose; empty if it catches none of them.
        missed: Smaller doses, or all.
        undecided: Why the check cannot judge this model, or empty.
    """

    defect: str
    check: str
    caught: str
    missed: tuple[str, ...]
    undecided: str = ""


def smallest_doses(case: Case, graded: Graded) -> list[Smallest]:
    """Try the doses of a graded defect on each of its checks, the smallest first, up to the first that is caught."""
    found = []
    for check in graded.checks:
        missed: list[str] = []
        caught = undecided = ""
        for label, dose in graded.doses:
            with dose(case):
                verdict = judge(case, check)
            if verdict.outcome == UNDECIDED:
                undecided = verdict.message
                break
            if verdict.noticed:
                caught = label
                break
            missed.append(label)
        found.append(Smallest(graded.defect, check, caught, tuple(missed), undecided))
    return found


def _moved(tokens: int) -> Dose:
    def change(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        for row, token in places.nonzero().tolist()[-tokens:] if tokens else places.nonzero().tolist():
            positions[2, row, token] += 1
        return positions

    return lambda case: at_images(case, change)


def _exchanged(pairs: int) -> Dose:
    def change(features: torch.Tensor) -> torch.Tensor:
        features = features.clone()
        for pair in range(pairs):
            features[[2 * pair, 2 * pair + 1]] = features[[2 * pair + 1, 2 * pair]]
        return features

    return lambda case: features_replaced(anatomy(case.model), change)


def _quantized(choose: Callable[[list[list[Any]]], list[Any]]) -> Dose:
    """Quantize those linears of the tower that are chosen from its blocks' own."""

    def dose(case: Case) -> AbstractContextManager[None]:
        parts = anatomy(case.model)
        names = {module: name for name, module in parts.base.named_modules()}
        blocks = [[part for part in block.parts if hasattr(part, "in_features")] for block in vision_blocks(parts)]
        return all_of([four_bit(case.model, names[linear]) for linear in choose(blocks)])

    return dose


def _with_merger(*, whole: bool) -> Dose:
    """Adapt the last linear of the merger, or every linear of every merger."""

    @contextmanager
    def dose(case: Case) -> Iterator[None]:
        from dataclasses import replace

        before, parts = (case.model, case.lora_config), anatomy(case.model)
        names = {module: name for name, module in parts.base.named_modules()}
        linears = [linear for merger in mergers(parts) for linear in (merger.second, merger.first)]
        chosen = [re.escape(names[linear]) for linear in linears[: None if whole else 1]]
        regex = "|".join([case.lora_config.target_modules, *chosen])
        try:
            with another_adapter(case, replace(case.lora_config, target_modules=regex)):
                yield
        finally:
            case.model, case.lora_config = before

    return dose


def _altered(share: float, group: str) -> Dose:
    """Flip the sign of a share of one part's weights, at least of one; they are spread evenly over the part."""

    def flip(weight: torch.Tensor) -> torch.Tensor:
        flat = weight.view(-1)
        flat[:: max(1, round(1 / share))] *= -1
        return weight

    def dose(case: Case) -> AbstractContextManager[None]:
        parts = anatomy(case.model)
        matrices = [
            p
            for name, p in parts.base.named_parameters()
            if parts.group_of(name) == group and p.is_floating_point() and p.ndim >= 2 and "lora_" not in name
        ]
        return all_of([values(p, flip) for p in matrices])

    return dose


def _one_element(case: Case) -> AbstractContextManager[None]:
    def flip(weight: torch.Tensor) -> torch.Tensor:
        weight.view(-1)[weight.numel() // 2] *= -1
        return weight

    return values(vision_blocks(anatomy(case.model))[1].mlp.up.weight, flip)


def _times(factor: float) -> Dose:
    @contextmanager
    def dose(case: Case) -> Iterator[None]:
        with trained(case, 0.03), scaled(case, factor):
            yield

    return dose


def _off(change: Callable[[Case, float], Any], percent: float) -> Dose:
    return lambda case: change(case, 1 + percent / 100)


def _lora_times(case: Case, times: float) -> AbstractContextManager[None]:
    return low_rank_of(case, lambda _layer, x: x, times=lambda scaling, _x: times * scaling)


def _eps(eps: float) -> Dose:
    return lambda case: tower_eps(case, eps)


GRADED = (
    Graded(
        "positions of visual tokens off by one on one axis",
        ("mrope_positions", "alignment"),
        (("1 token", _moved(1)), ("2 tokens", _moved(2)), ("all image tokens", _moved(0))),
    ),
    Graded(
        "visual tokens in each other's place",
        ("visual_token_order", "alignment"),
        (("1 pair", _exchanged(1)), ("2 pairs", _exchanged(2)), ("4 pairs", _exchanged(4))),
    ),
    Graded(
        "vision linears quantized",
        ("quantization_census", "vision_stability", "alignment"),
        (
            ("one linear", _quantized(lambda blocks: blocks[-2][:1])),
            ("one block", _quantized(lambda blocks: blocks[-2])),
            ("half of the blocks", _quantized(lambda blocks: list(chain(*blocks[len(blocks) // 2 :])))),
            ("all blocks", _quantized(lambda blocks: list(chain(*blocks)))),
        ),
    ),
    Graded(
        "LoRA on the merger",
        ("adapter_census",),
        (("one linear", _with_merger(whole=False)), ("all linears", _with_merger(whole=True))),
    ),
    Graded(
        "vision weights with the wrong sign",
        ("vision_stability", "alignment"),
        (
            ("1 weight", _one_element),
            ("0.01 %", _altered(1e-4, "vision")),
            ("0.1 %", _altered(1e-3, "vision")),
            ("1 %", _altered(1e-2, "vision")),
            ("10 %", _altered(1e-1, "vision")),
        ),
    ),
    Graded(
        "scaling of an adapter that is harmless as saved",
        ("alignment",),
        tuple((f"{factor} x", _times(factor)) for factor in (2, 4, 6, 8, 16)),
    ),
    Graded(
        "one 4-bit product off by a factor",
        ("layer_arithmetic", "alignment"),
        tuple((f"{share:g} %", _off(product_times, share)) for share in (0.01, 0.1, 0.5, 1, 5)),
    ),
    Graded(
        "scaling of one language attention",
        ("layer_arithmetic", "alignment"),
        tuple((f"{share:g} %", _off(attention_times, share)) for share in (0.01, 0.1, 0.5, 1, 5)),
    ),
    Graded(
        "base of the rotary embedding",
        ("layer_arithmetic", "alignment"),
        tuple((f"{share:g} %", _off(rotary_base_times, share)) for share in (0.1, 1, 10, 100)),
    ),
    Graded(
        "scaling of every LoRA layer",
        ("layer_arithmetic", "alignment"),
        tuple((f"{share:g} %", _off(_lora_times, share)) for share in (0.01, 0.1, 1, 5, 100)),
    ),
    Graded(
        "eps of the tower's norms instead of 1e-6",
        ("layer_arithmetic", "vision_stability"),
        tuple((f"{eps:g}", _eps(eps)) for eps in (1.01e-6, 1.1e-6, 2e-6, 1e-5, 1e-4, 1e-2)),
    ),
)
