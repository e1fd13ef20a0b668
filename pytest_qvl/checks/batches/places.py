"""``position_ids`` of the batch's own, packed rows, and the time of videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.mrope import VisionIds, mrope_oracle
from pytest_qvl.checks.support.packing import TEXT_FIRST, tokens_of_samples
from pytest_qvl.checks.support.placeholders import seconds_per_grid, visual_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_qvl.checks.batches.facts import Facts, View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.layout import Layout
    from pytest_qvl.checks.support.placeholders import Grid

AXES = ("t", "h", "w")
# What keeps the samples of a packed row apart.
PARTED = (
    "position_ids (4, rows, length) with the text positions first, no attention_mask and use_cache=False, cu_seq_lens, "
    "or a block-diagonal mask"
)


def judge_time(view: View, findings: Findings, videos: Layout) -> list[float] | None:
    """Seconds between temporal patches of each video, where positions are made of them; None without."""
    if not videos.grids or view.known.tokens_per_second is None:
        return None
    seconds = seconds_per_grid(view.batch)
    if seconds is not None and len(seconds) == len(videos.grids) and all(each > 0 for each in seconds):
        return seconds
    found = "no second_per_grid_ts" if seconds is None else f"second_per_grid_ts of {seconds}"
    findings.add(
        "video-time",
        None,
        None,
        found=f"{found} for {len(videos.grids)} videos",
        expected="seconds between two temporal patches of each video: temporal_patch_size / fps",
        cause="the collator dropped or cut it: Qwen2.5-VL then counts one second for each patch, whatever the fps",
    )
    return None


def judge_positions(
    view: View, findings: Findings, images: Layout, videos: Layout, seconds: Sequence[float] | None
) -> None:
    """Positions that the batch brings equal the papers' definition, each sample's by itself, up to a constant."""
    given = view.batch.get("position_ids")
    if given is None:
        return
    if not (images.sound and videos.sound):
        findings.unjudged["position_ids"] = "placeholders and grids do not fit each other"
        return
    if given.ndim == 2 and findings.has("packed-not-separated"):
        return
    axes = _axes(view, findings, given)
    if axes is None:
        return
    own = tokens_of_samples(view.segments, view.mask & view.text)
    if not own:
        findings.unjudged["position_ids"] = "no row attends to a token"
        return
    expected = _expected(view, images, videos, seconds, own)
    findings.judged["position ids"] += 3 * int(sum(int(mask.sum()) for _, mask in own))
    for piece, (row, mask) in enumerate(own):
        sample = _Sample(row, mask.nonzero().flatten(), axes[:, row, mask].long(), expected[:, piece, mask])
        difference = sample.axes - sample.expected
        wrong = (difference != difference[0, 0]).any(dim=0)
        if bool(wrong.any()):
            _say(view, findings, sample, wrong)


def _axes(view: View, findings: Findings, given: torch.Tensor) -> torch.Tensor | None:
    """The three axes ``(3, rows, length)`` of what the batch brings."""
    axes = given.cpu()
    shape = tuple(view.ids.shape)
    axes = axes[None] if axes.ndim == 2 else axes
    if axes.ndim != 3 or axes.shape[0] not in (1, 3, TEXT_FIRST) or tuple(axes.shape[1:]) != shape:
        findings.add(
            "positions-apart",
            None,
            None,
            found=f"position_ids of shape {tuple(given.shape)}",
            expected=f"(3, {shape[0]}, {shape[1]}), or 4 with the text positions first",
            cause="they were padded, cut or stacked along another axis than the ids",
        )
        return None
    return axes[1:] if axes.shape[0] == TEXT_FIRST else axes.expand(3, *shape)


def _expected(
    view: View,
    images: Layout,
    videos: Layout,
    seconds: Sequence[float] | None,
    own: Sequence[tuple[int, torch.Tensor]],
) -> torch.Tensor:
    """The oracle's ids ``(3, samples, length)`` of samples, each given by its row and its tokens."""
    image_grids, video_grids = (
        [layout.grids[number] for number in _seen(view, layout, own)] for layout in (images, videos)
    )
    if seconds is not None:
        seconds = [seconds[number] for number in _seen(view, videos, own)]
    return positions_of_samples(
        view.known, view.ids, own, image_grids=image_grids, video_grids=video_grids, seconds=seconds
    )


def positions_of_samples(
    known: Facts,
    ids: torch.Tensor,
    own: Sequence[tuple[int, torch.Tensor]],
    *,
    image_grids: Sequence[Grid],
    video_grids: Sequence[Grid],
    seconds: Sequence[float] | None,
) -> torch.Tensor:
    """The oracle's ids of samples, each by itself, as a model of these facts lays videos out.

    Args:
        known: Of the model.
        ids: ``(rows, length)`` int64 on the CPU.
        own: Row of each sample and its tokens ``(length,)`` bool; at least one.
        image_grids: Of the images of all samples, in reading order.
        video_grids: As ``image_grids``, of the videos.
        seconds: Between temporal patches of each video, read where positions are made of them; 1 for all if None.

    Returns:
        ``(3, samples, length)`` int64 on the CPU. What belongs to no sample holds 0.
    """
    import torch

    if known.frames_apart:
        video_grids = [(1, h, w) for t, h, w in video_grids for _ in range(t)]
    # Each sample on a row of its own; what belongs to others is padding there.
    return mrope_oracle(
        ids[[row for row, _ in own]],
        torch.stack([tokens for _, tokens in own]),
        image_grids,
        VisionIds(known.image, known.video),
        known.merge,
        video_grids=video_grids,
        seconds_per_grid=None if known.tokens_per_second is None else seconds,
        tokens_per_second=known.tokens_per_second,
    )


def _seen(view: View, layout: Layout, own: Sequence[tuple[int, torch.Tensor]]) -> list[int]:
    """Numbers of the images (videos) that stand in a sample.

    The others are dummies that no row attends to (LLaMA-Factory appends one to a batch of text): they have no position.
    """
    import torch

    shown = torch.zeros(view.ids.shape, dtype=torch.bool)
    for row, mask in own:
        shown[row] |= mask
    places = (view.ids == layout.kind.placeholder).nonzero()
    sizes = [visual_tokens(grid, view.known.merge) for grid in layout.grids]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]  # sound: as many placeholders as the sizes add up to
    return [number for number, start in enumerate(starts) if bool(shown[tuple(places[start])])]


@dataclass(frozen=True)
class _Sample:
    """The positions of one sample: where its tokens are, those of the batch, and the right ones up to a constant."""

    row: int
    places: torch.Tensor
    axes: torch.Tensor
    expected: torch.Tensor


def _say(view: View, findings: Findings, sample: _Sample, wrong: torch.Tensor) -> None:
    axes, expected = sample.axes, sample.expected
    at = int(wrong.nonzero()[0])
    plain = bool((axes == axes[:1]).all())
    cause = "they were made for another batch, order of images or padding: leave them out, the model makes them itself"
    if plain and not view.is_packed:
        cause = "plain 1-D positions: get_rope_index was not called (it needs grids and mm_token_type_ids)"
    elif _constant(axes - _inside_of_videos(view, sample)):
        cause = (
            "Transformers since 5.3 makes them so for Qwen2-VL and Qwen2.5-VL: behind a video that lasts longer than "
            "its frames are wide, positions inside of it come again; bring those of the papers, or shorter videos"
        )
    elif view.is_packed:
        cause = "positions of a packed row were made for the row as a whole: make them sample by sample, then join them"
    shift = axes[0, 0] - expected[0, 0]
    shown = ", ".join(f"{axis} {int(a)}" for axis, a in zip(AXES, axes[:, at] - shift, strict=True))
    right = ", ".join(f"{axis} {int(a)}" for axis, a in zip(AXES, expected[:, at], strict=True))
    findings.add(
        "packed-apart" if view.is_packed else "positions-apart",
        sample.row,
        int(sample.places[at]),
        found=f"position {shown}, {int(wrong.sum())} of {len(wrong)} tokens wrong",
        expected=f"{right} (up to a constant for the sample)",
        cause=cause,
    )


def _constant(differences: torch.Tensor) -> bool:
    return bool((differences == differences[0, 0]).all())


def _inside_of_videos(view: View, sample: _Sample) -> torch.Tensor:
    """The positions of a sample as Transformers since 5.3 lays them out.

    Behind a video it goes on by the visual tokens of the frame's longer side, and not by the video's own length where
    that is more (docs/upstream/video-positions.md).
    """
    made = sample.expected.clone()
    video = view.ids[sample.row, sample.places] == view.known.video
    numbers = (video.int().diff(prepend=video.new_zeros(1).int()) == 1).cumsum(dim=0)
    for number in range(1, int(numbers.max()) + 1):
        last = int((video & (numbers == number)).nonzero().max())
        spans = sample.expected[:, video & (numbers == number)]
        long, *sides = (spans.amax(dim=1) - spans.amin(dim=1)).tolist()
        made[:, last + 1 :] -= max(0, long - max(sides))
    return made


def judge_packing(view: View, findings: Findings) -> None:
    """Samples that are packed into a row are parted for attention: by text positions, a mask or lengths."""
    if not view.is_packed:
        return
    findings.judged["packed samples"] += int((view.segments.amax(dim=1) + 1).sum())
    if view.parted_by == "positions" and not _text_first(view):
        row, token = next((row, min(starts)) for row, starts in enumerate(view.starts) if starts)
        findings.add(
            "packed-not-separated",
            row,
            token,
            found=f"a second sample in the row, and nothing that parts attention ({brings(view)})",
            expected=PARTED,
            cause="position_ids (rows, length) and (3, rows, length) part nothing in a model with M-RoPE: each sample "
            "attends to those before it in its row",
        )


def _text_first(view: View) -> bool:
    """Whether Transformers parts the row by its own positions: text positions first, and no mask beside them."""
    given = view.batch["position_ids"]
    mask: Any = view.batch.get("attention_mask")
    if "text_position_ids" in view.batch:
        return mask is None
    return given.ndim == 3 and given.shape[0] == TEXT_FIRST and mask is None


def brings(view: View) -> str:
    """What there is in the batch that could part a packed row, by name and shape."""
    names = ("position_ids", "text_position_ids", "attention_mask", "cu_seq_lens_q")
    return ", ".join(f"{name} {tuple(view.batch[name].shape)}" for name in names if name in view.batch)
