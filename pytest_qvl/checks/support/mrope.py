"""M-RoPE position ids from the definition in the papers, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.placeholders import attended, show_grid
from pytest_qvl.evidence import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch


Position = tuple[int, int, int]


@dataclass(frozen=True)
class VisionIds:
    """Token ids of the placeholders.

    Attributes:
        image: ``<|image_pad|>``.
        video: ``<|video_pad|>``.
    """

    image: int
    video: int


def mrope_oracle(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    grids: torch.Tensor | Sequence[Sequence[int]] | None,
    ids: VisionIds,
    merge_size: int,
    *,
    video_grids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    seconds_per_grid: Sequence[float] | None = None,
    tokens_per_second: float | None = None,
) -> torch.Tensor:
    """M-RoPE position ids, token by token, from the papers' definition and from nothing else.

    - Text: the same id on all three axes, growing by one per token.
    - Image: one temporal id for all its visual tokens; height and width ids are the token's row and column.
    - Video: as an image, with the temporal id growing per temporal patch: by one (Qwen2-VL), or with
      absolute time, by ``seconds_per_grid * tokens_per_second``, rounded down each time (Qwen2.5-VL). Products are
      float32, as processors write the seconds: at 25 frames per second a temporal patch lasts 0.08 s, which is a little
      more than its float32, and the 25th starts at 2 s all the same.
    - Each modality starts at the largest id before it, on any axis, plus one.

    Sources: Qwen2-VL, arXiv:2409.12191, section 2.1 "Multimodal Rotary Position Embedding"; Qwen2.5-VL,
    arXiv:2502.13923, section 2.1.2 "Multimodal Rotary Position Embedding Aligned to Absolute Time".

    Args:
        input_ids: ``(rows, length)`` int64, placeholders expanded.
        attention_mask: ``(rows, length)``, 0 on padding, which has no position; None for no padding.
        grids: ``(images, 3)``: frames, rows, columns in patches, for the images of all rows in reading
            order.
        ids: The placeholders.
        merge_size: Patches per visual token along each side.
        video_grids: As ``grids``, for videos.
        seconds_per_grid: Seconds between temporal patches of each video; 1 for all if None.
        tokens_per_second: Temporal ids per second; None where time is counted in temporal patches.

    Returns:
        ``(3, rows, length)`` int64 on the CPU: t, h, w. Padding holds 0.

    Raises:
        ValueError: Placeholders and grids do not fit each other; names the row and the token.
    """
    import torch

    images = _Grids("image", _rows(grids), None, 1)
    videos = _Grids("video", _rows(video_grids), seconds_per_grid, tokens_per_second)
    positions = torch.zeros(3, *input_ids.shape, dtype=torch.int64)
    mask = attended({"input_ids": input_ids, "attention_mask": attention_mask}).cpu()
    for row, tokens in enumerate(input_ids.cpu()):
        kept = tokens[mask[row]].tolist()
        places = list(_row_positions(row, kept, {ids.image: images, ids.video: videos}, merge_size))
        positions[:, row, mask[row]] = torch.tensor(places, dtype=torch.int64).reshape(-1, 3).T
    for left in (images, videos):
        if left.used < len(left.grids):
            raise InputError(f"{left.kind} {left.used} has a grid but no placeholders")
    return positions


@dataclass
class _Grids:
    """The grids of one kind, dealt out in reading order."""

    kind: str
    grids: list[list[int]]
    seconds: Sequence[float] | None
    ids_per_second: float | None
    used: int = 0

    def take(self, where: str) -> tuple[list[int], list[int]]:
        """The next grid, and the temporal id of each temporal patch, from 0."""
        import torch

        if self.used == len(self.grids):
            raise InputError(f"{where}: a placeholder, but all {self.used} {self.kind} grids are used up")
        grid = self.grids[self.used]
        seconds = 1.0 if self.seconds is None else float(self.seconds[self.used])
        self.used += 1
        step = 1.0 if self.ids_per_second is None else seconds * self.ids_per_second
        times = torch.arange(grid[0], dtype=torch.float32) * torch.tensor(step, dtype=torch.float32)
        return grid, [int(time) for time in times.floor()]


def _rows(grids: torch.Tensor | Sequence[Sequence[int]] | None) -> list[list[int]]:
    return [] if grids is None else [[int(n) for n in grid] for grid in grids]


def _row_positions(row: int, tokens: Sequence[int], kinds: Mapping[int, _Grids], merge_size: int) -> Iterator[Position]:
    place, start = 0, 0
    while place < len(tokens):
        kind = kinds.get(tokens[place])
        if kind is None:
            yield start, start, start
            place, start = place + 1, start + 1
            continue
        where = f"row {row}, token {place} (padding not counted)"
        (frames, height, width), times = kind.take(where)
        size = frames * (height // merge_size) * (width // merge_size)
        if [*tokens[place : place + size]] != [tokens[place]] * size:
            raise InputError(
                f"{where}: grid {show_grid((frames, height, width))} makes {size} visual tokens, "
                "but there are fewer placeholders in a row"
            )
        largest = start
        for frame in range(frames):
            for line in range(height // merge_size):
                for column in range(width // merge_size):
                    position = (start + times[frame], start + line, start + column)
                    largest = max(largest, *position)
                    yield position
        place, start = place + size, largest + 1
