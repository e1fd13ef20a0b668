"""Times in words: what stands before each frame of a video in Qwen3-VL and Qwen3.5."""

from __future__ import annotations

import math
import re
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from pytest_qvl.checks.support.placeholders import placeholder_runs

if TYPE_CHECKING:
    from pytest_qvl.checks.batches.facts import View
    from pytest_qvl.checks.batches.findings import Findings
    from pytest_qvl.checks.batches.layout import Layout

# As Qwen3VLProcessor writes it; no other text of a prompt ends so right before a frame.
_TIME = re.compile(r"<([-+]?(?:\d+(?:\.\d+)?|nan|inf)) seconds>\s*$")
_LONGEST = 32  # tokens that may spell one time, digit by digit


def judge_times(view: View, findings: Findings, videos: Layout) -> None:
    """The times before the frames of a video count from 0 on, never run backwards, and none is missing.

    The model learns when a frame was shown from these words alone: its positions say no more than the order. Equal
    times are right: they are written to a tenth of a second, and frames that were not sampled come more often than that
    (without their fps, the processor takes 24: a temporal patch lasts 1/12 s). By how much times go on is not judged
    either: which frames were sampled is not in a batch.
    """
    if not view.known.frames_apart or not videos.grids:
        return
    if not videos.sound:
        findings.unjudged["times of videos"] = "placeholders and grids do not fit each other"
        return
    runs = iter(placeholder_runs(view.ids, videos.kind.placeholder))
    without: list[tuple[int, tuple[int, int]]] = []
    for number, (frames, _, _) in enumerate(videos.grids):
        places = [(row, token) for row, token, _ in islice(runs, frames)]
        times = [_time(view, row, token) for row, token in places]
        if not any(times):
            without.append((number, places[0]))
            continue
        findings.judged["times of frames"] += frames
        _judge(findings, number, places, times)
    if len(without) == len(videos.grids):
        findings.unjudged["times of videos"] = (
            f"no frame of {len(without)} videos stands behind its time as the processor writes it (<1.2 seconds>)"
        )
        return
    for number, place in without[:1]:
        _say_missing(findings, place, f"no time before any frame of video {number}, unlike other videos of the batch")


def _time(view: View, row: int, token: int) -> str:
    """The time before the frame whose placeholders begin at a token, as it is written; empty for none."""
    stop = token - int(token > 0 and bool(view.vision[row, token - 1]))  # less <|vision_start|>
    start = stop
    while start > max(0, stop - _LONGEST) and not bool(view.vision[row, start - 1]):
        start -= 1
    found = _TIME.search(view.decoded(view.ids[row, start:stop].tolist()))
    return "" if found is None else found[1]


def _judge(findings: Findings, number: int, places: list[tuple[int, int]], times: list[str]) -> None:
    if "" in times:
        frame = times.index("")
        _say_missing(findings, places[frame], f"no time before frame {frame} of video {number}")
        return
    odd = next((frame for frame, time in enumerate(times) if not 0 <= float(time) < math.inf), None)
    if odd is not None:
        findings.add(
            "video-time",
            *places[odd],
            found=f"<{times[odd]} seconds> before frame {odd} of video {number}",
            expected="seconds from the beginning of the video, 0 or more",
            cause="the times were counted from another frame, or divided by no fps: hand frames and video_metadata on "
            "together",
        )
        return
    for frame, (before, after) in enumerate(pairwise(times), start=1):
        if float(after) < float(before):
            findings.add(
                "video-time",
                *places[frame],
                found=f"<{after} seconds> before frame {frame} of video {number}, behind <{before} seconds> of frame "
                f"{frame - 1}",
                expected="times that go on from frame to frame",
                cause="times of other frames, or of another video, were written: the list of frames or of their times "
                "was sorted, cut or exchanged after it was sampled; hand frames and video_metadata on together",
            )
            return


def _say_missing(findings: Findings, place: tuple[int, int], found: str) -> None:
    findings.add(
        "video-time",
        *place,
        found=found,
        expected="<1.2 seconds> before every frame",
        cause="a template or collator dropped it: let the model's own processor expand videos",
    )
