"""Question 5: whether the base's own values are numbers, and its weights not empty, by a sample of every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_qvl.models.renamed import in_todays_layout
from pytest_qvl.preflight.commands import red
from pytest_qvl.preflight.files.values import FLOATS, read_runs
from pytest_qvl.preflight.findings import Finding, some
from pytest_qvl.preflight.timing import one_thread

if TYPE_CHECKING:
    from pytest_qvl.preflight.files.headers import Tensor
    from pytest_qvl.preflight.subject import Subject

NUMBER = 5
_red = partial(red, NUMBER)
# Runs of elements of each tensor, evenly from its first to its last; a smaller one is read whole.
RUNS, LENGTH = 4, 4096


def values(subject: Subject) -> Iterator[Finding]:
    """NaN and infinity in any tensor, and weights of which every value that was looked at is 0.

    A bias may be 0; a weight, also a norm's, makes whatever goes through it 0 then.
    """
    broken, empty, looked = [], [], 0
    with one_thread():
        for name, tensor in subject.base.tensors.items():
            if tensor.dtype in FLOATS and tensor.numel:
                count, finite, zero = _sampled(tensor)
                looked += count
                broken += [] if finite else [in_todays_layout(name)]
                empty += [in_todays_layout(name)] if zero and name.endswith(".weight") else []
    if broken:
        yield _red(
            subject, "base-not-finite",
            f"{len(broken)} tensors of the base hold NaN or infinity ({subject.by_group(broken)}): {some(broken)}",
            cause="a training that diverged was saved, or values were cast to a dtype that does not hold them",
            fix="download the base again; a checkpoint of your own: take one from before",
        )  # fmt: skip
    if empty:
        yield _red(
            subject, "base-zero",
            f"{len(empty)} weights of the base are 0 wherever they were looked at ({subject.by_group(empty)}): "
            f"{some(empty)}",
            cause="they were saved without their values (a sharded save that gathered nothing, a placeholder)",
            fix="download the base again, or save it again with its weights gathered",
        )  # fmt: skip
    if looked and not (broken or empty):
        yield Finding(
            NUMBER, "base-values", "green", f"no NaN, infinity or weight of zeros among {looked:,} values of the base"
        )


def _sampled(tensor: Tensor) -> tuple[int, bool, bool]:
    """How many values were looked at, whether all are finite, whether all are 0."""
    import torch

    runs = [(0, tensor.numel)]
    if tensor.numel > RUNS * LENGTH:
        step = (tensor.numel - LENGTH) // (RUNS - 1)
        runs = [(i * step, i * step + LENGTH) for i in range(RUNS)]
    found = torch.cat(read_runs(tensor, runs))
    low, high = torch.aminmax(found)
    return found.numel(), bool(torch.isfinite(low) & torch.isfinite(high)), bool((low == 0) & (high == 0))
