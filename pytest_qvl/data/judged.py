"""Rows of a data set, collated by its collator, batch by batch, and what was found of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pytest_qvl import checks
from pytest_qvl.checks.batches.findings import BatchFinding, findings_of
from pytest_qvl.checks.batches.rows import comparable, some_rows
from pytest_qvl.checks.support.sizing import sizes_for
from pytest_qvl.evidence import CannotJudge, CheckFailed, Evidence
from pytest_qvl.models.sources.hub import hub_options
from pytest_qvl.models.sources.model_source import ModelSource, parse_model
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic_processor import processor_for
from pytest_qvl.samples import Sample, make_batch, probe_samples, training_rows
from pytest_qvl.user_code import imported, said_by

SEED, PER_SKILL = 0, 1
PROCESSOR = "processor"
Collator = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Source:
    """What the command line names.

    Attributes:
        model: As for ``--qvl-model``.
        dataset: ``module:name``; None for samples of the suite.
        collator: ``module:name``; None for the suite's, which takes its samples only.
    """

    model: str
    dataset: str | None
    collator: str | None


@dataclass(frozen=True)
class Judged:
    """One batch.

    Attributes:
        rows: Numbers of its rows in the data set.
        evidence: What was measured.
    """

    rows: tuple[int, ...]
    evidence: Evidence

    @property
    def findings(self) -> tuple[BatchFinding, ...]:
        """What is wrong with it, the most telling first."""
        return findings_of(self.evidence)


def judge(source: Source, *, rows: int, per_batch: int, training: bool) -> list[Judged]:
    """Collate rows spread over a data set and judge each batch.

    Args:
        source: Model, data set and collator.
        rows: How many rows at most.
        per_batch: How many rows a batch has.
        training: Whether labels are judged; they have to be there then.

    Raises:
        ValueError: Something cannot be imported, is not what it should be, or the collator raises; one sentence.
    """
    model = parse_model(source.model)
    processor = processor_for(model)
    dataset = _dataset(source, model, processor)
    collate = _collator(source, processor, dataset)
    config = _config(model)
    judged = []
    for numbers in some_rows(range(len(dataset)), rows=rows, per_batch=per_batch):
        given = [dataset[number] for number in numbers]
        batch = _collated(source, collate, given, numbers)
        if training and "labels" not in batch:
            raise ValueError(
                f"{source.collator or 'the collator'} made a batch without labels: add them, or ask for --inference"
            )
        try:
            evidence = checks.batch(batch, processor, config, comparable(given), training=training)
        except CheckFailed as failure:
            evidence = failure.evidence
        except CannotJudge as reason:
            raise ValueError(f"rows {_listed(numbers)} cannot be judged: {reason}") from None
        judged.append(Judged(tuple(numbers), evidence))
    return judged


def _config(model: ModelSource) -> Any:
    if model.kind == "synthetic":
        return released_config(model.location)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model.location, **hub_options(model))


def _dataset(source: Source, model: ModelSource, processor: Any) -> Sequence[Any]:
    if source.dataset is None:
        sizes = sizes_for(model, processor)
        return training_rows(probe_samples(sizes, SEED, PER_SKILL), sizes)
    found = _named("--dataset", source.dataset)
    if callable(found) and not hasattr(found, "__getitem__"):
        found = _called("--dataset", source.dataset, found)
    if isinstance(found, str | bytes | Mapping) or not (hasattr(found, "__getitem__") and hasattr(found, "__len__")):
        raise ValueError(
            f"--dataset {source.dataset} gives a value of type {type(found).__name__}: rows have len() and indices, as "
            "a list or a datasets.Dataset (of a DatasetDict one split)"
        )
    if not len(found):
        raise ValueError(f"--dataset {source.dataset} has no rows")
    rows: Sequence[Any] = found
    return rows


def _collator(source: Source, processor: Any, dataset: Sequence[Any]) -> Collator:
    if source.collator is None:
        if not isinstance(dataset[0], Sample):
            raise ValueError(
                f"--collator is needed: rows of {source.dataset} are of type {type(dataset[0]).__name__}, and the "
                "suite's own collator takes pytest_qvl.samples.Sample only"
            )
        return partial(make_batch, processor, padding_side="right", answers=True)
    found = _named("--collator", source.collator)
    if not callable(found):
        raise ValueError(
            f"--collator {source.collator} is of type {type(found).__name__}: it has to be a function from a list of "
            "rows to a batch"
        )
    if PROCESSOR in _parameters(found):
        found = _called("--collator", source.collator, found, processor=processor)
    elif isinstance(found, type):
        found = _called("--collator", source.collator, found)
    if not callable(found):
        raise ValueError(
            f"--collator {source.collator} returned a value of type {type(found).__name__}: a function with an "
            "argument called processor has to return the collator"
        )
    collator: Collator = found
    return collator


def _parameters(function: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # one without a signature is a collator
        return []


def _named(flag: str, spec: str) -> Any:
    module, colon, name = spec.rpartition(":")
    if not (module and colon and name):
        raise ValueError(f"{flag} {spec!r} has no form MODULE:NAME, such as train.py:dataset or my.data:rows")
    return imported(module, name)


def _called(flag: str, spec: str, function: Any, **given: Any) -> Any:
    try:
        return function(**given)
    except Exception as error:
        raise ValueError(f"{flag} {spec} raised {said_by(error)}") from None


def _collated(source: Source, collate: Collator, given: list[Any], numbers: Sequence[int]) -> Mapping[str, Any]:
    try:
        batch: Mapping[str, Any] = collate(given)
    except Exception as error:
        raise ValueError(
            f"--collator {source.collator or 'of the suite'} raised {said_by(error)} on rows {_listed(numbers)}"
        ) from None
    if not hasattr(batch, "keys"):
        raise ValueError(
            f"--collator {source.collator} returned a value of type {type(batch).__name__}: a batch is a mapping from "
            "names to tensors"
        )
    return batch


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
