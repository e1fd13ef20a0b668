"""The card table: numbers a process really gets."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_qvl.vram.cards import card, card_names
from pytest_qvl.vram.units import GiB, MiB


@pytest.mark.parametrize("name", card_names())
def test_every_card_gives_less_than_it_advertises(name: str) -> None:
    found = card(name)
    assert found.name == name
    assert 0 < found.usable_bytes < found.nominal_bytes
    # A context takes a few hundred MiB on every card: more than CUDA's own kernels, less than a gigabyte.
    assert 400 * MiB < found.context_bytes < 1 * GiB
    assert found.bf16 == (found.compute_capability[0] >= 8)
    assert found.source


def test_a_t4_leaves_what_its_users_report() -> None:
    """14.0 to 14.3 GiB remain of a T4 once a process has its context (torch shows 14.56 to 14.75 GiB)."""
    t4 = card("t4")
    assert 14.0 * GiB <= t4.usable_bytes - t4.context_bytes <= 14.3 * GiB
    assert t4.compute_capability == (7, 5)
    assert not t4.bf16


def test_an_h200_is_the_measured_one() -> None:
    """143,155 MiB by ``torch.cuda.mem_get_info`` and 770 MiB outside the allocator after a training run."""
    h200 = card("h200")
    assert abs(h200.usable_bytes - 143_155 * MiB) <= 16 * MiB
    assert abs(h200.context_bytes - 770 * MiB) <= 1 * MiB


def test_names_are_read_in_any_case_and_unknown_ones_refused_with_the_known() -> None:
    assert card(" T4 ") is card("t4")
    with pytest.raises(ValueError, match=r"card 't5' is unknown; known: .*\bt4\b.*h200; did you mean t4\?$"):
        card("t5")
    with pytest.raises(ValueError, match=r"card 'quadro' is unknown; known: .*h200$"):
        card("quadro")


def test_names_are_ordered_by_memory() -> None:
    sizes = [card(name).usable_bytes for name in card_names()]
    assert sizes == sorted(sizes)


def test_cards_and_units_need_the_standard_library_only() -> None:
    code = (
        "import sys, pytest_qvl.vram.cards, pytest_qvl.vram.units, pytest_qvl.cli, pytest_qvl.vram.forecast;"
        "print([m for m in ('torch', 'transformers', 'peft', 'bitsandbytes', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
