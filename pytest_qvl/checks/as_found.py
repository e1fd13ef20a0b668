"""Generation in the state in which the model, its generation config and its processor are, and not in a clean one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.registry import check
from pytest_qvl.checks.support.bitwise import differs
from pytest_qvl.checks.support.generation_settings import (
    OF_THE_DRAW,
    Asked,
    asked_of,
    at_random,
    drawn,
    spoiling,
    unusual,
)
from pytest_qvl.checks.support.greedy import STEPS, note_own_defaults, stop_ids
from pytest_qvl.checks.support.scoring import chunks
from pytest_qvl.checks.support.wording import some
from pytest_qvl.evidence import CannotJudge, Evidence, InputError, Judge
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.state import preserved
from pytest_qvl.samples import make_batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.samples import Sample
    from pytest_qvl.samples.batch import PaddingSide

RELEASED_PENALTY = 1.05
LONGEST = 32  # tokens of an answer that is generated; longer ones are held against the generation config only
SURE = 1.0  # nat between the best token and the next
_LEFT = "set processor.tokenizer.padding_side = 'left' before batches are made for generate()"


@check(promise=8, needs=("time",))
def generation_as_found(
    model: Any, processor: Any, samples: Sequence[Sample], *, padding_side: PaddingSide | None = None
) -> Evidence:
    """``generate()`` as it would be called now says what it says in eval mode, and nothing cuts or bans the answers.

    All other checks of generation bring a mode, a generation config and a padding side of their own. Here counts
    what is found, as in the middle of a training or behind it:

    - *Mode.* In train mode gradient checkpointing drops the key-value cache, while ``generate()`` goes on to feed one
      token at a time: every token after the first is written without its prompt, and nothing is raised. Dropout and
      noise on embeddings are on as well. Eight tokens per row, ends included, are generated as found and in eval
      mode, and compared up to the first step with different tokens: the logits are bitwise the same, since the
      kernels are. A model in eval mode is the same by definition.
    - *Generation config.* A setting that makes an answer of the samples impossible is read from it exactly: a limit
      of tokens below the answer's, ``max_length`` (which counts the prompt), banned tokens or repetitions, an end
      that is banned for too long, a stop string inside of it. Sampling is named where it is more than argmax
      (docs/limits.md#generation-as-found), except in families whose releases sample.
    - *Its effect.* Samples that argmax answers right, with a nat between each token and the next best, must be
      answered the same by ``generate()`` as found; beams, penalties and biases are seen so. A repetition penalty of
      1.05 at most, as released checkpoints have it, is granted to both. Where replies are drawn at random, the draw
      alone is left out: what penalties and biases make of the logits must still have the answer as its argmax.
    - *Padding.* A processor that pads rows of unequal length on the right lets generation go on behind the padding.

    Args:
        model: Wrapped or not, in the state in which you generate.
        processor: The processor that makes your batches, in the state in which you generate.
        samples: Prompts with their answers.
        padding_side: Which side your code asks the processor for; None if it asks for none, so that the tokenizer's
            own counts.

    Raises:
        CheckFailed: Names what is on in train mode and the first token that differs; or the setting, its value, the
            answer that it spoils and what to set.
        CannotJudge: Two runs in eval mode differ bitwise.
        ValueError: No samples.
    """
    if not samples:
        raise InputError("generation_as_found needs at least one sample")
    judge, parts = Judge("generation_as_found", "generate() as found says what eval mode says"), anatomy(model)
    note_own_defaults(judge, parts)
    batches = [(group, make_batch(processor, group, device=parts.device)) for group in chunks(samples)]
    asked = [each for group, batch in batches for each in asked_of(processor, group, batch)]
    _judge_padding(judge, processor, asked, padding_side)
    config = parts.base.generation_config
    spoilt = [*spoiling(config, processor.tokenizer, asked), at_random(config, parts.config.model_type)]
    for sentence in filter(None, spoilt):
        judge.problem(f"the generation config as found: {sentence}")
    judge.report("answers held against the generation config", len(asked))
    if config.use_cache is False:
        judge.note("the generation config has use_cache=False: each token computes the whole row again")
    group, inputs = batches[0]
    first = asked[: len(group)]
    steps = min(max(STEPS, *(len(each.answer) for each in first)), LONGEST)
    sound = _Run(parts, inputs, steps=steps, training=False)
    _judge_mode(judge, parts, processor.tokenizer, inputs, sound)
    if not judge.problems:
        _judge_effect(judge, parts, processor, first, sound)
    return judge.verdict()


def _judge_padding(judge: Judge, processor: Any, asked: Sequence[Asked], side: PaddingSide | None) -> None:
    found = processor.tokenizer.padding_side if side is None else side
    longest = max(len(each.prompt) for each in asked)
    short = sum(len(each.prompt) < longest for each in asked)
    judge.report("padding side", found)
    if found != "left" and short:
        judge.problem(
            f"the processor as found pads on the {found} (tokenizer.padding_side): in {short} of {len(asked)} rows "
            f"generation would go on behind the padding; {_LEFT}"
        )
    elif found != "left":
        judge.note(f"the processor pads on the {found}; these rows have one length, so it does not show: {_LEFT}")


class _Run:
    """Tokens and logits of a few forced steps: argmax, no end, nothing of the model's own config but its cache.

    Attributes:
        ids: ``(rows, steps)`` int64: the chosen tokens.
        scores: As many of ``(rows, vocabulary)`` as there are steps: logits behind the penalty that is granted.
    """

    def __init__(self, parts: Parts, inputs: dict[str, torch.Tensor], *, steps: int, training: bool | None) -> None:
        from transformers import GenerationConfig

        own = parts.base.generation_config
        penalty = own.repetition_penalty or 1.0
        config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            repetition_penalty=penalty if 1.0 <= penalty <= RELEASED_PENALTY else 1.0,
            max_new_tokens=steps,
            pad_token_id=own.pad_token_id if own.pad_token_id is not None else 0,
            use_cache=own.use_cache is not False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        generate: Any = parts.wrapped.generate
        with preserved(parts.wrapped, training=training, seed=0):
            parts.base.generation_config = GenerationConfig()
            made = generate(**inputs, generation_config=config)
        self.ids: torch.Tensor = made.sequences[:, inputs["input_ids"].shape[1] :]
        self.scores: tuple[torch.Tensor, ...] = made.scores

    def first_difference(self, other: _Run) -> tuple[int, int] | None:
        """Step and row of the first scores that are not bitwise the same, as long as the tokens before them are."""
        import torch

        same = torch.ones(len(self.ids), dtype=torch.bool, device=self.ids.device)
        steps = min(len(self.scores), len(other.scores))
        for step in range(steps):
            apart = differs(self.scores[step], other.scores[step]) & same
            if bool(apart.any()):
                return step, int(apart.nonzero()[0])
            same &= self.ids[:, step] == other.ids[:, step]
        return None

    def sure_of(self, row: int, answer: Sequence[int]) -> bool:
        """Whether argmax gives this answer, each token by a nat or more before the next best."""
        if len(answer) > len(self.scores):
            return False
        chosen = self.ids[row, : len(answer)].tolist()
        best = [self.scores[step][row].float().topk(2).values for step in range(len(answer))]
        return chosen == list(answer) and all(float(first - second) >= SURE for first, second in best)


def _judge_mode(judge: Judge, parts: Parts, tokenizer: Any, inputs: dict[str, torch.Tensor], sound: _Run) -> None:
    """Hold forced tokens in the mode as found against those in eval mode."""
    training = [name for name, module in parts.base.named_modules() if module.training]
    judge.report("modules in train mode", len(training))
    if not training:
        return
    found = _Run(parts, inputs, steps=STEPS, training=None)
    place = found.first_difference(sound)
    if place is not None and sound.first_difference(_Run(parts, inputs, steps=STEPS, training=False)) is not None:
        raise CannotJudge("two runs in eval mode differ bitwise: what train mode changes cannot be told from noise")
    where = "" if place is None else _difference(tokenizer, found, sound, *place)
    judge.equal(
        "first step that differs from eval mode",
        "none" if place is None else place[0],
        "none",
        else_say=f"generate() in train mode, as found, says something else than in eval mode: {where}; "
        f"{_what_is_on(parts)}; call model.eval() before generate(), and model.train() behind it",
    )
    if place is None:
        judge.note(f"{len(training)} modules are in train mode, which changes no logit here")


def _difference(tokenizer: Any, found: _Run, sound: _Run, step: int, row: int) -> str:
    """The first row that chooses other tokens than in eval mode, with both; or where other logits choose the same."""
    apart = (found.ids[:, :STEPS] != sound.ids[:, :STEPS]).any(dim=1).nonzero().flatten().tolist()
    if not apart:
        return f"row {row} has other logits from step {step} on, of which argmax makes the same tokens"
    said, meant = (tokenizer.decode(run.ids[apart[0], :STEPS].tolist()) for run in (found, sound))
    return f"row {apart[0]} goes on with {said!r} where eval mode has {meant!r}, the logits differ from step {step} on"


def _what_is_on(parts: Parts) -> str:
    """What train mode switches on in this model."""
    modules = list(parts.base.named_modules())
    checkpointed = [name for name, m in modules if getattr(m, "gradient_checkpointing", False) and m.training]
    dropping = [
        f"{name} ({m.p:g})" for name, m in modules if type(m).__name__.startswith("Dropout") and m.training and m.p
    ]
    found = []
    if checkpointed:
        found.append(
            f"gradient checkpointing is on in {len(checkpointed)} modules and drops the key-value cache, so that every "
            "step after the first sees one token"
        )
    if dropping:
        found.append(f"dropout is on: {some(dropping)}")
    return "; ".join(found) or "something acts in train mode only: dropout of attention, noise on embeddings, a hook"


def _judge_effect(judge: Judge, parts: Parts, processor: Any, asked: Sequence[Asked], sound: _Run) -> None:
    """Hold ``generate()`` as found to the answers that argmax is sure of."""
    sure = [each for row, each in enumerate(asked) if sound.sure_of(row, each.answer)]
    judge.report("answers that argmax is sure of", len(sure))
    config = parts.base.generation_config
    if not sure:
        judge.note("argmax gives none of the answers for sure: what the generation config does to them is not judged")
        return
    inputs = make_batch(processor, [each.sample for each in sure], device=parts.device)
    limit = max(len(each.answer) for each in sure)
    plain = copy.deepcopy(config)
    plain.max_new_tokens, plain.num_return_sequences, plain.return_dict_in_generate = limit, 1, False
    if drawn(config):
        judge.note(
            "replies are drawn at random: what the rest of the generation config does to them is judged by argmax"
        )
        plain.do_sample = False
        for name in OF_THE_DRAW:
            setattr(plain, name, None)
    generate: Any = parts.wrapped.generate
    needed = {"tokenizer": processor.tokenizer} if plain.stop_strings else {}
    with preserved(parts.wrapped, seed=0):
        parts.base.generation_config = plain
        made = generate(**inputs, **needed)[:, inputs["input_ids"].shape[1] :].tolist()
    stops, lost = stop_ids(parts), []
    for row, each in enumerate(sure):
        said = made[row][: next((n + 1 for n, token in enumerate(made[row]) if token in stops), len(made[row]))]
        if said != list(each.answer):
            lost.append(
                f"sample {each.sample.id!r} gets {processor.tokenizer.decode(said)!r} for {each.sample.answer!r}"
            )
    judge.equal(
        "answers lost by the generation config",
        len(lost),
        0,
        else_say=f"generate() as found loses {len(lost)} of {len(sure)} answers that argmax gives: "
        f"{'; '.join(lost[:2])}; the generation config has {', '.join(unusual(config)) or 'nothing unusual'}: set the "
        "released values",
    )
