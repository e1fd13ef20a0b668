"""What is known of a red cell: a thread about it, or why it is red on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_LABELS = "labels: answers only"
_PLACEHOLDERS = "labels: no image placeholder is learned"
_LIMIT = "a limit of length cuts no image"
_ALL = "every token is learned unless asked otherwise"
_KNOWN: Mapping[tuple[str, str, str], str] = MappingProxyType(
    {
        (
            "trl",
            "prompt and completion",
            _LIMIT,
        ): "The default of `SFTConfig.max_length` is 1,024 tokens, less than "
        "one image of a megapixel makes; `max_length=None` cuts nothing. The model's forward pass raises, which "
        "`SFTTrainer` explains since [trl#5927](https://github.com/huggingface/trl/pull/5927); reported in "
        "[trl#4289](https://github.com/huggingface/trl/issues/4289). Rows of `messages` are refused by the processor.",
        (
            "trl",
            "messages",
            _LABELS,
        ): f"What the set-up is for: {_ALL}. `assistant_only_loss=True`, or rows of prompt and "
        "completion, learn answers only: [trl#3751](https://github.com/huggingface/trl/issues/3751), "
        "[trl#4077](https://github.com/huggingface/trl/issues/4077).",
        ("trl", "messages", _PLACEHOLDERS): "The same: labels are a copy of the ids, padding left out "
        "([trl#3751](https://github.com/huggingface/trl/issues/3751)).",
        (
            "unsloth",
            "as in its notebooks",
            _LABELS,
        ): f"What the set-up is for: {_ALL}, placeholders of images left out. "
        "`train_on_responses_only=True` learns answers only: "
        "[unsloth#3772](https://github.com/unslothai/unsloth/issues/3772).",
        ("llamafactory", "stage: sft", _LIMIT): "The row is cut, its image is not; here positions are made first and "
        "fail. What to change is `cutoff_len`: "
        "[LlamaFactory#8226](https://github.com/hiyouga/LlamaFactory/issues/8226), "
        "[LlamaFactory#6559](https://github.com/hiyouga/LlamaFactory/issues/6559).",
        (
            "maestro",
            "train_collate_fn",
            "`mm_token_type_ids` mark the placeholders",
        ): "It hands on five tensors by name. "
        "From Transformers 5.3 on a Qwen-VL model needs a sixth, or its positions are those of plain text, without an "
        "error: [transformers#43972](https://github.com/huggingface/transformers/pull/43972).",
        ("maestro", "train_collate_fn", _LABELS): "Masked by a merged change that the release does not have: "
        "[maestro#129](https://github.com/roboflow/maestro/pull/129).",
        (
            "nemo",
            "pre-tokenized",
            "packed samples do not see each other",
        ): "A row of text gets a dummy image whose tokens "
        "its `attention_mask` hides; packing writes the number of the sample over that mask, so the text attends to "
        "the dummy, whose positions are 0. No thread was found.",
        (
            "nemo",
            "pre-tokenized",
            "a text-only row among rows with images",
        ): "A row of text gets a dummy image whose tokens its `attention_mask` hides, and the batch brings no "
        "`position_ids`. Transformers makes them of the grids in order and leaves out what is not attended to, so each "
        "image behind the dummy gets the grid of the one before it: an error about shapes, or, with as many visual "
        "tokens, wrong positions in silence. No thread was found.",
        (
            "nemo",
            "pre-tokenized",
            "video",
        ): "Without `second_per_grid_ts` the model counts one second for each temporal "
        "patch, which is right for two frames per second alone.",
        ("axolotl", "column of images", "several images in a row"): "Only the first image of the column is taken, with "
        "a warning, and the processor runs out of images. Images inside of the messages are all taken.",
    }
)


def known(framework: str, set_up: str, name: str) -> str:
    """A sentence or two about one cell; empty where nothing was found."""
    return _KNOWN.get((framework, set_up, name), "")
