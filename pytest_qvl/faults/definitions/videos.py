"""Videos whose frames, times or visual tokens are others than those of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.checks.support.placeholders import placeholder_runs
from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import all_of, at_tokens, attribute, before
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.taps import embeddings_changed, positions_changed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    import torch

    from pytest_qvl.faults.case import Batch, Case
    from pytest_qvl.faults.tools import Change, Through


def _at_videos(case: Case, through: Through, change: Change) -> AbstractContextManager[None]:
    """Pass what `through` sees of every prompt with a video through ``change(values, its places)``."""
    parts = anatomy(case.model)
    return at_tokens(parts, parts.video_token_id, through, change)


def _tower_given(case: Case, change: Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]]) -> Any:
    """Pass patches and grids of every call of the vision tower with a video through ``change(patches, grids)``."""
    tower = anatomy(case.model).vision_tower

    def changed(_module: Any, args: Any, kwargs: Any) -> Any:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        if not bool((grids[:, 0] > 1).any()):
            return None
        patches, grids = change(args[0], grids)
        return (patches, *args[1:]), {**kwargs, "grid_thw": grids}

    return before([tower], changed)


@fault(
    "video-at-one-time",
    "All frames of a video have the temporal id of its first.",
    target="model",
    check="mrope_positions",
    expected_words=("(video 0, visual token", "t is"),
    source="huggingface/transformers#44474, #45325",
    requires=("time of videos",),
)
def _at_one_time(case: Case) -> Iterator[None]:
    def first(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        for row, shown in enumerate(places):
            if bool(shown.any()):
                positions[0, row, shown] = positions[0, row, shown][0].clone()
        return positions

    with _at_videos(case, positions_changed, first):
        yield


@fault(
    "video-seconds-not-read",
    "The model lays every video out as one temporal patch per second, whatever second_per_grid_ts says.",
    target="model",
    check="mrope_positions",
    expected_words=("(video 0, visual token", "t is"),
    source="huggingface/transformers#48669",
    requires=("time of videos",),
)
def _seconds_not_read(case: Case) -> Iterator[None]:
    core = anatomy(case.model).core
    own = core.get_rope_index

    def plain(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "second_per_grid_ts": None})

    with attribute(core, "get_rope_index", plain):
        yield


@fault(
    "video-time-twice",
    "Frames stand behind their times in words, and are counted along the temporal axis as well.",
    target="model",
    check="mrope_positions",
    expected_words=("(video frame 1, visual token 0)", "t is"),
    source="huggingface/transformers#44474",
    requires=("times in words",),
)
def _time_twice(case: Case) -> Iterator[None]:
    def counted(positions: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        for row, shown in enumerate(places):
            starts = shown & ~shown.roll(1)
            positions[0, row, shown] += (starts.cumsum(0) - 1)[shown]
        return positions

    with _at_videos(case, positions_changed, counted):
        yield


@fault(
    "video-tokens-shifted",
    "The visual tokens of videos stand one placeholder too far on; those of images are right.",
    target="model",
    check="feature_scatter",
    expected_words=("visual token 0) holds visual token", "tokens in"),
)
def _shifted(case: Case) -> Iterator[None]:
    def shift(embeddings: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        embeddings[places] = embeddings[places].roll(1, dims=0)
        return embeddings

    with _at_videos(case, embeddings_changed, shift):
        yield


@fault(
    "video-frames-reversed",
    "The vision tower is given the frames of a video in the reverse order.",
    target="model",
    check="feature_scatter",
    expected_words=("the vision tower receives other pixels than the model was given",),
)
def _reversed(case: Case) -> Iterator[None]:
    def backwards(patches: Any, grids: Any) -> tuple[Any, Any]:
        import torch

        videos = patches.split(grids.prod(dim=1).tolist())
        frames = zip(videos, grids[:, 0].tolist(), strict=True)
        return torch.cat([video.unflatten(0, (t, -1)).flip(0).flatten(0, 1) for video, t in frames]), grids

    with _tower_given(case, backwards):
        yield


@fault(
    "video-grid-transposed",
    "The grid of a video says columns and rows: width and height of its frames were exchanged.",
    target="model",
    check="feature_scatter",
    expected_words=("the vision tower lays frame", "its grid says"),
)
def _transposed(case: Case) -> Iterator[None]:
    with _tower_given(case, lambda patches, grids: (patches, grids[:, [0, 2, 1]])):
        yield


@fault(
    "video-frame-twice",
    "The vision tower is given the first frame of a video in place of its second.",
    target="model",
    check="feature_scatter",
    expected_words=("the vision tower receives other pixels than the model was given",),
)
def _twice(case: Case) -> Iterator[None]:
    def again(patches: Any, grids: Any) -> tuple[Any, Any]:
        frame = int(grids[0, 1:].prod())
        patches = patches.clone()
        patches[frame : 2 * frame] = patches[:frame]
        return patches, grids

    with _tower_given(case, again):
        yield


@fault(
    "video-frames-attend",
    "In the vision tower all frames of a video attend to one another.",
    target="model",
    check="feature_scatter",
    expected_words=("the vision tower makes something else of visual token 0 of row 0, video", "kept apart"),
)
def _frames_attend(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    seen: dict[str, Any] = {}

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        seen["grids"] = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]

    def by_video(_module: Any, args: Any, kwargs: Any) -> Any:
        import torch

        sizes = seen["grids"].prod(dim=1)
        if not bool((seen["grids"][:, 0] > 1).any()):
            return None
        bounds = torch.nn.functional.pad(sizes.cumsum(dim=0), (1, 0)).to(kwargs["cu_seqlens"])
        longest = {"max_seqlen": int(sizes.max())} if "max_seqlen" in kwargs else {}
        return args, {**kwargs, "cu_seqlens": bounds, **longest}

    with all_of([before([parts.vision_tower], note), before(list(parts.blocks), by_video)]):
        yield


@fault(
    "video-delta-off",
    "After a prompt with a video the tokens that follow are counted from one place too far on.",
    target="model",
    check="decode_positions",
    expected_words=("rope_deltas of row", "who goes on"),
    source="huggingface/transformers#41180",
)
def _delta_off(case: Case) -> Iterator[None]:
    core = anatomy(case.model).core
    own = core.get_rope_index

    def off(*args: Any, **kwargs: Any) -> Any:
        positions, deltas = own(*args, **kwargs)
        return positions, deltas if kwargs.get("video_grid_thw") is None else deltas + 1

    with attribute(core, "get_rope_index", off):
        yield


@fault(
    "video-times-exchanged",
    "The times in words of the first two frames of every video are exchanged.",
    target="batch",
    check="batch",
    expected_words=("video-time: row 0, token", "before frame 1 of video 0, behind <", "times that go on"),
    requires=("times in words",),
)
def _times_exchanged(case: Case) -> Iterator[None]:
    tokenizer, placeholder = case.processor.tokenizer, anatomy(case.model).video_token_id

    def words(row: torch.Tensor, stop: int) -> slice:
        """The tokens of the time that ends before one."""
        length = next(n for n in range(1, stop) if tokenizer.decode(row[stop - n : stop].tolist()).startswith("<"))
        return slice(stop - length, stop)

    def exchanged(batch: Batch) -> Batch:
        ids = batch["input_ids"].clone()
        for row in ids:
            frames = [start - 1 for _, start, _ in placeholder_runs(row[None], placeholder)][:2]
            if frames:
                first, second = (words(row, stop) for stop in frames)
                row[first], row[second] = row[second].clone(), row[first].clone()
        return {**batch, "input_ids": ids}

    case.clip_collators.append(exchanged)
    yield


@fault(
    "video-times-not-repeated",
    "A template writes the time of a row's first frame only: the others follow without theirs.",
    target="batch",
    check="batch",
    expected_words=("video-time: row 0, token", "no time before frame 1 of video 0", "let the model's own processor"),
    source="Blaizzy/mlx-vlm#2142",
    requires=("times in words",),
)
def _times_not_repeated(case: Case) -> Iterator[None]:
    tokenizer, placeholder = case.processor.tokenizer, anatomy(case.model).video_token_id
    line = tokenizer.encode("\n", add_special_tokens=False)[-1]

    def once(batch: Batch) -> Batch:
        ids = batch["input_ids"].clone()
        for row in ids:
            for _, start, _ in list(placeholder_runs(row[None], placeholder))[1:]:
                stop = start - 1  # <|vision_start|>
                length = next(
                    n for n in range(1, stop) if tokenizer.decode(row[stop - n : stop].tolist()).startswith("<")
                )
                row[stop - length : stop] = line
        return {**batch, "input_ids": ids}

    case.clip_collators.append(once)
    yield
