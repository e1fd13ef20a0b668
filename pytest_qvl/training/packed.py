"""Packed rows in the training's own forward: what attention is given of which samples stand in a row.

Whether a row that is well packed is parted is not seen in the batch: Transformers parts it by ``position_ids`` only
where there is no KV cache (``masking_utils._preprocess_mask_arguments``), and ``Trainer`` switches off the cache of the
outer configuration, not that of the language model. So the mask is looked at that the first attention gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.batches.facts import View, facts
from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.layers import language_layers
from pytest_qvl.models.mixer_kernels import PYTORCH, mixer_kernels
from pytest_qvl.models.renamed import kv_cache_in

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from pytest_qvl.training.subject import Subject

# Kernels that see what the mask lets them, and with none of it all tokens before each.
_BY_MASK = ("sdpa", "eager")
# Tokens whose rows of the mask are looked at together: of 32,768 tokens 8 MiB.
_AT_ONCE = 256


def samples_of(subject: Subject, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """The number of each token's sample within its row, ``(rows, length)`` int64 on the CPU, padding -1.

    ``None`` where no row holds several samples.
    """
    view = View(batch, subject.processor, facts(subject.parts.wrapped), training=True)
    return view.segments.masked_fill(~(view.mask & view.text), -1) if view.is_packed else None


def kept_apart(subject: Subject, samples: torch.Tensor, given: Mapping[str, Any]) -> Evidence:
    """No token of a packed row attends to another sample of it, by the mask that attention is given.

    Nor does the state of linear attention run from one into the next, as it does where nothing says that they begin.

    Args:
        subject: What is trained.
        samples: From :func:`samples_of`.
        given: What the first layer with attention was called with, by name.

    Raises:
        CheckFailed: Says which token sees which sample, and why.
        CannotJudge: The kernel parts rows by what is not a mask, or its mask has another form.
    """
    judge = Judge("packing", "no sample of a packed row attends to another")
    mixers = [layer.attention for layer in language_layers(subject.parts) if not layer.attends]
    kernel = subject.parts.config.get_text_config()._attn_implementation
    if kernel in _BY_MASK:
        _judge_mask(judge, samples, given)
    elif mixers:
        judge.note(f"the attention of {kernel} is told of packed samples otherwise than by a mask: not judged")
    else:
        raise CannotJudge(f"the attention of {kernel} is told of packed samples otherwise than by a mask")
    if mixers:
        _judge_state(judge, subject, mixers[0], given)
    judge.report("packed samples", int((samples.amax(dim=1) + 1).sum()))
    return judge.verdict()


def _judge_mask(judge: Judge, samples: torch.Tensor, given: Mapping[str, Any]) -> None:
    strangers, (row, token, other) = _strangers(samples, given.get("attention_mask"))
    judge.equal(
        "tokens that attend to another sample",
        strangers,
        0,
        else_say=f"row {row}, token {token}, of sample {int(samples[row, token])}, attends to token {other}, of sample "
        f"{int(samples[row, other])}: {_why(given)}",
    )


def _judge_state(judge: Judge, subject: Subject, mixer: Any, given: Mapping[str, Any]) -> None:
    """Transformers' layer (5.24) hands on ``cu_seq_lens_q``, which its own PyTorch code does not read, and no more."""
    home = str(getattr(type(mixer).forward, "__module__", ""))
    own = home.startswith("transformers.") and "forward" not in vars(mixer)
    told = given.get("cu_seq_lens_q") is not None
    if own and (not told or mixer_kernels(subject.parts)["prompts"] == PYTORCH):
        judge.problem(
            "the state of linear attention runs on through a packed row, so that each sample begins with what those "
            f"before it left: {'its PyTorch code reads no cu_seq_lens' if told else 'no mask parts it'}; give each "
            "sample a row of its own"
        )
    else:
        judge.note("whether linear attention keeps packed samples apart is up to its kernels: not judged")


def _strangers(samples: torch.Tensor, mask: Any) -> tuple[int, tuple[int, int, int]]:
    """How many tokens attend to another sample; of the first of them row, place, and the place that it sees."""
    import torch

    length = samples.shape[1]
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or tuple(mask.shape[-2:]) != (length, length):
            raise CannotJudge("the mask that attention is given is not (rows, 1, length, length)")
        samples = samples.to(mask.device)
    places = torch.arange(length, device=samples.device)
    count, first = 0, (0, 0, 0)
    for begin in range(0, length, _AT_ONCE):
        queries = places[begin : begin + _AT_ONCE]
        if mask is None:
            sees = (places <= queries[:, None])[None]
        else:
            block = mask[:, 0, begin : begin + _AT_ONCE]
            sees = block if block.dtype == torch.bool else block == 0
        own, others = samples[:, queries, None], samples[:, None]
        strange = sees & (own != others) & (own >= 0) & (others >= 0)
        found = int(strange.any(dim=-1).sum())
        if found and not count:
            row, query, other = strange.nonzero()[0].tolist()
            first = row, begin + query, other
        count += found
    return count, first


def _why(given: Mapping[str, Any]) -> str:
    if given.get("attention_mask") is None and kv_cache_in(given) is not None:
        return (
            "the forward has a KV cache, and Transformers parts rows by position_ids only where there is none. Trainer "
            "switches off model.config.use_cache and not that of the language model: have the collator add "
            "use_cache=False to the batch, or set model.config.get_text_config().use_cache = False"
        )
    return "the mask that attention gets does not part the samples, whatever the batch says of them"
