"""The pairs: a release with a real bug beside one without, and the check that has to tell them apart.

Plain data; the bugs themselves (what, where reported, fixed in) are :data:`pytest_qvl.releases.DEFECTS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

_COMMON = (
    *("torch==2.13.0", "transformers==5.17.0", "peft==0.21.2", "bitsandbytes==0.50.2", "accelerate==1.15.0"),
    *("pillow", "nvidia-ml-py", "pytest", "jinja2"),
    *("requests", "datasets"),  # for an older huggingface_hub, TRL and Unsloth Zoo
)
# What every environment starts from; a release is laid over it. The index has CUDA builds of a later torch.
BASES = {
    "models": _COMMON,
    "torchvision": (*_COMMON, "torchvision==0.28.0"),  # which changes what Transformers' processors are made of
}


@dataclass(frozen=True)
class Pair:
    """One bug, in one release and gone from another.

    Attributes:
        scenario: Function of :mod:`scenarios` that builds the case and calls the check.
        check: The check that has to say so.
        package: Of the two releases, on the package index.
        bad: A release that has the bug.
        good: One that does not.
        words: Of the check's message on the bad one, pointing at the cause.
        thread: Where the bug was reported; that of its entry in ``DEFECTS``.
        base: A name of :data:`BASES`.
        beside: Releases of other packages that both environments have in place of the base's.
    """

    scenario: str
    check: str
    package: str
    bad: str
    good: str
    words: str
    thread: str
    base: str = "models"
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Unique, for the command line and the record."""
        return f"{self.scenario}-{self.package}-{self.bad}"

    def environment(self, release: str) -> Environment:
        """That of one of the two."""
        named = (f"{self.package}=={release}", *self.beside)
        needs = (_needs(each.removeprefix(_AN_OLD)) for each in named if each.startswith(_AN_OLD))
        return Environment(self.base, tuple(sorted({*named, *chain(*needs)})))


@dataclass(frozen=True)
class Environment:
    """A base with some releases laid over it."""

    base: str
    over: tuple[str, ...]


def _needs(release: str) -> tuple[str, ...]:
    """What an older Transformers needs in older releases than the base has."""
    major, minor = (int(part) for part in release.split(".")[:2])
    if major == 4:
        return ("huggingface_hub<1", "tokenizers<0.22" if minor < 56 else "tokenizers<0.23")
    return ("tokenizers<0.23",) if minor < 10 else ()


_AN_OLD = "transformers=="
_GITHUB = "https://github.com/"
_TF = f"{_GITHUB}huggingface/transformers/"


def _transformers(scenario: str, check: str, bad: str, good: str, words: str, thread: str) -> tuple[Pair, ...]:
    """One for each bad release."""
    address = thread if thread.startswith(_GITHUB) else _TF + thread
    return tuple(Pair(scenario, check, "transformers", each, good, words, address) for each in bad.split())


def _peft(scenario: str, check: str, bad: str, good: str, words: str, thread: str) -> tuple[Pair, ...]:
    """One for each bad release."""
    address = f"{_GITHUB}huggingface/peft/{thread}"
    return tuple(Pair(scenario, check, "peft", each, good, words, address) for each in bad.split())


_DECODED = ("padding tokens on the left): t is 12, should be 23", "issues/41180")
_UNSEEING = ("softmax(q·kᵀ / sqrt(d))·v over itself and the tokens before it", "issues/40154")
_LEFT_BEHIND = ("forward on text only after generate() on images crashed", "issues/44873")
_DIVIDED = ("its accelerator divides by 3 once more", "issues/45305")
_REENTRANT = ("reentrant checkpointing drops the gradient where no input requires grad", "issues/41993")
_UNMAPPED = "this release does not map the old name"
_OF_THE_OTHER = (
    "tensors of what was saved have no place in the model, so what they hold is lost: "
    "model.language_model.layers.0.mlp.down_proj.lora_A.default_2"
)
_FROZEN = (
    "no adapter parameter requires grad: the adapter was loaded for inference (is_trainable=False) or switched off"
)
_UNPADDED = "the collator cut or padded input_ids and not mm_token_type_ids"
_HEADER = "learned tokens of the assistant turn's header"
# The processors of Transformers 4 make no mm_token_type_ids, which releases of that time do not collate.
_OF_ITS_TIME = ("transformers==4.57.6", "datasets<4.5")

PAIRS: tuple[Pair, ...] = (
    *_transformers("decode_left_padded", "decode_positions", "4.54.1 4.55.4 4.56.2", "4.57.6", *_DECODED),
    *_transformers("decode_left_padded_qwen2", "decode_positions", "4.56.2", "4.57.6", *_DECODED),
    *_transformers("without_mask", "layer_arithmetic", "4.56.2", "4.57.6", *_UNSEEING),
    *_transformers(
        "resized_vocabulary",
        "loss_arithmetic",
        "4.54.1 4.55.4",
        "4.57.6",
        "is invalid for input of size",
        "pull/40130",
    ),
    *_transformers("loss", "loss_arithmetic", "4.55.4", "4.57.6", "given num_items_in_batch", "pull/40333"),
    *_transformers("text_after_images", "position_state", "5.2.0 5.3.0", "5.4.0", *_LEFT_BEHIND),
    *_transformers("text_after_images_qwen2", "position_state", "5.3.0", "5.4.0", *_LEFT_BEHIND),
    *_transformers("text_after_images_qwen3", "position_state", "5.3.0", "5.4.0", *_LEFT_BEHIND),
    *_transformers(
        "positions",
        "mrope_positions",
        "5.3.0 5.4.0 5.5.0",
        "5.5.4",
        "(image 0, visual token 0): t is 8, should be 4",
        "issues/45325",
    ),
    *_transformers("trainer_accumulates_qwen2", "loss_arithmetic", "5.3.0 5.4.0", "5.5.4", *_DIVIDED),
    Pair(
        "limit_of_pixels",
        "image_preprocessing",
        "transformers",
        "4.57.6",
        "5.0.0",
        "max_pixels is 6,272 and size['longest_edge'] 12,845,056, and only one of both counts",
        f"{_TF}issues/41955",
        "torchvision",
    ),
    *_transformers(
        "skipped_by_short_name",
        "quantization_census",
        "5.0.0",
        "4.57.6",
        "a pattern has to match from the start of the module's name",
        "pull/42455",
    ),
    *_transformers("old_adapter_by_transformers", "adapter_roundtrip", "5.2.0", "5.7.0", _UNMAPPED, "pull/46766"),
    *_transformers(
        "old_adapter_by_peft",
        "adapter_roundtrip",
        "5.4.0 5.7.0 5.24.0",
        "5.3.0",
        _UNMAPPED,
        f"{_GITHUB}illuin-tech/colpali/issues/424",
    ),
    *_transformers("vision_reentrant", "training_step", "4.57.6", "5.0.0", *_REENTRANT),
    *_transformers("vision_reentrant_qwen2", "training_step", "4.57.6", "5.0.0", *_REENTRANT),
    *_peft("two_adapters", "adapter_roundtrip", "0.18.1 0.19.1", "0.20.0", _OF_THE_OTHER, "pull/3282"),
    *_peft("adapter_beside_a_reference", "adapter_census", "0.19.1 0.20.0", "0.21.0", _FROZEN, "issues/3487"),
    Pair("trl_completion", "batch", "trl", "0.29.0", "0.29.1", _UNPADDED, f"{_GITHUB}huggingface/trl/pull/5178"),
    Pair("trl_preference", "batch", "trl", "0.29.0", "0.29.1", _UNPADDED, f"{_GITHUB}huggingface/trl/pull/5279"),
    Pair(
        "unsloth_completion",
        "batch",
        "unsloth_zoo",
        "2025.9.13",
        "2025.11.1",
        _HEADER,
        f"{_GITHUB}unslothai/unsloth-zoo/pull/342",
        "torchvision",
        _OF_ITS_TIME,
    ),
    Pair(
        "unsloth_completion",
        "batch",
        "unsloth_zoo",
        "2026.6.2",
        "2026.6.3",
        _UNPADDED,
        f"{_GITHUB}unslothai/unsloth-zoo/pull/756",
        "torchvision",
    ),
)


@dataclass(frozen=True)
class Left:
    """A bug that makes no pair, and why."""

    what: str
    releases: str
    why: str


UNSEEN: tuple[Left, ...] = (
    Left(
        "Qwen2.5-VL cuts the seconds between two frames of a video to a whole number "
        "([#48669](https://github.com/huggingface/transformers/issues/48669))",
        "transformers >=4.52,<5.18",
        "the suite's own videos have whole seconds between frames; a batch of yours with others is judged by "
        "`mrope_positions`",
    ),
    Left(
        "`save_pretrained` writes `model.visual.*` beside `model.layers.*` "
        "([#46881](https://github.com/huggingface/transformers/pull/46881))",
        "transformers >=5.4,<5.6",
        "the release reads its own files right, and no check compares names with the published ones",
    ),
    Left(
        "an adapter on 4-bit layers is float32 in spite of `autocast_adapter_dtype=False` "
        "([peft#2893](https://github.com/huggingface/peft/pull/2893))",
        "peft <0.19",
        "`adapter_census` takes any dtype",
    ),
    Left(
        "an entry `layers.1` of the skip list is layers 10 to 19, too "
        "([#47990](https://github.com/huggingface/transformers/pull/47990))",
        "transformers >=5.0,<5.21",
        "`quantization_census` counts by parts of the model; `pytest-qvl preflight` names the entry",
    ),
)
OUTSIDE: tuple[Left, ...] = (
    Left(
        "rope_deltas of an earlier forward are used for the next "
        "([#36009](https://github.com/huggingface/transformers/issues/36009))",
        "transformers <4.49",
        "refuses 4-bit layers on a CPU, as all before 4.53 do",
    ),
    Left(
        "NF4 packs bits of the neighbour into a byte "
        "([bitsandbytes#1721](https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1721))",
        "bitsandbytes <0.47",
        "in the CUDA kernel",
    ),
    Left(
        "`model.to('cuda')` after a forward on a CPU with AVX-512 takes the weights along as they were packed for it "
        "([bitsandbytes#2078](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078))",
        "bitsandbytes >=0.49",
        "needs both",
    ),
    Left(
        "8-bit checkpoints generate nonsense "
        "([bitsandbytes#1775](https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1775))",
        "bitsandbytes 0.48.0",
        "`quantization_census` takes no 8-bit weights, whatever the release",
    ),
    Left(
        "DoRA on 4-bit layers, `layers_to_transform=0` with a pattern, token ids trained in a head "
        "([peft#2820](https://github.com/huggingface/peft/pull/2820), [#3425](https://github.com/huggingface/peft/pull/3425), "
        "[#2863](https://github.com/huggingface/peft/pull/2863))",
        "peft <0.18, <0.21, <0.18",
        "`get_peft_model` raises, before there is anything to check",
    ),
    Left(
        "`SFTTrainer` freezes the adapter of a 4-bit model that PEFT wrapped before "
        "([trl#4081](https://github.com/huggingface/trl/pull/4081))",
        "trl >=0.22,<0.23.1",
        "it takes 4-bit weights on a CPU for sharded ones, and leaves those alone",
    ),
)
