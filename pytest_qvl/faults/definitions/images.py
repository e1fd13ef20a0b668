"""Images that are not what the samples show, before they reach the model."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import attribute
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.layers import family_of
from pytest_qvl.samples.batch import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_qvl.faults.case import Case

_MOVED = ("visual features before the merger moved away", "its inputs or kernels differ")


def _collated(case: Case, change: Callable[[dict[str, Any], Any], dict[str, Any]]) -> None:
    case.collators.append(lambda batch, samples: change(dict(batch), samples) if "pixel_values" in batch else batch)


def _chunks(batch: dict[str, Any]) -> list[Any]:
    return list(batch["pixel_values"].split(batch["image_grid_thw"].prod(dim=1).tolist()))


@fault(
    "pictures-exchanged",
    "The first two images of the batch are handed over in the wrong order, grids included.",
    target="batch",
    check="picture_pairing",
    expected_words=("the grid of row 1, image 0", "holds the pixels of row 1, image 0"),
    source="Blaizzy/mlx-vlm#1941",
    silent=False,
)
def _exchanged(case: Case) -> Iterator[None]:
    import torch

    def swap(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        pixels, grids = _chunks(batch), batch["image_grid_thw"]
        order = [1, 0, *range(2, len(pixels))] if len(pixels) > 1 else [0]
        return {**batch, "pixel_values": torch.cat([pixels[i] for i in order]), "image_grid_thw": grids[order]}

    _collated(case, swap)
    yield


@fault(
    "equal-pictures-exchanged",
    "Images of equal grids change places: nothing raises, the wrong image is described.",
    target="batch",
    check="picture_pairing",
    expected_words=("holds the pixels of",),
    source="EricLBuehler/mistral.rs#1950, huggingface/transformers#41721",
)
def _equal_exchanged(case: Case) -> Iterator[None]:
    import torch

    def swap(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        pixels, sizes = _chunks(batch), [chunk.shape[0] for chunk in _chunks(batch)]
        pairs = [(i, j) for i in range(len(sizes)) for j in range(i) if sizes[i] == sizes[j]]
        grids = batch["image_grid_thw"].tolist()
        for i, j in pairs:
            if grids[i] == grids[j]:
                pixels[i], pixels[j] = pixels[j], pixels[i]
                break
        return {**batch, "pixel_values": torch.cat(pixels)}

    _collated(case, swap)
    yield


@fault(
    "grid-transposed",
    "Height and width of every grid are exchanged: the placeholder count stays right.",
    target="batch",
    check="picture_pairing",
    expected_words=("(height and width are transposed)", "but alone it makes"),
    source="vllm-project/vllm#45244",
)
def _transposed(case: Case) -> Iterator[None]:
    _collated(case, lambda b, _: {**b, "image_grid_thw": b["image_grid_thw"][:, [0, 2, 1]]})
    yield


@fault(
    "patches-in-raster-order",
    "Patches are handed over row by row, not in groups of two by two.",
    target="batch",
    check="picture_pairing",
    expected_words=("differs from the image's own",),
    source="Blaizzy/mlx-vlm#565",
)
def _raster(case: Case) -> Iterator[None]:
    import torch

    def reorder(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        images = []
        for pixels, (t, h, w) in zip(_chunks(batch), batch["image_grid_thw"].tolist(), strict=True):
            grouped = pixels.reshape(t, h // 2, w // 2, 2, 2, -1)
            images.append(grouped.permute(0, 1, 3, 2, 4, 5).reshape(pixels.shape))
        return {**batch, "pixel_values": torch.cat(images)}

    _collated(case, reorder)
    yield


@fault(
    "exif-ignored",
    "A collator opens photographs of a phone without their EXIF orientation: the model sees them lying on their side.",
    target="batch",
    check="picture_pairing",
    expected_words=("lies as a file with EXIF orientation 6 stores it", "exif_transpose"),
    source="sgl-project/sglang#33449, mistralai/mistral-common#330",
)
def _exif_ignored(case: Case) -> Iterator[None]:
    def read(batch: dict[str, Any], samples: Any) -> dict[str, Any]:
        images = [_opened(_photograph(image)) for sample in samples for image in sample.images]
        made = case.processor.image_processor(images=images, return_tensors="pt")
        return {**batch, "pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}

    _collated(case, read)
    yield


def _photograph(image: Any) -> BytesIO:
    """A file of the image as a phone that is held upright writes it: stored lying, with orientation 6."""
    from PIL import Image

    from pytest_qvl.samples.exif import TAG, as_stored

    exif = Image.Exif()
    exif[TAG] = 6
    file = BytesIO()
    as_stored(image, 6).save(file, "PNG", exif=exif)  # without loss, so that the check can tell what was done
    return file


def _opened(file: BytesIO) -> Any:
    from PIL import Image

    return Image.open(file).convert("RGB")


@fault(
    "normalised-twice",
    "A collator normalises pixel_values that the processor has normalised already.",
    target="batch",
    check="picture_pairing",
    expected_words=("differs from the image's own by up to",),
    source="sgl-project/sglang#12390",
)
def _normalised_twice(case: Case) -> Iterator[None]:
    _collated(case, lambda b, _: {**b, "pixel_values": (b["pixel_values"] - 0.5) / 0.25})
    yield


@fault(
    "pixels-as-uint8",
    "A collator casts pixel_values to uint8, as if they were images: the model sees next to nothing.",
    target="batch",
    check="picture_pairing",
    expected_words=("pixel_values are uint8", "float16, bfloat16 or float32 only"),
)
def _uint8(case: Case) -> Iterator[None]:
    import torch

    _collated(case, lambda b, _: {**b, "pixel_values": b["pixel_values"].to(torch.uint8)})
    yield


@fault(
    "template-drift",
    "The model is trained with another template than it is asked with: a line break before <|im_end|>.",
    target="batch",
    check="picture_pairing",
    expected_words=("prompts are not those of the processor's chat template", "use one template for both"),
    source="2U1/Qwen-VL-Series-Finetune#75",
)
def _template_drift(case: Case) -> Iterator[None]:
    """Insert a line break before the prompt's last ``<|im_end|>``, in training batches only."""
    import torch

    tokenizer = case.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    line = tokenizer("\n", add_special_tokens=False)["input_ids"][0]

    def drift(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        if "labels" not in batch:
            return batch
        shape = batch["input_ids"].shape
        made: dict[str, list[Any]] = {name: [] for name, value in batch.items() if value.shape == shape}
        fill = {"input_ids": line, "attention_mask": 1, "labels": IGNORED}
        for row, ids in enumerate(batch["input_ids"]):
            answer = int((batch["labels"][row] != IGNORED).nonzero()[0])
            place = int((ids[:answer] == end).nonzero()[-1])
            for name, rows in made.items():
                tokens = batch[name][row]
                rows.append(torch.cat([tokens[:place], tokens.new_tensor([fill.get(name, 0)]), tokens[place:]]))
        return {**batch, **{name: torch.stack(rows) for name, rows in made.items()}}

    case.collators.append(drift)
    yield


@fault(
    "questions-exchanged",
    "Two text rows change places; the images stay.",
    target="batch",
    check="picture_pairing",
    expected_words=("does not hold the question of sample",),
    source="Blaizzy/mlx-vlm#1941",
)
def _questions(case: Case) -> Iterator[None]:
    def exchange(batch: dict[str, Any], samples: Any) -> dict[str, Any]:
        if len(samples) < 2:
            return batch
        tokenizer = case.processor.tokenizer
        ids = batch["input_ids"].clone()
        asked = [tokenizer(s.question, add_special_tokens=False)["input_ids"] for s in samples]
        for row, own in enumerate(asked):
            other = asked[(row + 1) % len(asked)]
            tokens = ids[row].tolist()
            at = next(i for i in range(len(tokens)) if tokens[i : i + len(own)] == own)
            n = min(len(own), len(other))
            ids[row, at : at + n] = ids.new_tensor(other[:n])
        return {**batch, "input_ids": ids}

    _collated(case, exchange)
    yield


def image_processor_set(case: Case, **settings: Any) -> Any:
    """Give the image processor other settings, without a word."""
    from pytest_qvl.faults.tools import all_of

    return all_of([attribute(case.processor.image_processor, name, v) for name, v in settings.items()])


@fault(
    "patches-of-another-size",
    "The processor is another family's: its patches are larger or smaller than those of the vision tower.",
    target="processor",
    check="placeholder_counts",
    expected_words=("values per patch, which is 3 x 2 x", "patch_size or temporal_patch_size of the processor"),
    silent=False,
)
def _patch_size(case: Case) -> Iterator[None]:
    other = 14 if case.processor.image_processor.patch_size == 16 else 16
    with image_processor_set(case, patch_size=other):
        yield


@fault(
    "merge-size-of-another-model",
    "The processor does not merge patches, and the model does: four times as many placeholders as visual tokens.",
    target="processor",
    check="placeholder_counts",
    expected_words=("placeholders, but grid", "did the processor count with merge_size 1, where the model's is 2"),
    silent=False,
)
def _merge_size(case: Case) -> Iterator[None]:
    with image_processor_set(case, merge_size=1):
        yield


@fault(
    "mean-and-deviation-wrong",
    "Images are normalised with another family's mean and deviation: 0.5 for CLIP's, or CLIP's for 0.5.",
    target="processor",
    check="vision_stability",
    expected_words=_MOVED,
    source="unslothai/unsloth#4671",
)
def _mean(case: Case) -> Iterator[None]:
    own = family_of(anatomy(case.model)).image_mean
    other = next(family for family in FAMILIES.values() if family.image_mean != own)
    with image_processor_set(case, image_mean=list(other.image_mean), image_std=list(other.image_std)):
        yield


@fault(
    "rescaling-lost",
    "Pixels stay between 0 and 255 before they are normalised.",
    target="processor",
    check="vision_stability",
    expected_words=_MOVED,
)
def _rescaling(case: Case) -> Iterator[None]:
    with image_processor_set(case, do_rescale=False):
        yield


@fault(
    "channels-reversed",
    "Images are read as BGR.",
    target="processor",
    check="vision_stability",
    expected_words=_MOVED,
)
def _channels(case: Case) -> Iterator[None]:
    with repainted(case, lambda image: merged(image.convert("RGB").split()[::-1])):
        yield


@fault(
    "pictures-grey",
    "Images lose their colour on the way.",
    target="processor",
    check="alignment",
    expected_words=("answers are right", "colour"),
)
def _grey(case: Case) -> Iterator[None]:
    with repainted(case, lambda image: image.convert("L").convert("RGB")):
        yield


@fault(
    "resized-twice",
    "A second resizing step makes other grids: as many visual tokens, or more, or fewer.",
    target="processor",
    check="vision_stability",
    expected_words=("visual tokens", "recorded with another processor"),
    source="sgl-project/sglang#12390, QwenLM/Qwen3-VL#1960",
)
def _resized(case: Case) -> Iterator[None]:
    with repainted(case, lambda image: image.resize((image.width + 28, image.height + 28))):
        yield


def merged(bands: Any) -> Any:
    """One RGB image of three bands."""
    from PIL import Image

    return Image.merge("RGB", bands)


def repainted(case: Case, paint: Callable[[Any], Any]) -> Any:
    """Pass every image through ``paint`` before the image processor sees it."""
    processor = case.processor.image_processor
    original = processor.preprocess

    def preprocess(images: Any, *args: Any, **kwargs: Any) -> Any:
        return original(_each(images, paint), *args, **kwargs)

    return attribute(processor, "preprocess", preprocess)


def _each(images: Any, paint: Callable[[Any], Any]) -> Any:
    return [_each(i, paint) for i in images] if isinstance(images, list | tuple) else paint(images)
