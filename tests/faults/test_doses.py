"""The smallest dose of each graded defect that its own check catches on the embedded model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_qvl.faults.matrix.doses import GRADED
from pytest_qvl.faults.matrix.graded import Graded, smallest_doses
from pytest_qvl.faults.matrix.work import _case
from pytest_qvl.faults.subject import embedded

# In bfloat16 on the CPU. test_other_models.py has quick ones on random weights.
SMALLEST = {
    "positions of visual tokens off by one on one axis": "1 token",
    "visual tokens in each other's place": "1 pair",
    "vision linears quantized": "one linear",
    "LoRA on the merger": "one linear",
    "vision weights with the wrong sign": "0.01 %",
    "scaling of an adapter that is harmless as saved": "6 x",
    "one 4-bit product off by a factor": "0.5 %",
    "scaling of one language attention": "0.5 %",
    "base of the rotary embedding": "0.1 %",
    "scaling of every LoRA layer": "0.1 %",
    "eps of the tower's norms instead of 1e-6": "1.1e-06",
    "absmax of one 4-bit block": "the next of its 8-bit codes",
    "absmax of 256 block scales (double quantization)": "1 float32 step",
    "offset of one layer's double quantization": "1 float32 step",
    "packed bytes of one 4-bit layer zeroed": "1 byte",
    "code book of one 4-bit layer": "one entry, 1 float32 step",
    "biases of q and v": "1 step of one element each",
    "biases of quantized q projections not added": "1 %",
    "bias of one vision linear not added": "1 %",
    "two vision blocks mixed": "0.001 %",
    "eps of the language norms, as modules have it": "1.000001 x",
    "eps of one language norm, as its kernel has it": "1.1 x",
    "frequencies of M-RoPE given from height to width, as modules have it": "1 frequency",
    "frequencies of M-RoPE given from height to width, as a kernel has it": "1 frequency",
    "pixels: mean of the processor off by a factor": "0.01 %",
    "pixels: the second frame of still images faded": "0.01 %",
    "key-value cache one step stale while decoding": "1 element of the key",
    "LoRA reads the token before": "0.01 %",
    "LoRA dropout on in eval mode": "0.1 %",
    "lora_alpha saved off by a factor": "0.01 %",
    "checkpointing with another dropout mask": "0.1 %",
    "loss off by a factor": "0.0001 %",
    "label smoothing in the loss": "1e-06",
    "tokens that the loss counts and does not sum": "1 token",
    "tokens whose label is not shifted": "1 token",
    "accumulated gradient off by a factor": "5 %",
    "gradient of one layer's adapter off by a factor": "5 %",
    "gradient lost between two layers": "5 %",
}


def test_every_defect_has_its_smallest_dose() -> None:
    assert list(SMALLEST) == [graded.defect for graded in GRADED]
    for graded in GRADED:
        assert SMALLEST[graded.defect] in dict(graded.doses)


@pytest.mark.slow
@pytest.mark.parametrize("graded", GRADED, ids=lambda graded: graded.defect)
def test_the_smallest_dose_is_caught(graded: Graded) -> None:
    (found,) = smallest_doses(_case(embedded()), replace(graded, checks=graded.checks[:1]))
    if found.undecided:
        pytest.skip(found.undecided)
    assert found.caught == SMALLEST[graded.defect]
