"""Processors that are wrong from the start: a reference recorded with them is as wrong, so nothing else can tell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.images import image_processor_set, merged, repainted
from pytest_qvl.faults.tools import attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Case


def _remade(case: Case, change: Callable[[Any, torch.Tensor, Any], torch.Tensor], **options: Any) -> Any:
    """Change the ``pixel_values`` that the image processor returns, or the options that it is called with."""
    processor = case.processor.image_processor
    original = processor.preprocess

    def preprocess(images: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(images, *args, **{**kwargs, **options})
        made["pixel_values"] = change(processor, made["pixel_values"], made["image_grid_thw"])
        return made

    return attribute(processor, "preprocess", preprocess)


def _as_it_is(_processor: Any, pixels: torch.Tensor, _grids: Any) -> torch.Tensor:
    return pixels


@fault(
    "processor-mean-half",
    "The processor's own files say mean and deviation 0.5, another family's: the tower was trained with CLIP's.",
    target="processor",
    check="image_preprocessing",
    expected_words=("image_mean is [0.5, 0.5, 0.5]", "that of every released", "image_std is"),
    source="unslothai/unsloth#4671",
    requires=("CLIP's normalisation",),
)
def _half(case: Case) -> Iterator[None]:
    with image_processor_set(case, image_mean=[0.5] * 3, image_std=[0.5] * 3):
        yield


@fault(
    "processor-imagenet-constants",
    "The processor normalises with ImageNet's mean and deviation: colours are off by a few percent.",
    target="processor",
    check="image_preprocessing",
    expected_words=("image_mean is [0.485, 0.456, 0.406]", "that of every released"),
)
def _imagenet(case: Case) -> Iterator[None]:
    with image_processor_set(case, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]):
        yield


@fault(
    "processor-without-rescaling",
    "The processor does not rescale, and its reference was recorded so.",
    target="processor",
    check="image_preprocessing",
    expected_words=("values are not rescaled (by 1/255)", "do_rescale=False"),
)
def _rescaling(case: Case) -> Iterator[None]:
    with image_processor_set(case, do_rescale=False):
        yield


@fault(
    "processor-without-normalising",
    "The processor does not normalise.",
    target="processor",
    check="image_preprocessing",
    expected_words=("values are rescaled and not normalised", "do_normalize=False"),
)
def _normalising(case: Case) -> Iterator[None]:
    with image_processor_set(case, do_normalize=False):
        yield


@fault(
    "processor-reads-bgr",
    "The processor takes images as BGR, as OpenCV reads them, and its reference was recorded so.",
    target="processor",
    check="image_preprocessing",
    expected_words=("red and blue are exchanged (BGR)",),
)
def _bgr(case: Case) -> Iterator[None]:
    with repainted(case, lambda image: merged(image.convert("RGB").split()[::-1])):
        yield


@fault(
    "processor-without-colour",
    "The processor turns images grey, and its reference was recorded so.",
    target="processor",
    check="image_preprocessing",
    expected_words=("colours are lost (grey)",),
)
def _grey(case: Case) -> Iterator[None]:
    with repainted(case, lambda image: image.convert("L").convert("RGB")):
        yield


@fault(
    "second-frame-zero",
    "The second frame of a still image is empty, where the image is repeated.",
    target="processor",
    check="image_preprocessing",
    expected_words=("its second frame is zero, where a still image is repeated",),
)
def _second_frame(case: Case) -> Iterator[None]:
    with later_frames_times(case, 0):
        yield


def later_frames_times(case: Case, factor: float) -> AbstractContextManager[None]:
    """Multiply every frame of a still image but the first."""

    def change(processor: Any, pixels: torch.Tensor, _grids: Any) -> torch.Tensor:
        frames = pixels.reshape(len(pixels), 3, processor.temporal_patch_size, -1).clone()
        frames[:, :, 1:] *= factor
        return frames.reshape(pixels.shape)

    made: AbstractContextManager[None] = _remade(case, change)
    return made


@fault(
    "processor-frames-before-channels",
    "Within a patch the frames come before the channels, as another framework lays them out.",
    target="processor",
    check="image_preprocessing",
    expected_words=("frames come before channels",),
)
def _frames_first(case: Case) -> Iterator[None]:
    def exchange(processor: Any, pixels: torch.Tensor, _grids: Any) -> torch.Tensor:
        frames = pixels.reshape(len(pixels), 3, processor.temporal_patch_size, -1)
        return frames.transpose(1, 2).reshape(pixels.shape)

    with _remade(case, exchange):
        yield


@fault(
    "processor-patches-in-raster-order",
    "The processor cuts an image row by row, not in blocks of two by two patches.",
    target="processor",
    check="image_preprocessing",
    expected_words=("patches are in rows, not in blocks of merge_size",),
    source="Blaizzy/mlx-vlm#565",
)
def _raster(case: Case) -> Iterator[None]:
    def in_rows(processor: Any, pixels: torch.Tensor, grids: Any) -> torch.Tensor:
        import torch

        side, images = processor.merge_size, []
        chunks = torch.split(pixels, [int(grid.prod()) for grid in grids])
        for chunk, (_, rows, columns) in zip(chunks, grids.tolist(), strict=True):
            blocks = chunk.reshape(rows // side, columns // side, side, side, -1)
            images.append(blocks.permute(0, 2, 1, 3, 4).reshape(chunk.shape))
        return torch.cat(images)

    with _remade(case, in_rows):
        yield


@fault(
    "processor-resizes-bilinear",
    "The processor resizes with bilinear interpolation: fine print blurs.",
    target="processor",
    check="image_preprocessing",
    expected_words=("it is resized with bilinear interpolation, not bicubic",),
)
def _bilinear(case: Case) -> Iterator[None]:
    from PIL.Image import Resampling

    with image_processor_set(case, resample=Resampling.BILINEAR):
        yield


@fault(
    "processor-with-other-limits",
    "A wrapper calls the processor with pixel limits of its own: small images get four times as many visual tokens.",
    target="processor",
    check="image_preprocessing",
    expected_words=("its grid is", "as with other pixel limits than the processor names"),
    source="QwenLM/Qwen3-VL#1960",
)
def _limits(case: Case) -> Iterator[None]:
    from pytest_qvl.samples.sizes import pixel_limits

    fewest, most = pixel_limits(case.processor.image_processor)
    with _remade(case, _as_it_is, size={"shortest_edge": 8 * fewest, "longest_edge": most}):
        yield


@fault(
    "processor-ignores-exif",
    "The processor's loader does not turn photographs as their EXIF orientation says.",
    target="processor",
    check="image_preprocessing",
    expected_words=("a file with EXIF orientation 6: its grid is", "EXIF orientation was ignored"),
    source="sgl-project/sglang#33449, mistralai/mistral-common#330",
)
def _exif(case: Case) -> Iterator[None]:
    from PIL import Image

    original = case.processor.image_processor.fetch_images

    def fetch(image: Any) -> Any:
        return Image.open(image).convert("RGB") if isinstance(image, str) else original(image)

    with attribute(case.processor.image_processor, "fetch_images", fetch):
        yield


@fault(
    "vision-patches-of-another-size",
    "The processor merges and cuts as another family does: its frames per patch are not the tower's.",
    target="processor",
    check="image_preprocessing",
    expected_words=("the processor's temporal_patch_size is 1, the vision tower's 2",),
    silent=False,
)
def _frames(case: Case) -> Iterator[None]:
    with image_processor_set(case, temporal_patch_size=1):
        yield
