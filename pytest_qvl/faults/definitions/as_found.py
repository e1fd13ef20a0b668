"""What a training leaves behind for ``generate()``: modes, settings and a padding side that spoil replies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, all_of, attribute
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case

_CONFIG = "the generation config as found: "


def _configured(case: Case, **settings: Any) -> AbstractContextManager[None]:
    """Set fields of the model's own generation config."""
    config = anatomy(case.model).base.generation_config
    return all_of([attribute(config, name, value) for name, value in settings.items()])


def _tokens(case: Case, text: str) -> list[int]:
    ids: list[int] = case.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _longest_answer(case: Case) -> str:
    return max((sample.answer for sample in case.rows), key=lambda answer: len(_tokens(case, answer)))


@fault(
    "generates-while-checkpointing",
    "The model generates in train mode with gradient checkpointing, which drops the cache: one token at a time.",
    target="model",
    check="generation_as_found",
    expected_words=("in train mode, as found", "drops the key-value cache", "call model.eval() before generate()"),
)
def _checkpointing(case: Case) -> Iterator[None]:
    from pytest_qvl.models.renamed import KV_CACHE_NAMES
    from pytest_qvl.models.training import checkpointing

    parts = anatomy(case.model)
    layers: Any = parts.language_backbone.layers

    def without_cache(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What releases before 5.24 do themselves, also without gradients."""
        drops = layer.training and layer.gradient_checkpointing
        return args, {key: None if drops and key in KV_CACHE_NAMES else given for key, given in kwargs.items()}

    handles = [layer.register_forward_pre_hook(without_cache, with_kwargs=True) for layer in layers]
    parts.wrapped.train()
    try:
        with checkpointing(parts, enabled=True):
            yield
    finally:
        for handle in handles:
            handle.remove()


@fault(
    "generates-with-noise",
    "The model generates in train mode with NEFTune, which adds noise to its embeddings there.",
    target="model",
    check="generation_as_found",
    expected_words=("in train mode, as found", "something acts in train mode only", "noise on embeddings"),
)
def _noise(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)

    def add(module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        most = 5.0 / (output.shape[-2] * output.shape[-1]) ** 0.5
        return output + output.new_empty(output.shape).uniform_(-most, most)

    parts.wrapped.train()
    with after([parts.embeddings], add):
        yield


@fault(
    "padding-side-left-on-the-right",
    "The processor pads on the right, as released or as the training left it: generation goes on behind the padding.",
    target="processor",
    check="generation_as_found",
    expected_words=("the processor as found pads on the right", "padding_side = 'left'"),
    source="huggingface/transformers#36100",
)
def _padding_side(case: Case) -> Iterator[None]:
    tokenizer = case.processor.tokenizer
    before, tokenizer.padding_side = tokenizer.padding_side, "right"
    try:
        yield
    finally:
        tokenizer.padding_side = before


@fault(
    "replies-cut-after-two-tokens",
    "The generation config has max_new_tokens=2: longer answers are cut off.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "max_new_tokens=2 cuts replies off", "set generation_config.max_new_tokens to None"),
)
def _max_new_tokens(case: Case) -> Iterator[None]:
    with _configured(case, max_new_tokens=2):
        yield


@fault(
    "max-length-below-the-prompt",
    "The generation config has max_length=16, which counts the prompt with its visual tokens.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "max_length=16 counts the prompt", "hand max_new_tokens to generate()"),
)
def _max_length(case: Case) -> Iterator[None]:
    with _configured(case, max_length=16):
        yield


@fault(
    "end-held-back",
    "The generation config has min_new_tokens=32: no reply may end before.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "min_new_tokens=32 bans <|im_end|> until then", "replies run on"),
)
def _min_new_tokens(case: Case) -> Iterator[None]:
    with _configured(case, min_new_tokens=32):
        yield


@fault(
    "answer-among-bad-words",
    "The generation config bans the tokens of an answer (bad_words_ids).",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "bad_words_ids bans", "take it out of generation_config.bad_words_ids"),
)
def _bad_words(case: Case) -> Iterator[None]:
    with _configured(case, bad_words_ids=[_tokens(case, case.rows[0].answer)]):
        yield


@fault(
    "end-suppressed",
    "The generation config suppresses <|im_end|> (suppress_tokens): no reply ends.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "suppress_tokens bans '<|im_end|>'",),
)
def _suppressed(case: Case) -> Iterator[None]:
    with _configured(case, suppress_tokens=_tokens(case, "<|im_end|>")):
        yield


@fault(
    "first-word-suppressed",
    "The generation config suppresses the first token of an answer (begin_suppress_tokens).",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "begin_suppress_tokens bans",),
)
def _begin(case: Case) -> Iterator[None]:
    with _configured(case, begin_suppress_tokens=_tokens(case, case.rows[0].answer)[:1]):
        yield


@fault(
    "repetitions-banned",
    "The generation config has no_repeat_ngram_size=1: no token of the prompt or of the reply may come again.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "no_repeat_ngram_size=1 bans what the row has said before",),
)
def _ngrams(case: Case) -> Iterator[None]:
    with _configured(case, no_repeat_ngram_size=1):
        yield


@fault(
    "stops-inside-of-an-answer",
    "The generation config has a stop string that an answer holds.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "stop_strings=", "ends replies inside of"),
)
def _stop_strings(case: Case) -> Iterator[None]:
    with _configured(case, stop_strings=[_longest_answer(case)[1:3]]):
        yield


@fault(
    "replies-at-random",
    "The generation config samples at temperature 0.7, where the released one samples at 1e-6.",
    target="run",
    check="generation_as_found",
    expected_words=(_CONFIG + "do_sample=True with temperature=0.7", "draws replies at random"),
    requires=("greedy releases",),
)
def _at_random(case: Case) -> Iterator[None]:
    with _configured(case, do_sample=True, temperature=0.7, top_k=50, top_p=1.0):
        yield


@fault(
    "end-biased-away",
    "The generation config has a sequence_bias against <|im_end|>: replies run on.",
    target="run",
    check="generation_as_found",
    expected_words=("generate() as found loses", "sequence_bias=", "set the released values"),
    requires=("knowledge",),
)
def _biased(case: Case) -> Iterator[None]:
    with _configured(case, sequence_bias=[[_tokens(case, "<|im_end|>"), -30.0]]):
        yield
