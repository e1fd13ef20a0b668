"""Words that a check must say of a fault hold for every model, not for the embedded one alone."""

from __future__ import annotations

import re

import pytest

from pytest_qvl.faults import catalogue
from pytest_qvl.faults.sizes import EMBEDDED, Sizes

COUNTS = {str(size) for size in (EMBEDDED.language, EMBEDDED.adapter, EMBEDDED.vision)}
LARGER = Sizes(layers=28, language=196, vision=160, merger=2, vision_mlp=96, merger_tensors=5, dtype="float16")


@pytest.mark.parametrize("name", catalogue())
def test_layers_of_the_embedded_model_are_not_counted_in_figures(name: str) -> None:
    """Write ``{language}``, ``{adapter}`` or ``{vision}`` in their place: see :class:`Sizes`."""
    numbers = {number for words in catalogue()[name].expected_words for number in re.findall(r"\b\d+\b", words)}
    assert numbers & COUNTS == set()


def test_words_take_the_sizes_of_the_model_at_hand() -> None:
    words = ("{language} of {adapter}", "{behind_inputs} and {beyond_two_layers}", "in {dtype}", "blocks.3")
    assert LARGER.fill(words) == ("196 of 392", "112 and 182", "in float16", "blocks.3")


def test_a_size_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(AttributeError, match="heads"):
        EMBEDDED.fill(["{heads} heads"])
