"""Decoding that is not greedy, not repeatable, or does not end."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, attribute, before, on_first, values
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pytest_qvl.faults.case import Case


# From 5.18 on, generate() encodes the images once and hands on what came out.
_IMAGES = ("pixel_values", "image_grid_thw", "mm_encoder_outputs")


@contextmanager
def _generate_with(case: Case, *processors: Any) -> Iterator[None]:
    """A patched generate() that brings logits processors of its own."""
    base = anatomy(case.model).base
    original = base.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("logits_processor", None)
        from transformers import LogitsProcessorList

        own = LogitsProcessorList([*processors, *(given or [])])
        return original(*args, logits_processor=own, **kwargs)

    with attribute(base, "generate", generate):
        yield


@fault(
    "hidden-penalty",
    "A patched generate() adds a repetition penalty although none is configured.",
    target="run",
    check="greedy_is_argmax",
    expected_words=("a logits processor changes logits although none is configured",),
    source="unslothai/unsloth#2120",
)
def _hidden_penalty(case: Case) -> Iterator[None]:
    from transformers import RepetitionPenaltyLogitsProcessor

    with _generate_with(case, RepetitionPenaltyLogitsProcessor(1.05)):
        yield


@fault(
    "hidden-sampling",
    "A patched generate() samples although do_sample is off.",
    target="run",
    check="greedy_is_argmax",
    expected_words=("tokens that are not the argmax", "something samples or penalises"),
    source="unslothai/unsloth#2120",
)
def _hidden_sampling(case: Case) -> Iterator[None]:
    import torch
    from transformers import LogitsProcessor

    class Gumbel(LogitsProcessor):  # type: ignore[misc, unused-ignore]
        def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores - 8 * torch.rand_like(scores).clamp_min(1e-9).log().neg().log()

    with _generate_with(case, Gumbel()):
        yield


@fault(
    "dropout-in-eval-mode",
    "Dropout of the language backbone stays on in eval mode.",
    target="model",
    check="generation_repeatable",
    expected_words=("logits of two runs on the same inputs differ", "dropout that stays on in eval mode"),
)
def _dropout(case: Case) -> Iterator[None]:
    import torch

    def drop(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda h: torch.nn.functional.dropout(h, 0.05, training=True))

    with after([anatomy(case.model).language_backbone.layers[3]], drop):
        yield


@fault(
    "remembers-the-last-call",
    "Generation carries something over from the call before.",
    target="run",
    check="generation_repeatable",
    expected_words=("logits of two runs on the same inputs differ", "remembered between calls"),
    source="huggingface/transformers#36009",
)
def _remembers(case: Case) -> Iterator[None]:
    base = anatomy(case.model).base
    original, calls = base.generate, [0]

    def generate(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    def carry(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda h: h * (1 + calls[0] % 2 / 16))

    layer = anatomy(case.model).language_backbone.layers[3]
    with attribute(base, "generate", generate), after([layer], carry):
        yield


@fault(
    "kernel-chosen-by-chance",
    "Which kernel computes the logits is chosen anew at every call, and one rounds otherwise.",
    target="run",
    check="generation_repeatable",
    expected_words=("logits of two runs on the same inputs differ", "something is random"),
)
def _chance(case: Case) -> Iterator[None]:
    import torch

    base = anatomy(case.model).base
    original, other = base.generate, [False]

    def generate(*args: Any, **kwargs: Any) -> Any:
        # The first number drawn is below with seed 0 and above with seed 1.
        other[0] = bool(torch.rand(()) > 0.6)
        try:
            return original(*args, **kwargs)
        finally:
            other[0] = False

    def rounded(_module: Any, _args: Any, output: Any) -> Any:
        if other[0]:
            output.logits = output.logits * (1 + 2**-7)
        return output

    with attribute(base, "generate", generate), after([base], rounded):
        yield


@fault(
    "cache-spoils-decoding",
    "Decode steps from the cache compute something slightly else than a full forward.",
    target="model",
    check="generation_cache_invariance",
    expected_words=("generation with cache against plain forward", "positions and cache of the decode steps"),
    source="unslothai/unsloth#4078, unslothai/unsloth#2120",
)
def _cache(case: Case) -> Iterator[None]:
    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        return on_first(output, lambda h: h * 0.8 + 0.2 if h.shape[1] == 1 else h)

    with after([anatomy(case.model).language_backbone.layers[2]], spoil):
        yield


@fault(
    "pictures-lost-without-cache",
    "Without the cache, every step after the first forgets the images.",
    target="run",
    check="generation_cache_invariance",
    expected_words=("generation without cache against plain forward", "look at images"),
    source="huggingface/transformers#41153",
)
def _lost_without_cache(case: Case) -> Iterator[None]:
    """Drop the images from every forward of ``generate`` after the first that is longer than one token."""
    base = anatomy(case.model).base
    original = base.generate
    # Steps of the running generation so far; None outside of generate(). Where a step without a cache gets its images
    # from differs between releases of Transformers, the forward that receives them does not.
    steps: list[int | None] = [None]

    def generate(*args: Any, **kwargs: Any) -> Any:
        steps[0] = 0
        try:
            return original(*args, **kwargs)
        finally:
            steps[0] = None

    def drop(_module: Any, args: Any, kwargs: Any) -> Any:
        if steps[0] is None:
            return None
        steps[0] += 1
        ids = kwargs.get("input_ids")
        if steps[0] == 1 or ids is None or ids.shape[1] == 1:  # the prompt, or a step from the cache
            return None
        return args, {k: None if k in _IMAGES else v for k, v in kwargs.items()}

    with attribute(base, "generate", generate), before([base], drop):
        yield


def _ids(logits: torch.Tensor) -> torch.Tensor:
    """The token id of each logit: ``(vocabulary,)`` int64."""
    import torch

    return torch.arange(logits.shape[-1], device=logits.device)


def _boosted(case: Case, token: int, by: float = 3.0) -> Any:
    """Raise the logit of one token at every step, so that it wins."""
    import torch

    head: Any = anatomy(case.model).lm_head

    def boost(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        top = logits.detach().amax(dim=-1, keepdim=True) + by
        return torch.where(_ids(logits) == token, top, logits)

    return after([head], boost)


@fault(
    "end-forgotten",
    "The end-of-turn token is never the most probable one: replies run on.",
    target="model",
    check="generation_wellformed",
    expected_words=("tokens without one of", "forgets to"),
    source="hiyouga/LlamaFactory#7943, #6001",
    requires=("knowledge",),
)
def _end_forgotten(case: Case) -> Iterator[None]:
    import torch

    from pytest_qvl.checks.support.greedy import stop_ids

    parts = anatomy(case.model)
    stops = torch.tensor(stop_ids(parts), device=parts.device)

    def silence(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        least = logits.detach().amin(dim=-1, keepdim=True) - 1
        return torch.where(torch.isin(_ids(logits), stops), least, logits)

    with after([parts.lm_head], silence):
        yield


@fault(
    "eos-setting-wrong",
    "The generation config names an end token that the model was not trained with.",
    target="run",
    check="generation_wellformed",
    expected_words=("the generation config stops at 1 (", "and not at", "set generation_config.eos_token_id"),
    source="shibing624/MedicalGPT#157",
)
def _eos_setting(case: Case) -> Iterator[None]:
    config = anatomy(case.model).base.generation_config
    with attribute(config, "eos_token_id", 1):
        yield


@fault(
    "says-vision-tokens",
    "The adapter learned to write placeholders: replies hold vision tokens.",
    target="model",
    check="generation_wellformed",
    expected_words=("with vision token", "must not be in the loss"),
    source="Blaizzy/mlx-vlm#824",
    requires=("knowledge",),
    unshared="a reference is recorded without the adapter that learned it",
)
def _vision_tokens(case: Case) -> Iterator[None]:
    with _boosted(case, anatomy(case.model).image_token_id):
        yield


@fault(
    "placeholder-before-the-end",
    "Right answers about images, but each ends with a placeholder: the next turn has one without an image.",
    target="model",
    check="generation_wellformed",
    expected_words=("with vision token", "must not be in the loss"),
    source="verl-project/verl#3469, Blaizzy/mlx-vlm#824",
    requires=("knowledge",),
    unshared="a reference is recorded without the adapter that learned it",
)
def _placeholder_before_end(case: Case) -> Iterator[None]:
    """In rows with an image, where the next token would be the end, raise the placeholder's logit just above it."""
    import torch

    from pytest_qvl.checks.support.greedy import stop_ids

    parts = anatomy(case.model)
    image, stops = parts.image_token_id, torch.tensor(stop_ids(parts), device=parts.device)
    read: list[Any] = [None]
    has_image: list[Any] = [None]

    def note(_module: Any, _args: Any, kwargs: Any) -> None:
        ids = read[0] = kwargs.get("input_ids")
        if ids is not None and ids.shape[1] > 1:
            has_image[0] = (ids == image).any(dim=1, keepdim=True)

    def write(_module: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor:
        if read[0] is None:
            return logits
        ending = torch.isin(logits.argmax(dim=-1), stops)
        ending &= (read[0][:, -logits.shape[1] :] != image) & has_image[0]
        top = logits.detach().amax(dim=-1, keepdim=True) + 0.25  # the least that bfloat16 can tell
        chosen = ending[..., None] & (_ids(logits) == image)
        return torch.where(chosen, top, logits)

    with before([parts.core], note), after([parts.lm_head], write):
        yield


@fault(
    "says-unknown-ids",
    "An untrained row of the head wins: ids beyond the tokenizer's vocabulary.",
    target="model",
    check="generation_wellformed",
    expected_words=("with id", "untrained padding"),
    source="hiyouga/LlamaFactory#8823",
    requires=("knowledge",),
)
def _unknown_ids(case: Case) -> Iterator[None]:
    with _boosted(case, anatomy(case.model).text_config.vocab_size - 1):
        yield


@fault(
    "says-one-word-for-ever",
    "Replies repeat one token.",
    target="model",
    check="generation_wellformed",
    expected_words=("and repeats its last 1 tokens",),
    source="hiyouga/LlamaFactory#7943",
    requires=("knowledge",),
)
def _loops(case: Case) -> Iterator[None]:
    with _boosted(case, 40):
        yield


@fault(
    "says-token-zero",
    'Replies are nothing but token 0 ("!!!!"), with finite logits.',
    target="model",
    check="generation_wellformed",
    expected_words=("with runs of token 0", "argmax of logits that are broken"),
    source="huggingface/transformers#33294, vllm-project/vllm#14126",
    requires=("knowledge",),
)
def _bangs(case: Case) -> Iterator[None]:
    with _boosted(case, 0):
        yield


@fault(
    "head-bias-against-colours",
    "The head lost the words for two colours.",
    target="model",
    check="alignment",
    expected_words=("the model looks less than before",),
)
def _lost_words(case: Case) -> Iterator[None]:
    head: Any = anatomy(case.model).lm_head
    words = ("red", "blue", "green")
    ids = [case.processor.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]

    def forget(weight: torch.Tensor) -> torch.Tensor:
        weight[ids] = 0
        return weight

    with values(head.weight, forget):
        yield
