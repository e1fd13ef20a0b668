"""Rows of a batch that know of each other, or of their padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, before, on_first
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.faults.case import Case


def _flipped(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
    """Left padding moved to the right; what belongs to tokens moves along."""
    import torch

    mask = batch["attention_mask"]
    names = [name for name, tensor in batch.items() if tensor.shape == mask.shape]
    out = dict(batch)
    for name in names:
        rows = zip(batch[name], mask.bool(), strict=True)
        out[name] = torch.stack([torch.cat([row[keep], row[~keep]]) for row, keep in rows])
    return out


@fault(
    "right-padded-generation",
    "Prompts are padded on the right: generation goes on after the padding.",
    target="batch",
    check="greedy_is_argmax",
    expected_words=("pad the batch on the left",),
    source="JIA-Lab-research/Seg-Zero#10, EvolvingLMMs-Lab/lmms-eval#830",
)
def _right_padded(case: Case) -> Iterator[None]:
    case.collators.append(_flipped)
    yield


@fault(
    "padding-attended",
    "The model ignores the attention mask: padding takes part in attention.",
    target="model",
    check="generation_batch_invariance",
    expected_words=("alone against batch: logits differ by", "mask of padded rows"),
    source="EvolvingLMMs-Lab/lmms-eval#889, QwenLM/Qwen3-VL#1296",
)
def _attended(case: Case) -> Iterator[None]:
    import torch

    def drop(_module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            return None
        return args, {**kwargs, "attention_mask": torch.ones_like(mask)}

    with before([anatomy(case.model).language_backbone], drop):
        yield


@fault(
    "rows-blend",
    "A row's hidden states take in a little of the row before it.",
    target="model",
    check="causality",
    expected_words=("it must move no output of another row",),
    source="EvolvingLMMs-Lab/lmms-eval#648, QwenLM/Qwen3-VL#1956",
)
def _rows_blend(case: Case) -> Iterator[None]:
    def blend(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda h: h + h.roll(1, dims=0) / 32)

    with after([anatomy(case.model).language_backbone.layers[1]], blend):
        yield


@fault(
    "rows-joined-without-padding",
    "Rows padded on the right are joined to spare the padding; a boundary is lost: a row's start sees the row before.",
    target="model",
    check="causality",
    expected_words=("it must move no output of another row",),
    source="modelscope/ms-swift#4439, #9903",
)
def _rows_joined(case: Case) -> Iterator[None]:
    import torch

    parts = anatomy(case.model)
    lengths: list[int] = []

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        mask = kwargs.get("attention_mask")
        two = isinstance(mask, torch.Tensor) and mask.ndim == 2
        right = two and bool(mask[:, 0].all()) and not bool(mask[:, -1].all())
        lengths[:] = mask.sum(dim=1).tolist() if right else []

    def see(_module: Any, _args: Any, output: Any) -> Any:
        def change(hidden: torch.Tensor) -> torch.Tensor:
            if len(lengths) != len(hidden) or hidden.shape[1] < max(lengths):
                return hidden
            last = torch.stack([hidden[row, length - 1] for row, length in enumerate(lengths[:-1])])
            joined = hidden.clone()
            joined[1:, 0] += last / 32
            return joined

        return on_first(output, change)

    with before([parts.core], note), after([parts.language_backbone.layers[1]], see):
        yield


@fault(
    "batch-dependent-scale",
    "The last norm adds up the squares of all rows of a batch: each is scaled down by those beside it.",
    target="model",
    check="generation_batch_invariance",
    expected_words=("alone against batch: logits differ by", "depends on the rows beside it"),
    source="QwenLM/Qwen3-VL#1956",
)
def _batch_scale(case: Case) -> Iterator[None]:
    def scale(_module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        squares: torch.Tensor = args[0].float().square().sum(dim=-1, keepdim=True)
        share = squares / squares.sum(dim=0)
        return (output.float() * share.sqrt()).to(output.dtype)

    with after([anatomy(case.model).language_backbone.norm], scale):
        yield


@fault(
    "several-rows-take-another-path",
    "One MLP in four is subtracted, not added, as soon as a batch has more than one row.",
    target="model",
    check="generation_batch_invariance",
    expected_words=("alone against batch: logits differ by", "depends on the rows beside it"),
    source="QwenLM/Qwen3-VL#1956",
)
def _several_rows(case: Case) -> Iterator[None]:
    def other(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda h: -h if h.shape[0] > 1 else h)

    layers: Any = anatomy(case.model).language_backbone.layers
    with after([layer.mlp for layer in layers[2::4]], other):
        yield


@fault(
    "several-rows-scale-logits",
    "The head's logits are a quarter too large as soon as a batch has more than one row: every argmax stays.",
    target="model",
    check="generation_batch_invariance",
    expected_words=("alone against batch: logits differ by", "depends on the rows beside it"),
    source="QwenLM/Qwen3-VL#1956",
)
def _several_rows_scale(case: Case) -> Iterator[None]:
    # In the head and in proportion: as large on a deep model as on a shallow one, and too small to lose an answer.
    def scale(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * 1.25 if logits.shape[0] > 1 else logits

    head: Any = anatomy(case.model).lm_head
    with after([head], scale):
        yield


@fault(
    "attention-not-causal",
    "The prompt's attention lost its causal mask.",
    target="model",
    check="causality",
    expected_words=("it must move no output before it; is attention causal?",),
)
def _not_causal(case: Case) -> Iterator[None]:
    import torch

    def see_all(_module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows, length = hidden.shape[:2]
        if length == 1:
            return None
        mask = kwargs.get("attention_mask")
        seen = torch.ones(rows, 1, length, length, dtype=torch.bool, device=hidden.device)
        if mask is not None:
            columns = mask[:, :, -1:, -length:]
            seen = seen & (columns if mask.dtype == torch.bool else columns == 0)
        open_mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
        return args, {**kwargs, "attention_mask": open_mask.masked_fill(~seen, torch.finfo(hidden.dtype).min)}

    # A mixer of linear attention cannot look ahead; its mask is one of tokens.
    attending = [layer.module for layer in language_layers(anatomy(case.model)) if layer.attends]
    with before(attending, see_all):
        yield
