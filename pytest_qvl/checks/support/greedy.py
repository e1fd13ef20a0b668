"""Plain greedy decoding, whatever a checkpoint's generation config says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.placeholders import refuse_positions_in_generation
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.state import preserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.evidence import Judge

STEPS = 8  # tokens per row that a check generates where nothing asks for more


@dataclass(frozen=True)
class Reply:
    """What one row of a batch generated.

    Attributes:
        ids: New tokens, up to and including the end-of-sequence token.
        stopped: Whether the last of them is an end-of-sequence token.
        not_finite: First step whose scores held a NaN or an infinity; None if all were finite.
        logits: ``(len(ids), vocabulary)`` float32, as the model put them out; None unless asked for.
        altered: Largest difference between these logits and the scores that tokens were chosen by; None
            unless asked for.
    """

    ids: tuple[int, ...]
    stopped: bool
    not_finite: int | None
    logits: torch.Tensor | None = None
    altered: float | None = None


def stop_ids(parts: Parts) -> tuple[int, ...]:
    """End-of-sequence ids from the generation config, else from the model's configuration; may be empty."""
    ids = parts.base.generation_config.eos_token_id
    if ids is None:
        ids = parts.text_config.eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def own_defaults(parts: Parts) -> list[str]:
    """What in the model's own generation config makes ``generate(do_sample=False)`` differ from argmax.

    Qwen-VL checkpoints carry ``repetition_penalty=1.05``, which also penalises tokens of the prompt.
    """
    config, found = parts.base.generation_config, []
    neutral = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1)}
    for name, values in neutral.items():
        value = getattr(config, name, None)
        if value not in values:
            found.append(f"{name}={value}")
    return found


def note_own_defaults(judge: Judge, parts: Parts) -> None:
    """Note which defaults of the model's own make its ``generate(do_sample=False)`` another than this one."""
    defaults = own_defaults(parts)
    if defaults:
        judge.note(
            f"generate(do_sample=False) alone is not argmax with this model: its generation config has "
            f"{', '.join(defaults)}"
        )


def greedy(
    model: Any,
    batch: dict[str, torch.Tensor],
    *,
    max_new_tokens: int,
    use_cache: bool = True,
    keep_logits: bool = False,
    compare_scores: bool = False,
    suppress: Sequence[int] = (),
    seed: int | None = None,
) -> list[Reply]:
    """Generate by argmax, in eval mode, with sampling, beams and every penalty off.

    ``do_sample=False`` alone is not argmax: ``generate`` fills in what is not given from the model's own
    generation config, and those of released Qwen-VL checkpoints carry a repetition penalty. So the model's
    config is set aside for the call (put back afterwards); only its end-of-sequence ids are kept.

    Args:
        model: Wrapped or not.
        batch: Left-padded inputs without `labels`.
        max_new_tokens: At most so many per row.
        use_cache: With or without the key-value cache.
        keep_logits: Keep the raw logits of every step (4 bytes × rows × steps × vocabulary on the model's
            device).
        compare_scores: With `keep_logits`, compare them with the scores that tokens are chosen by (as much
            memory again).
        suppress: Tokens that are not to be chosen; their logits stay as they are.
        seed: Seed of torch's random numbers, which plain greedy decoding must not depend on.

    Returns:
        One reply per row.

    Raises:
        CannotJudge: The batch has ``position_ids`` that the installed ``generate()`` does not take.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

    finite: list[torch.Tensor] = []
    hidden = torch.tensor(list(suppress), dtype=torch.long)

    class Watch(LogitsProcessor):  # type: ignore[misc, unused-ignore]
        def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            left = scores.index_fill(1, hidden.to(scores.device), 0.0)  # suppressed ones are -inf by now
            finite.append(torch.isfinite(left).all(dim=-1))
            return scores

    refuse_positions_in_generation(batch)
    parts = anatomy(model)
    stops = stop_ids(parts)
    with preserved(model, training=False, seed=seed), torch.no_grad():
        pad = parts.base.generation_config.pad_token_id
        parts.base.generation_config = GenerationConfig()
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=pad if pad is not None else next(iter(stops), 0),
            suppress_tokens=list(suppress) or None,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=keep_logits,
            output_scores=compare_scores,
        )
        made = model.generate(**batch, generation_config=config, logits_processor=LogitsProcessorList([Watch()]))
    new = made.sequences[:, batch["input_ids"].shape[1] :].tolist()
    healthy = torch.stack(finite, dim=1).tolist() if finite else [[] for _ in new]
    replies = []
    for row, (ids, fine) in enumerate(zip(new, healthy, strict=True)):
        length = _length(ids, stops)
        logits = torch.stack([step[row].float() for step in made.logits[:length]]) if keep_logits else None
        bad = next((step for step, ok in enumerate(fine[:length]) if not ok), None)
        altered = None
        if compare_scores and logits is not None:
            scores = torch.stack([step[row] for step in made.scores[:length]])
            altered = float((scores - logits).abs().max())
        stopped = bool(length) and ids[length - 1] in stops
        replies.append(Reply(tuple(ids[:length]), stopped, bad, logits, altered))
    return replies


def _length(ids: Sequence[int], stops: Sequence[int]) -> int:
    return next((step + 1 for step, token in enumerate(ids) if token in stops), len(ids))
