"""What real collators do to a batch for training; each from a public thread, and seen without a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import image_types, rebuilt
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from pytest_qvl.faults.case import Case
    from pytest_qvl.samples import Sample
    from pytest_qvl.samples.batch import PaddingSide

    Batch = dict[str, torch.Tensor]


def _in_training(case: Case, change: Callable[[Batch], Batch]) -> None:
    """Pass every batch that has labels through ``change``."""
    case.collators.append(lambda batch, _samples: change(batch) if "labels" in batch else batch)


def _beside_ids(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """The batch with a change to every tensor of ``(rows, length)``."""
    shape = batch["input_ids"].shape
    return {name: change(value) if value.shape == shape else value for name, value in batch.items()}


@fault(
    "data-types-padded-on-the-other-side",
    "The collator pads input_ids on the right and mm_token_type_ids on the left.",
    target="batch",
    check="batch",
    expected_words=("types-apart: row", "padded on another side than input_ids"),
    source="huggingface/trl#5785",
)
def _types_on_the_other_side(case: Case) -> Iterator[None]:
    import torch

    image = anatomy(case.model).image_token_id

    def pad(batch: Batch) -> Batch:
        mask = batch["attention_mask"].bool()
        types = image_types(batch["input_ids"], image)
        moved = [torch.cat([row[~own], row[own]]) for row, own in zip(types, mask, strict=True)]
        return {**batch, "mm_token_type_ids": torch.stack(moved)}

    _in_training(case, pad)
    yield


@fault(
    "data-types-not-cut",
    "Truncation cuts input_ids, mask and labels, and leaves mm_token_type_ids as long as they were.",
    target="batch",
    check="batch",
    expected_words=("shapes-apart: batch: mm_token_type_ids of shape", "and not mm_token_type_ids"),
    source="huggingface/trl#5283",
    silent=False,
)
def _types_not_cut(case: Case) -> Iterator[None]:
    image = anatomy(case.model).image_token_id

    def cut(batch: Batch) -> Batch:
        types = image_types(batch["input_ids"], image)
        return {**_beside_ids(batch, lambda value: value[:, :-1]), "mm_token_type_ids": types}

    _in_training(case, cut)
    yield


@fault(
    "data-image-truncated",
    "max_length cuts rows inside of an image; its pixels stay.",
    target="batch",
    check="batch",
    expected_words=("image-truncated: row", "truncation (max_length, cutoff_len)"),
    source="huggingface/trl#4289, huggingface/trl#5927, unslothai/unsloth#2764",
    silent=False,
)
def _image_truncated(case: Case) -> Iterator[None]:
    image = anatomy(case.model).image_token_id

    def cut(batch: Batch) -> Batch:
        last = int((batch["input_ids"] == image).nonzero()[:, 1].max())
        return _beside_ids(batch, lambda value: value[:, :last])

    _in_training(case, cut)
    yield


@fault(
    "data-answers-truncated",
    "max_length cuts the end off the longest rows: their answers have no end.",
    target="batch",
    check="batch",
    expected_words=("answer-truncated: row", "truncation (max_length, cutoff_len)"),
    source="hiyouga/LlamaFactory#7943, shibing624/MedicalGPT#157",
)
def _answers_truncated(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: _beside_ids(batch, lambda value: value[:, :-1]))
    yield


@fault(
    "data-labels-copied",
    "Labels are a copy of input_ids in which nothing but padding is masked.",
    target="batch",
    check="batch",
    expected_words=("whole-row-learned: row 0", "image placeholders included", "labels are a copy of input_ids"),
    source="NielsRogge/Transformers-Tutorials#511, roboflow/maestro#129, om-ai-lab/VLM-R1#123",
)
def _labels_copied(case: Case) -> Iterator[None]:
    def copy(batch: Batch) -> Batch:
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)}

    _in_training(case, copy)
    yield


@fault(
    "data-user-learned",
    "The user's words are learned beside the answer: the mask knows no roles.",
    target="batch",
    check="batch",
    expected_words=("prompt-learned: row", "tokens of the user turn"),
    source="unslothai/unsloth#3772, huggingface/trl#3751",
)
def _user_learned(case: Case) -> Iterator[None]:
    from pytest_qvl.checks.support.turns import TurnReader

    reader = TurnReader(case.processor.tokenizer)
    vision = {*anatomy(case.model).vision_token_ids}

    def learn(batch: Batch) -> Batch:
        labels = batch["labels"].clone()
        for row, (ids, mask) in enumerate(
            zip(batch["input_ids"].tolist(), batch["attention_mask"].bool().tolist(), strict=True)
        ):
            for turn in reader.turns(ids, mask):
                places = [place for place in turn.places if turn.role == "user" and ids[place] not in vision]
                labels[row, places] = batch["input_ids"][row, places]
        return {**batch, "labels": labels}

    _in_training(case, learn)
    yield


@fault(
    "data-end-masked-as-padding",
    "The pad token is <|im_end|>, and labels are masked wherever it stands: no answer's end is learned.",
    target="batch",
    check="batch",
    expected_words=("end-not-learned: row", "labels were masked wherever the id is the pad token"),
    source="huggingface/trl#976, huggingface/transformers#23530, mlabonne/llm-course#33",
)
def _end_masked(case: Case) -> Iterator[None]:
    tokenizer = case.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    before = tokenizer.pad_token

    def mask(batch: Batch) -> Batch:
        return {**batch, "labels": batch["labels"].masked_fill(batch["labels"] == end, IGNORED)}

    _in_training(case, mask)
    tokenizer.pad_token = "<|im_end|>"  # by the tokenizer's own setter: ``tools.attribute`` would not move its id
    try:
        yield
    finally:
        tokenizer.pad_token = before


@fault(
    "data-pixels-not-normalised",
    "The collator rescales pixels to 0 to 1 and does not normalise them.",
    target="batch",
    check="batch",
    expected_words=("pixels-not-normalised: batch", "rescaled to 0 to 1 and not normalised"),
    source="vllm-project/vllm-ascend#12906",
)
def _not_normalised(case: Case) -> Iterator[None]:
    _in_training(case, lambda batch: _renormalised(case, batch, (0.0,) * 3, (1.0,) * 3))
    yield


@fault(
    "data-pixels-of-another-family",
    "The collator normalises pixels with the mean and the deviation of another family's processor.",
    target="batch",
    check="batch",
    expected_words=("pixels-not-normalised: batch", "as if they were normalised with"),
    source="apple/coreai-models#82, QwenLM/Qwen3-VL#1732",
)
def _of_another_family(case: Case) -> Iterator[None]:
    from pytest_qvl.models.families import FAMILIES
    from pytest_qvl.models.layers import family_of

    own = family_of(anatomy(case.model)).image_mean
    other = next(family for family in FAMILIES.values() if family.image_mean != own)
    _in_training(case, lambda batch: _renormalised(case, batch, other.image_mean, other.image_std))
    yield


def _renormalised(case: Case, batch: Batch, mean: Sequence[float], deviation: Sequence[float]) -> Batch:
    """The batch with the same pixels, normalised with other constants (computed in float64)."""
    import torch

    own = case.processor.image_processor
    pixels = batch["pixel_values"]
    by_channel = pixels.double().reshape(len(pixels), 3, -1)

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)[None, :, None]

    raw = by_channel * column(own.image_std) + column(own.image_mean)
    made = (raw - column(mean)) / column(deviation)
    return {**batch, "pixel_values": made.flatten(1).to(pixels.dtype)}


@fault(
    "data-channels-exchanged",
    "Images are read by OpenCV, which has blue first, and taken for RGB.",
    target="batch",
    check="batch",
    expected_words=("colours-exchanged: row", "the loader reads BGR"),
    source="MhLiao/DB#204, pixelite1201/CameraHMR#20",
)
def _channels_exchanged(case: Case) -> Iterator[None]:
    _in_training_with(case, lambda sample: _with_images(sample, map(_blue_first, sample.images)))
    yield


def _blue_first(image: Any) -> Any:
    from PIL import Image

    red, green, blue = image.convert("RGB").split()
    return Image.merge("RGB", (blue, green, red))


def _with_images(sample: Sample, images: Any) -> Sample:
    from dataclasses import replace

    return replace(sample, images=tuple(images), scenes=())


def _in_training_with(case: Case, change: Callable[[Sample], Sample]) -> None:
    """Make every batch that has labels of changed samples, and not of those that it should be made of."""
    from pytest_qvl.samples import make_batch

    def collate(batch: Batch, samples: Sequence[Sample]) -> Batch:
        if "labels" not in batch:
            return batch
        side: PaddingSide = "right" if bool(batch["attention_mask"][:, 0].all()) else "left"
        changed = [change(sample) for sample in samples]
        return make_batch(case.processor, changed, padding_side=side, answers=True)

    case.collators.append(collate)


@fault(
    "data-first-image-only",
    "The collator takes the first image of each sample and leaves the others out, of text and pixels alike.",
    target="batch",
    check="batch",
    expected_words=("images-missing: row", "the collator takes one image of each sample"),
    source="zjysteven/lmms-finetune#50, QwenLM/Qwen3-VL#1262",
)
def _first_image_only(case: Case) -> Iterator[None]:
    _in_training_with(case, lambda sample: _with_images(sample, sample.images[:1]))
    yield


@fault(
    "data-images-in-another-order",
    "The collator hands the images of a row to the processor in reverse order.",
    target="batch",
    check="batch",
    expected_words=("images-exchanged: row", "shows image"),
    source="Blaizzy/mlx-vlm#565, Blaizzy/mlx-vlm#1941",
)
def _another_order(case: Case) -> Iterator[None]:
    _in_training_with(case, lambda sample: _with_images(sample, reversed(sample.images)))
    yield


@fault(
    "data-images-not-expanded",
    "The text goes through the tokenizer alone: one placeholder for each image, however large.",
    target="batch",
    check="batch",
    expected_words=("images-not-expanded: row", "the text went through the tokenizer alone"),
    source="sgl-project/sglang#5164, kekzl/imp#1177",
    silent=False,
)
def _not_expanded(case: Case) -> Iterator[None]:
    image = anatomy(case.model).image_token_id
    _in_training(case, lambda batch: _replaced(case, batch, lambda run: run[:1] if run[0] == image else run))
    yield


@fault(
    "data-images-expanded-twice",
    "A text whose placeholders were expanded goes through the processor again, which expands each of them.",
    target="batch",
    check="batch",
    expected_words=("images-expanded-twice: row", "expanded already went through the processor once more"),
    source="PrimeIntellect-ai/prime-rl#1739",
    silent=False,
)
def _expanded_twice(case: Case) -> Iterator[None]:
    image = anatomy(case.model).image_token_id
    _in_training(case, lambda batch: _replaced(case, batch, lambda run: run * len(run) if run[0] == image else run))
    yield


@fault(
    "data-template-twice",
    "The chat template is applied to a question that it was applied to already.",
    target="batch",
    check="batch",
    expected_words=("template-twice: row", "the chat template was applied to a text that it had made already"),
    source="huggingface/trl#1400, OpenRLHF/OpenRLHF#393, sgl-project/sglang#888",
)
def _template_twice(case: Case) -> Iterator[None]:
    tokenizer = case.processor.tokenizer
    begin = tokenizer.convert_tokens_to_ids("<|im_start|>")
    header: list[int] = tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"]

    def again(run: list[int]) -> list[int]:
        return header + run if run[0] == begin else run

    _in_training(case, lambda batch: _replaced(case, batch, again))
    yield


def _replaced(case: Case, batch: Batch, change: Callable[[list[int]], list[int]]) -> Batch:
    """The batch with each run of equal ids replaced, its labels moved along."""
    from itertools import groupby

    rows = []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids: list[int] = []
        taught: list[int] = []
        own = zip(batch["input_ids"][row][mask].tolist(), batch["labels"][row][mask].tolist(), strict=True)
        for (token, label), group in groupby(own):
            run = change([token] * len(list(group)))
            ids += run
            taught += [IGNORED if label == IGNORED else token] * len(run)
        rows.append((ids, taught))
    return rebuilt(case, batch, rows)


@fault(
    "data-pixels-dropped",
    "remove_unused_columns takes pixel_values for a column that the model does not know, and drops them.",
    target="batch",
    check="batch",
    expected_words=("images-without-pixels: row", "dropped pixel_values"),
    source="huggingface/transformers#27535, huggingface/transformers#19599, TIGER-AI-Lab/VLM2Vec#43",
)
def _pixels_dropped(case: Case) -> Iterator[None]:
    dropped = ("pixel_values", "image_grid_thw")
    _in_training(case, lambda batch: {name: value for name, value in batch.items() if name not in dropped})
    yield


@fault(
    "data-packed-by-text-positions",
    "The collator packs rows and brings position_ids (rows, length), which part nothing in a model with M-RoPE.",
    target="batch",
    check="batch",
    expected_words=("packed-not-separated: row 0", "part nothing in a model with M-RoPE"),
    source="axolotl-ai-cloud/axolotl#3817, modelscope/ms-swift#9618",
)
def _packed_by_text_positions(case: Case) -> Iterator[None]:
    import torch

    def pack(batch: Batch) -> Batch:
        mask = batch["attention_mask"].bool()
        made = _packed(batch)
        counts = [torch.arange(int(own.sum())) for own in mask]
        return {**made, "position_ids": torch.cat(counts)[None]}

    _in_training(case, pack)
    yield


@fault(
    "data-packed-with-positions-of-text",
    "The collator packs rows with text positions in front, and with 1-D positions where M-RoPE ids belong.",
    target="batch",
    check="batch",
    expected_words=("packed-apart: row 0", "make them sample by sample"),
    source="NVIDIA-NeMo/Automodel#2172, hiyouga/LlamaFactory#7754, hiyouga/LlamaFactory#10283",
)
def _packed_with_positions_of_text(case: Case) -> Iterator[None]:
    import torch

    def pack(batch: Batch) -> Batch:
        counts = [torch.arange(int(own.sum())) for own in batch["attention_mask"].bool()]
        return {**_packed(batch), "position_ids": torch.cat(counts).expand(4, 1, -1).clone()}

    _in_training(case, pack)
    yield


def _packed(batch: Batch) -> Batch:
    """All rows behind each other in one, without a mask."""
    mask = batch["attention_mask"].bool()
    rows = {name: value[mask][None] for name, value in batch.items() if value.shape == mask.shape}
    del rows["attention_mask"]
    return {**{name: value for name, value in batch.items() if value.shape != mask.shape}, **rows}


def _no_packing() -> str | None:
    from transformers import masking_utils

    known = hasattr(masking_utils, "find_packed_sequence_indices")
    return None if known else "this release of Transformers looks for packed rows in another place"


@fault(
    "packing-ignored-by-attention",
    "Attention takes no notice of where packed samples begin, as in releases and patches without packing.",
    target="model",
    check="packing_isolation",
    expected_words=("it must move no output of another sample that is packed into its row",),
    source="axolotl-ai-cloud/axolotl#3817, unslothai/unsloth#126",
    needs=_no_packing,
    requires=("attention in every layer",),
)
def _packing_ignored(_case: Case) -> Iterator[None]:
    from transformers import masking_utils

    from pytest_qvl.faults.tools import attribute

    with attribute(masking_utils, "find_packed_sequence_indices", lambda *_args, **_kwargs: None):
        yield


@fault(
    "data-video-without-time",
    "The collator of videos drops second_per_grid_ts: every video is laid out as one patch per second.",
    target="batch",
    check="batch",
    expected_words=("video-time: batch: no second_per_grid_ts", "counts one second for each patch"),
    source="huggingface/transformers#48669, huggingface/transformers#41153, EvolvingLMMs-Lab/lmms-eval#1393",
    requires=("time of videos",),
)
def _video_without_time(case: Case) -> Iterator[None]:
    """Show every image of the training rows as a video of one temporal patch."""
    parts = anatomy(case.model)
    names = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}

    def as_video(batch: Batch) -> Batch:
        ids = batch["input_ids"]
        made = {names.get(name, name): value for name, value in batch.items()}
        made["input_ids"] = ids.masked_fill(ids == parts.image_token_id, parts.video_token_id)
        if "mm_token_type_ids" in batch:
            made["mm_token_type_ids"] = batch["mm_token_type_ids"] * 2
        return made

    _in_training(case, as_video)
    yield
