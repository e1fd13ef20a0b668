"""Whether each vision block attends where the configuration says: within its window, or over the whole image.

No reference is needed, so a release that computes windows wrongly is seen although full precision computes them the
same way. A block is called again on noise as large as the input it had, and on the same noise with the patches of one
window negated: on the input itself, of an image of one colour, attention can rest on equal patches alone and give a
negated one a weight of exactly 0. Rows outside the window keep every bit if the block stays inside it (both calls have
the same shapes, hence the same kernels; see :mod:`pytest_qvl.checks.isolation`). That a block looks further is seen at
its attention alone: behind the residual connection a large activation can swallow what attention adds, to the last bit.
No tolerance: docs/limits.md#attention-windows.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.bitwise import differs
from pytest_qvl.samples import Sample, attention_window, make_batch, window_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from PIL.Image import Image

    from pytest_qvl.evidence import Judge
    from pytest_qvl.models.anatomy import Parts

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """An image that went through the vision tower.

    Attributes:
        name: How to call it in a message.
        image: The image.
        grid: Frames, rows and columns in patches.
    """

    name: str
    image: Image
    grid: Grid


def judge_windows(judge: Judge, parts: Parts, processor: Any, images: Sequence[Seen]) -> str | None:
    """Hold every vision block to its kind of attention, on the image with most windows.

    Changed are its first window and its last one, which is a partial one where the image does not divide into
    windows. Windows smaller than configured stay inside the configured ones and are not seen here, but by the drift
    from the reference. A family without window attention is passed over.

    Returns:
        Why windows could not be judged, or None.
    """
    window = attention_window(parts.config.vision_config)
    if window is None:
        return None
    counts = [window_count(seen.grid, parts.merge_size, window) for seen in images]
    (height, width), probed = max(zip(counts, images, strict=True), key=lambda pair: pair[0][0] * pair[0][1])
    pixels = window * parts.merge_size * parts.config.vision_config.patch_size
    judge.report("images of a single attention window", sum(count == (1, 1) for count in counts))
    judge.report("most attention windows of an image", height * width)
    if height * width == 1:
        return (
            f"each of the {len(images)} images is a single attention window ({pixels} px per side), where window "
            "attention and full attention are the same: give an image of several windows"
        )
    sample = Sample((probed.image,), "?", "!", "window", "window")
    batch = make_batch(processor, [sample], device=parts.device)
    full = set(parts.config.vision_config.fullatt_block_indexes)
    for number in (0, height * width - 1):
        again = _Again(_rows_of(parts, batch, _window_tokens(probed.grid, parts.merge_size, window, number)))
        attentions: list[Any] = [block.attn for block in parts.blocks]
        with again.watching([*parts.blocks, *attentions]):
            parts.core.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
        if again.unsteady:
            return "a vision block called twice differs bitwise: what moved cannot be told from noise"
        what = f"changing attention window {number} of {height * width} ({probed.name})"
        moved = [again.moved[id(block)] for block in parts.blocks]
        attended = [again.moved[id(attention)] for attention in attentions]
        _hold(judge, moved, attended, full, f"{what}, {pixels} px per side")
    return None


def _hold(judge: Judge, moved: list[int], attended: list[int], full: set[int], what: str) -> None:
    leaks = [block for block, rows in enumerate(moved) if block not in full and rows]
    stays = [block for block, rows in enumerate(attended) if block in full and not rows]
    judge.equal(
        "window blocks that attend outside their window",
        len(leaks),
        0,
        else_say=f"{what}, moves {moved[leaks[0]]} patches of other windows in vision block {leaks[0]}: it attends "
        f"outside its window, as do {len(leaks)} of the {len(moved) - len(full)} window blocks"
        if leaks
        else "",
    )
    judge.equal(
        "full-attention blocks that stay inside a window",
        len(stays),
        0,
        else_say=f"{what}, moves nothing outside it in vision block {stays[0]}, which attends over the whole image by "
        f"the configuration (fullatt_block_indexes): {len(stays)} such blocks stay inside a window"
        if stays
        else "",
    )


def _window_tokens(grid: Grid, merge_size: int, window: int, number: int) -> list[int]:
    """The visual tokens of one window, by their number in the image; windows are counted row by row."""
    columns = grid[2] // merge_size
    top, left = divmod(number, window_count(grid, merge_size, window)[1])
    return [
        row * columns + column
        for row in range(top * window, min((top + 1) * window, grid[1] // merge_size))
        for column in range(left * window, min((left + 1) * window, columns))
    ]


class _Reached(Exception):
    """The first block was reached; nothing after it is of interest."""


def _rows_of(parts: Parts, batch: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Which rows of the blocks' input are the patches of these visual tokens, ``(rows,)`` bool.

    Seen by changing their pixels, so that the order in which the tower sorts its patches does not matter.
    """
    pixels = batch["pixel_values"]
    changed = pixels.clone()
    grouped = changed.view(-1, parts.merge_size**2, pixels.shape[-1])
    grouped[tokens] = 1 - grouped[tokens]
    return differs(_first_input(parts, batch, pixels), _first_input(parts, batch, changed))


def _first_input(parts: Parts, batch: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []

    def keep(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = parts.blocks[0].register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        with suppress(_Reached):
            parts.core.get_image_features(pixels, batch["image_grid_thw"])
    finally:
        handle.remove()
    return seen[0]


@dataclass
class _Again:
    """Calls modules of the tower again on noise, then with some of its rows negated, while it runs.

    Attributes:
        changed: ``(rows,)`` bool, the rows to negate.
        moved: By the module's id, how many other rows of its output moved.
        unsteady: Whether some module gives something else when it is called on the same input.
    """

    changed: torch.Tensor
    moved: dict[int, int] = field(default_factory=dict)
    unsteady: bool = False
    _drawn: dict[torch.Size, torch.Tensor] = field(default_factory=dict)
    _given: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _inside: bool = False

    @contextmanager
    def watching(self, modules: Sequence[Any]) -> Iterator[None]:
        """Look at every one of the modules that runs inside the ``with`` block."""

        def before(module: Any, args: Any, kwargs: Any) -> None:
            if not self._inside:
                self._given[id(module)] = args, kwargs

        def after(module: Any, _args: Any, _output: Any) -> None:
            if not self._inside:
                self._compare(module)

        handles = []
        for module in modules:
            # Ahead of all other hooks, which see and change each of the calls alike.
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, module: Any) -> None:
        import torch

        args, kwargs = self._given.pop(id(module))
        hidden = args[0] if args else kwargs["hidden_states"]
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self._inside = True
        try:
            noise = self._noise_like(hidden)
            once, twice = (_hidden(module(noise, *args[1:], **others)) for _ in range(2))
            other = _hidden(module(torch.where(self.changed[:, None], -noise, noise), *args[1:], **others))
        finally:
            self._inside = False
        self.unsteady |= bool(differs(once, twice).any())
        self.moved[id(module)] = int((differs(once, other) & ~self.changed).sum())

    def _noise_like(self, hidden: torch.Tensor) -> torch.Tensor:
        """Gaussian noise of the same shape and root mean square; drawn once, since a CPU draws millions of numbers."""
        import torch

        if hidden.shape not in self._drawn:
            drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            self._drawn[hidden.shape] = drawn.to(hidden.device)
        noise = self._drawn[hidden.shape].to(hidden.device)
        return (noise * hidden.float().pow(2).mean().sqrt()).to(hidden.dtype)


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
