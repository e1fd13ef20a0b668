"""The graded defects: what is wrong, in which doses, and which checks could see it."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.definitions.adapters import another_adapter
from pytest_qvl.faults.definitions.cache import stale
from pytest_qvl.faults.definitions.configuration import language_epsilon_times, sections_changed, width_for_height
from pytest_qvl.faults.definitions.disk import scaled, trained
from pytest_qvl.faults.definitions.gradients import (
    accumulated_times,
    gradient_times,
    loss_times,
    lost_on_the_way,
    more_counted,
    not_shifted,
    smoothed,
)
from pytest_qvl.faults.definitions.images import image_processor_set
from pytest_qvl.faults.definitions.layers import (
    attention_times,
    frequencies_moved,
    norm_eps_times,
    product_times,
    query_biases_left_out,
    rotary_base_times,
    tower_eps,
    vision_bias_left_out,
)
from pytest_qvl.faults.definitions.lora import (
    alpha_times,
    another_mask,
    dropout_in_eval,
    low_rank_of,
    reads_elsewhere,
)
from pytest_qvl.faults.definitions.positions import at_images
from pytest_qvl.faults.definitions.preprocessing import later_frames_times
from pytest_qvl.faults.definitions.quantization import four_bit
from pytest_qvl.faults.definitions.weights import (
    biases_of_q_and_v,
    block_times,
    blocks_mixed,
    exchange_codes,
    nested_block,
    offset,
    one_step,
    packed_zero,
    quantized_weight,
)
from pytest_qvl.faults.matrix.graded import Graded
from pytest_qvl.faults.tools import all_of, name_of, values
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import mergers, vision_blocks
from pytest_qvl.models.taps import features_replaced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case
    from pytest_qvl.faults.matrix.graded import Dose

    Doses = tuple[tuple[str, Dose], ...]


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
        blocks = [[part for part in block.parts if hasattr(part, "in_features")] for block in vision_blocks(parts)]
        return all_of([four_bit(case.model, name_of(parts, linear)) for linear in choose(blocks)])

    return dose


def _with_merger(*, whole: bool) -> Dose:
    """Adapt the last linear of the merger, or every linear of every merger."""

    @contextmanager
    def dose(case: Case) -> Iterator[None]:
        parts = anatomy(case.model)
        linears = [linear for merger in mergers(parts) for linear in (merger.second, merger.first)]
        chosen = [re.escape(name_of(parts, linear)) for linear in linears[: None if whole else 1]]
        regex = "|".join([case.lora_config.target_modules, *chosen])
        with another_adapter(case, replace(case.lora_config, target_modules=regex)):
            yield

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


def _off(change: Callable[[Case, float], Any], percents: Sequence[float]) -> Doses:
    """What takes a factor, off by so many per cent."""
    return tuple((f"{percent:g} %", _given(change, 1 + percent / 100)) for percent in percents)


def _shares(change: Callable[[Case, float], Any], percents: Sequence[float]) -> Doses:
    """What takes a share, at so many per cent."""
    return tuple((f"{percent:g} %", _given(change, percent / 100)) for percent in percents)


def _given(change: Callable[..., Any], *arguments: Any) -> Dose:
    return lambda case: change(case, *arguments)


def _lora_times(case: Case, times: float) -> AbstractContextManager[None]:
    return low_rank_of(case, lambda _layer, x: x, times=lambda scaling, _x: times * scaling)


def _of_offset(change: Callable[[torch.Tensor], torch.Tensor]) -> Dose:
    return lambda case: offset(case, change)


def _next_code(case: Case) -> AbstractContextManager[None]:
    """The absmax of one block, an 8-bit code, moved to the code beside it."""

    def change(absmax: torch.Tensor) -> torch.Tensor:
        absmax[0] ^= 1
        return absmax

    return values(quantized_weight(case).quant_state.absmax, change)


def _codes(change: Callable[[torch.Tensor], torch.Tensor]) -> Dose:
    return lambda case: values(quantized_weight(case).quant_state.code, change)


def _one_code(change: Callable[[torch.Tensor], torch.Tensor]) -> Dose:
    def one(code: torch.Tensor) -> torch.Tensor:
        code[3] = change(code[3])
        return code

    return _codes(one)


def _packed(share: float) -> Dose:
    """The same share of a layer's packed bytes, at least one."""
    return lambda case: packed_zero(case, max(1, round(share * quantized_weight(case).numel())))


def _biases(change: Callable[[torch.Tensor], torch.Tensor]) -> Dose:
    return lambda case: biases_of_q_and_v(case, change)


def _first_element(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0] = one_step(tensor[0])
    return tensor


def _widened(change: Callable[[Case, int], Any], share: float) -> Dose:
    """Give a share of the height's frequencies to the width, at least one."""

    def dose(case: Case) -> Any:
        _time, height, _width = anatomy(case.model).language_backbone.rotary_emb.mrope_section
        return change(case, max(1, round(share * height)))

    return dose


def _sections(case: Case, count: int) -> AbstractContextManager[None]:
    return sections_changed(case, lambda section: width_for_height(section, count))


def _mean_times(case: Case, times: float) -> Any:
    own = case.processor.image_processor.image_mean
    return image_processor_set(case, image_mean=[times * mean for mean in own])


def _faded(case: Case, share: float) -> AbstractContextManager[None]:
    return later_frames_times(case, 1 - share)


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
        _off(product_times, (0.01, 0.1, 0.5, 1, 5)),
    ),
    Graded(
        "scaling of one language attention",
        ("layer_arithmetic", "alignment"),
        _off(attention_times, (0.01, 0.1, 0.5, 1, 5)),
    ),
    Graded(
        "base of the rotary embedding",
        ("layer_arithmetic", "alignment"),
        _off(rotary_base_times, (0.1, 1, 10, 100)),
    ),
    Graded(
        "scaling of every LoRA layer",
        ("layer_arithmetic", "alignment"),
        _off(_lora_times, (0.01, 0.1, 1, 5, 100)),
    ),
    Graded(
        "eps of the tower's norms instead of 1e-6",
        ("layer_arithmetic", "vision_stability"),
        tuple((f"{eps:g}", _given(tower_eps, eps)) for eps in (1.01e-6, 1.1e-6, 2e-6, 1e-5, 1e-4, 1e-2)),
    ),
    Graded(
        "absmax of one 4-bit block",
        ("weights_as_stored",),
        (
            ("the next of its 8-bit codes", _next_code),
            ("x 1.02", _given(block_times, 1.02)),
            ("x 2", _given(block_times, 2.0)),
            ("x 0", _given(block_times, 0.0)),
        ),
    ),
    Graded(
        "absmax of 256 block scales (double quantization)",
        ("weights_as_stored",),
        (
            ("1 float32 step", _given(nested_block, one_step)),
            ("2 %", _given(nested_block, lambda absmax: 1.02 * absmax)),
            ("lost", _given(nested_block, lambda absmax: 0 * absmax)),
        ),
    ),
    Graded(
        "offset of one layer's double quantization",
        ("weights_as_stored", "alignment"),
        (
            ("1 float32 step", _of_offset(one_step)),
            ("1 % lost", _of_offset(lambda own: 0.99 * own)),
            ("10 % lost", _of_offset(lambda own: 0.9 * own)),
            ("all lost", _of_offset(lambda own: 0 * own)),
        ),
    ),
    Graded(
        "packed bytes of one 4-bit layer zeroed",
        ("weights_as_stored", "alignment"),
        (("1 byte", _packed(0)), ("1 %", _packed(0.01)), ("10 %", _packed(0.1)), ("half", _packed(0.5))),
    ),
    Graded(
        "code book of one 4-bit layer",
        ("weights_as_stored", "quantization_census", "alignment"),
        (
            ("one entry, 1 float32 step", _one_code(one_step)),
            ("one entry, 1 %", _one_code(lambda entry: 1.01 * entry)),
            ("one entry, 10 %", _one_code(lambda entry: 1.1 * entry)),
            ("two entries exchanged", _codes(exchange_codes)),
        ),
    ),
    Graded(
        "biases of q and v",
        ("weights_as_stored", "alignment"),
        (
            ("1 step of one element each", _biases(_first_element)),
            ("1 % lost", _biases(lambda bias: 0.99 * bias)),
            ("10 % lost", _biases(lambda bias: 0.9 * bias)),
            ("all lost", _biases(lambda bias: 0 * bias)),
        ),
        requires=("biases of q, k and v",),
    ),
    Graded(
        "biases of quantized q projections not added",
        ("layer_arithmetic",),
        _shares(query_biases_left_out, (0.1, 1, 10, 100)),
        requires=("biases of q, k and v",),
    ),
    Graded(
        "bias of one vision linear not added",
        ("layer_arithmetic", "vision_stability"),
        _shares(vision_bias_left_out, (0.1, 1, 10, 100)),
    ),
    Graded(
        "two vision blocks mixed",
        ("weights_as_stored", "vision_stability"),
        _shares(blocks_mixed, (0.001, 0.1, 1, 10, 100)),
    ),
    Graded(
        "eps of the language norms, as modules have it",
        ("weights_as_stored",),
        tuple((f"{times} x", _given(language_epsilon_times, times)) for times in (1.000001, 1.01, 2, 10)),
    ),
    Graded(
        "eps of one language norm, as its kernel has it",
        ("layer_arithmetic",),
        tuple((f"{times} x", _given(norm_eps_times, times)) for times in (1.01, 1.1, 2, 10, 1000)),
    ),
    Graded(
        "frequencies of M-RoPE given from height to width, as modules have it",
        ("weights_as_stored", "alignment"),
        (("1 frequency", _widened(_sections, 0)), ("half", _widened(_sections, 0.5)), ("all", _widened(_sections, 1))),
        requires=("mrope sections in the module",),
    ),
    Graded(
        "frequencies of M-RoPE given from height to width, as a kernel has it",
        ("layer_arithmetic",),
        (("1 frequency", _widened(frequencies_moved, 0)), ("all", _widened(frequencies_moved, 1))),
        requires=("mrope sections in the module",),
    ),
    Graded(
        "pixels: mean of the processor off by a factor",
        ("image_preprocessing",),
        _off(_mean_times, (0.0001, 0.01, 1, 10)),
    ),
    Graded(
        "pixels: the second frame of still images faded",
        ("image_preprocessing", "alignment"),
        _shares(_faded, (0.01, 0.1, 1, 100)),
    ),
    Graded(
        "key-value cache one step stale while decoding",
        ("layer_arithmetic", "generation_cache_invariance"),
        (
            ("1 element of the key", partial(stale, keys=(0, 0, 0, 0), values=False)),
            ("the key of one head", partial(stale, keys=(slice(None), 0), values=False)),
            ("the key", partial(stale, values=False)),
            ("key and value", stale),
        ),
    ),
    Graded(
        "LoRA reads the token before",
        ("layer_arithmetic",),
        _shares(reads_elsewhere, (0.01, 0.1, 1, 10, 100)),
    ),
    Graded(
        "LoRA dropout on in eval mode",
        ("layer_arithmetic",),
        _shares(dropout_in_eval, (0.1, 1, 10)),
    ),
    Graded(
        "lora_alpha saved off by a factor",
        ("adapter_census", "layer_arithmetic"),
        _off(alpha_times, (0.01, 0.1, 1, 100)),
    ),
    Graded(
        "checkpointing with another dropout mask",
        ("layer_arithmetic", "gradient_arithmetic"),
        _shares(another_mask, (0.1, 5, 20)),
    ),
    Graded(
        "loss off by a factor",
        ("loss_arithmetic",),
        _off(loss_times, (0.00001, 0.0001, 0.01, 1)),
    ),
    Graded(
        "label smoothing in the loss",
        ("loss_arithmetic",),
        tuple((f"{weight:g}", _given(smoothed, weight)) for weight in (1e-8, 1e-6, 1e-4, 1e-3)),
    ),
    Graded(
        "tokens that the loss counts and does not sum",
        ("loss_arithmetic",),
        (
            ("1 token", _given(more_counted, 1)),
            ("2 tokens", _given(more_counted, 2)),
            ("all", _given(more_counted, None)),
        ),
    ),
    Graded(
        "tokens whose label is not shifted",
        ("loss_arithmetic",),
        (("1 token", _given(not_shifted, 1)), ("2 tokens", _given(not_shifted, 2)), ("all", _given(not_shifted, None))),
    ),
    Graded(
        "accumulated gradient off by a factor",
        ("loss_arithmetic",),
        _off(accumulated_times, (0.1, 1, 2, 5, 35)),
    ),
    Graded(
        "gradient of one layer's adapter off by a factor",
        ("gradient_arithmetic",),
        _off(gradient_times, (1, 5, 25, 100)),
    ),
    Graded(
        "gradient lost between two layers",
        ("gradient_arithmetic",),
        _shares(lost_on_the_way, (1, 5, 25, 50)),
    ),
)
