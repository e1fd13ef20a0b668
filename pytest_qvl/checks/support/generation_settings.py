"""What a generation config cuts off, bans or leaves to chance, read against answers that a model has to give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.families import FAMILIES
from pytest_qvl.samples.batch import answer_ids

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pytest_qvl.samples import Sample

GREEDY_TEMPERATURE = 0.06  # at most so much is argmax in effect (docs/limits.md#generation-as-found)
# What the released checkpoints of a family are meant to do; those of the others are greedy in effect. Mixtures of
# experts are named like their family's dense models ("qwen3_vl_moe").
SAMPLING_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.samples)
# Settings of the draw alone; argmax reads none of them, and generate() warns of those that are set without one.
OF_THE_DRAW = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Settings that change replies in ways that only generating shows, with the values at which they do nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "length_penalty": (1.0,),
    "penalty_alpha": (0, 0.0),
    "guidance_scale": (1.0,),
    "sequence_bias": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "max_time": (),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class Asked:
    """One prompt with the reply that it asks for.

    Attributes:
        sample: Which one.
        prompt: Its tokens, without padding.
        padded: Its length in the batch, padding included: what ``max_length`` and ``min_length`` count.
        answer: Tokens of the answer with the closing ``<|im_end|>``.
    """

    sample: Sample
    prompt: tuple[int, ...]
    padded: int
    answer: tuple[int, ...]

    def __str__(self) -> str:
        return f"the answer {self.sample.answer!r} of sample {self.sample.id!r}"


def asked_of(processor: Any, samples: Sequence[Sample], inputs: Mapping[str, Any]) -> list[Asked]:
    """The prompts of a batch, row by row, with the replies that they ask for."""
    padded = inputs["input_ids"].shape[1]
    rows = zip(samples, inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)
    return [
        Asked(each, tuple(ids[mask].tolist()), padded, tuple(answer_ids(processor, each))) for each, ids, mask in rows
    ]


def spoiling(config: Any, tokenizer: Any, asked: Sequence[Asked]) -> list[str]:
    """One sentence for each setting that makes a reply that was asked for impossible.

    Args:
        config: A ``transformers.GenerationConfig``.
        tokenizer: Shows tokens.
        asked: Prompts with the replies that they ask for.
    """
    return [*_cut(config, asked), *_held_open(config, asked), *_banned(config, tokenizer, asked)]


def at_random(config: Any, model_type: str) -> str:
    """How a generation config draws replies at random, where the family's releases do not; or nothing."""
    if not drawn(config) or model_type.startswith(SAMPLING_FAMILIES):
        return ""
    return (
        f"do_sample=True with {_sampling(config)} draws replies at random: set generation_config.do_sample=False, or "
        "top_k=1 or temperature=1e-6 as the released checkpoints of this family do"
    )


def drawn(config: Any) -> bool:
    """Whether replies differ from the most probable tokens by chance."""
    if not getattr(config, "do_sample", None) or getattr(config, "top_k", None) == 1:
        return False
    temperature = getattr(config, "temperature", None)
    return temperature is None or temperature > GREEDY_TEMPERATURE


def unusual(config: Any) -> list[str]:
    """``name=value`` of each setting that changes replies in ways that only generating shows."""
    values = {name: getattr(config, name, None) for name in _NEUTRAL}
    found = [f"{name}={value}" for name, value in values.items() if value is not None and value not in _NEUTRAL[name]]
    return [*found, f"do_sample=True with {_sampling(config)}"] if drawn(config) else found


def _sampling(config: Any) -> str:
    values = {name: getattr(config, name, None) for name in ("temperature", "top_p", "top_k")}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None) or "no temperature"


def _cut(config: Any, asked: Sequence[Asked]) -> Iterator[str]:
    from transformers import GenerationConfig

    longest = max(asked, key=lambda each: len(each.answer))
    new, total = config.max_new_tokens, config.max_length
    if new is not None and new < len(longest.answer):
        yield (
            f"max_new_tokens={new} cuts replies off: {longest} takes {len(longest.answer)} tokens with its <|im_end|>; "
            "set generation_config.max_new_tokens to None, and hand a limit to generate()"
        )
    elif new is None and total not in (None, GenerationConfig().max_length):
        last = max(asked, key=lambda each: each.padded + len(each.answer))
        if total < last.padded + len(last.answer):
            yield (
                f"max_length={total} counts the prompt with its visual tokens, {last.padded} here, and leaves no room "
                f"for {last} ({len(last.answer)} tokens): set generation_config.max_length to None, and hand "
                "max_new_tokens to generate()"
            )
    strings = getattr(config, "stop_strings", None) or ()
    for string in [strings] if isinstance(strings, str) else strings:
        holder = next((each for each in asked if string in each.sample.answer), None)
        if holder is not None:
            yield f"stop_strings={string!r} ends replies inside of {holder}: take it out of the generation config"


def _held_open(config: Any, asked: Sequence[Asked]) -> Iterator[str]:
    for name, counted in (("min_new_tokens", 0), ("min_length", 1)):
        least = getattr(config, name, None)
        held = [] if least is None else [e for e in asked if counted * e.padded + len(e.answer) - 1 < least]
        if held:
            shortest = min(held, key=lambda each: len(each.answer))
            yield (
                f"{name}={least} bans <|im_end|> until then, and {shortest} ends after {len(shortest.answer) - 1} "
                f"tokens: replies run on; set generation_config.{name} to None"
            )


def _banned(config: Any, tokenizer: Any, asked: Sequence[Asked]) -> Iterator[str]:
    """Settings that take a token out of the choice which an answer needs at its place."""
    for name, bans in (
        ("bad_words_ids", [tuple(word) for word in getattr(config, "bad_words_ids", None) or ()]),
        ("suppress_tokens", [(token,) for token in getattr(config, "suppress_tokens", None) or ()]),
    ):
        found = next(((ban, each) for each in asked for ban in bans if _holds(each.answer, ban)), None)
        if found is not None:
            yield _ban(name, tokenizer, *found)
    first = getattr(config, "begin_suppress_tokens", None) or ()
    starts = next((each for each in asked if each.answer[0] in first), None)
    if starts is not None:
        yield _ban("begin_suppress_tokens", tokenizer, starts.answer[:1], starts)
    size = int(getattr(config, "no_repeat_ngram_size", None) or 0)
    repeated = next(((run, each) for each in asked if size and (run := _first_repeated(each, size))), None)
    if repeated is not None:
        run, each = repeated
        yield (
            f"no_repeat_ngram_size={size} bans what the row has said before, such as {tokenizer.decode(list(run))!r}, "
            f"which {each} needs: set generation_config.no_repeat_ngram_size to None"
        )


def _ban(name: str, tokenizer: Any, tokens: Sequence[int], asked: Asked) -> str:
    return (
        f"{name} bans {tokenizer.decode(list(tokens))!r} ({', '.join(map(str, tokens))}), which {asked} needs: take it "
        f"out of generation_config.{name}"
    )


def _holds(ids: Sequence[int], part: Sequence[int]) -> bool:
    return any(tuple(ids[start : start + len(part)]) == tuple(part) for start in range(len(ids) - len(part) + 1))


def _first_repeated(asked: Asked, size: int) -> tuple[int, ...]:
    """The first run of `size` tokens that ends in the answer and stands earlier in the row; empty if none does."""
    ids = asked.prompt + asked.answer
    runs = [ids[start : start + size] for start in range(len(ids) - size + 1)]
    seen: set[tuple[int, ...]] = set()
    for start, run in enumerate(runs):
        if run in seen and start + size > len(asked.prompt):
            return run
        seen.add(run)
    return ()
