"""What each public fixture has to give, for overrides: one table, and how to judge a value by it.

Nothing is imported to judge a value: its class is recognised by its name, and what other packages make
(processors, optimizers) by the attributes that the checks use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_qvl.options import COMPUTE_DTYPES, SETTINGS

# Says what is wrong with a value as the end of "the fixture gives ..."; empty if nothing is.
Problem = Callable[[Any], str]
DTYPES = tuple(name for name in COMPUTE_DTYPES if name != "auto")


@dataclass(frozen=True)
class Expected:
    """What one fixture has to give.

    Attributes:
        words: The end of "it has to give ...".
        problem: Judges a value.
        none: Whether ``None`` is an answer.
        as_flag: Whether text is read as the flag of the same name reads it.
    """

    words: str
    problem: Problem
    none: bool = False
    as_flag: bool = False


def _kind(value: Any) -> str:
    """A value in a sentence: ``None``, or what type it is of."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def _is_of(value: Any, name: str) -> bool:
    return any(each.__name__ == name and each.__module__.startswith("pytest_qvl.") for each in type(value).__mro__)


def _instance(name: str) -> Problem:
    return lambda value: "" if _is_of(value, name) else _kind(value)


def _with(*attributes: str, call: bool = False) -> Problem:
    """Of what another package makes: an object (not a class) with these attributes, callable if `call`."""

    def problem(value: Any) -> str:
        if isinstance(value, type):
            return f"the class {value.__name__}"
        missing = [name for name in attributes if not hasattr(value, name)]
        if missing:
            return _kind(value) if value is None else f"{_kind(value)}, without {', '.join(missing)}"
        return "" if not call or callable(value) else f"{_kind(value)}, which cannot be called"

    return problem


def _callable(value: Any) -> str:
    return "" if callable(value) else _kind(value)


def _trainer(value: Any) -> str:
    """A function, or what has what is asked of a ``transformers.Trainer``."""
    if callable(value) and not isinstance(value, type):
        return ""
    return _with("args", "get_batch_samples", "training_step")(value)


def _whole(value: Any) -> str:
    return "" if isinstance(value, int) and not isinstance(value, bool) else _kind(value)


def _dtype(value: Any) -> str:
    if isinstance(value, str):
        return "" if value in DTYPES else repr(value)
    return _kind(value)


def _samples(value: Any) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return _kind(value)
    if not value:
        return f"an empty {type(value).__name__}"
    for number, sample in enumerate(value):
        if not _is_of(sample, "Sample"):
            return f"a {type(value).__name__} with {_kind(sample)} at index {number}"
    return ""


def _rows(value: Any) -> str:
    """What a data loader can take rows of by number."""
    if isinstance(value, str | bytes) or not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
        return _kind(value)
    return "" if len(value) else f"an empty {type(value).__name__}"


# Not here: `qvl_model`, `qvl_backend`, `qvl_quantization_config`, `qvl_lora_config`, `qvl_adapter` and the two models,
# of which whoever loads, attaches or looks at them says more than a type could.
EXPECTED = {
    "qvl_target": Expected("the value of the fixture that it overrides, or request.param of it", _instance("Target")),
    "qvl_compute_dtype": Expected(f"the name of a dtype, one of {', '.join(DTYPES)}", _dtype),
    "qvl_processor": Expected(
        "a processor with tokenizer, image_processor and apply_chat_template, as AutoProcessor.from_pretrained does",
        _with("tokenizer", "image_processor", "apply_chat_template", call=True),
    ),
    "qvl_batch": Expected(
        "a function: qvl_batch(samples, padding_side='left', answers=False) returns a mapping from names to tensors",
        _callable,
    ),
    "qvl_training_batch": Expected(
        "a function: qvl_training_batch(samples) returns a mapping from names to tensors, labels among them", _callable
    ),
    "qvl_dataset": Expected(
        "rows of your data with len() and indices, such as a datasets.Dataset or a list, at least one", _rows
    ),
    "qvl_collator": Expected(
        "a function from a list of rows of qvl_dataset to a mapping from names to tensors, such as a data collator",
        _callable,
    ),
    "qvl_probe_sizes": Expected(
        "a pytest_qvl.samples.ProbeSizes, as pytest_qvl.samples.probe_sizes does", _instance("ProbeSizes")
    ),
    "qvl_image_samples": Expected(
        "a list of pytest_qvl.samples.Sample, at least one, as pytest_qvl.samples.folder_samples does", _samples
    ),
    "qvl_reference": Expected(
        "a pytest_qvl.checks.Reference, as pytest_qvl.checks.record_reference does", _instance("Reference")
    ),
    "qvl_adapter_policy": Expected(
        "a pytest_qvl.checks.AdapterPolicy, or its text, such as 'language, vision, merger:full'",
        _instance("AdapterPolicy"),
        as_flag=True,
    ),
    "qvl_quantized_layers": Expected(
        "a pytest_qvl.checks.QuantizedLayers, or its text, such as 'language, in_proj_a:16bit'",
        _instance("QuantizedLayers"),
        as_flag=True,
    ),
    "qvl_make_optimizer": Expected(
        "a function from the list of trainable parameters to an optimizer, or None", _callable, none=True
    ),
    "qvl_optimizer": Expected("an optimizer over qvl_lora_model, or None", _with("param_groups", "step"), none=True),
    "qvl_trainer": Expected(
        "a transformers.Trainer over qvl_lora_model, a function of the model and a list of micro-batches, or None",
        _trainer,
        none=True,
    ),
    "qvl_vram": Expected("the value of the fixture that it overrides, a meter with phase(name)", _with("phase")),
    "qvl_card": Expected(
        "a pytest_qvl.vram.cards.Card, its name, such as 't4', or None", _instance("Card"), none=True, as_flag=True
    ),
    "qvl_vram_limit": Expected("a number of bytes, a size, such as '15 GiB', or None", _whole, none=True, as_flag=True),
}


def judged(name: str, value: Any) -> tuple[Any, str]:
    """The value that a fixture of this name stands for, and what is wrong with it, if anything is.

    Text is read as the flag of the same name reads it, where that is what it can only mean.

    Args:
        name: A fixture's name; one that is not in the table is never wrong.
        value: What it gave.

    Returns:
        The value, and the rest of the sentence "the fixture gives ..."; ``""`` where nothing is wrong.
    """
    expected = EXPECTED.get(name)
    if expected is None or (value is None and expected.none):
        return value, ""
    if expected.as_flag and isinstance(value, str):
        setting = next(each for each in SETTINGS if each.name == name)
        try:
            value = setting.parse(value, Path.cwd())
        except ValueError as error:
            return value, f"{value!r} ({error}); it has to give {expected.words}"
    problem = expected.problem(value)
    return value, f"{problem}; it has to give {expected.words}" if problem else ""
