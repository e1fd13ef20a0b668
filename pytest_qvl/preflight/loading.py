"""What the installed PEFT makes of the adapter's file on the model without data: the real load, of mapped memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_qvl.models.attaching import why_not_attached
from pytest_qvl.preflight import naming
from pytest_qvl.preflight.adapter import Adapter
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.timing import patience

if TYPE_CHECKING:
    from pytest_qvl.preflight.subject import Subject


class Part(NamedTuple):
    """What one tensor of an adapter is for.

    Attributes:
        module: The module's name.
        matrix: Which matrix of its adapter, such as ``"lora_A"``; ``""`` for a trained copy of the module.
        is_bias: Whether it is the bias of that and not the weight.
    """

    module: str
    matrix: str
    is_bias: bool = False


@dataclass(frozen=True)
class Loaded:
    """The keys of an adapter's file against what PEFT expects and what it did.

    Attributes:
        keys: Every key, by its text.
        places: The module that each key means; ``""`` for none of this model.
        layouts: The layout of each key's name, of :data:`~pytest_qvl.preflight.naming.LAYOUTS`.
        shapes: Shape of each key's tensor.
        wanted: Shape of every part that PEFT expects of this configuration, as it would save it.
        missing: Parts that PEFT left as they were initialised.
        unexpected: Keys that PEFT had no place for, as PEFT writes them.
        error: Why PEFT did not load the file at all; empty if it did.
    """

    keys: Mapping[str, naming.Key]
    places: Mapping[str, str]
    layouts: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    wanted: Mapping[Part, tuple[int, ...]]
    missing: frozenset[Part]
    unexpected: tuple[str, ...]
    error: str = ""

    @cached_property
    def held(self) -> dict[Part, str]:
        """Every part of the file: its key."""
        return {
            Part(self.places[text], key.part, key.is_bias): text for text, key in self.keys.items() if self.places[text]
        }


def load(subject: Subject) -> Loaded:
    """Load the file as ``PeftModel.from_pretrained`` does, and say what landed.

    Raises:
        ValueError: PEFT does not even put such an adapter on the model.
    """
    adapter = subject.adapter
    assert adapter is not None
    model = subject.adapted
    wanted = _wanted(model)
    placed = subject.placed
    missing, unexpected, error = _real_load(subject, model, adapter)
    return Loaded(
        {text: each.key for text, each in placed.items()},
        {text: each.module for text, each in placed.items()},
        {text: each.layout for text, each in placed.items()},
        {text: tensor.shape for text, tensor in adapter.tensors.items()},
        wanted,
        frozenset(wanted) if error else frozenset(map(_part, missing)),
        unexpected,
        error,
    )


def _part(text: str) -> Part:
    key = naming.parse(text)
    return Part(key.module, key.part, key.is_bias)


def _wanted(model: Any) -> dict[Part, tuple[int, ...]]:
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {_part(text): tuple(tensor.shape) for text, tensor in state.items()}


def _real_load(subject: Subject, model: Any, adapter: Adapter) -> tuple[list[str], tuple[str, ...], str]:
    base = model.get_base_model()
    try:
        with warnings.catch_warnings(), patience("the load of the adapter"):
            warnings.simplefilter("ignore")
            result = model.load_adapter(
                str(adapter.folder),
                "default",
                torch_device="cpu",
                low_cpu_mem_usage=True,
                ignore_mismatched_sizes=True,
                key_mapping=getattr(base, "_checkpoint_conversion_mapping", {}),
            )
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        return [], (), neutral(why_not_attached(error, subject.lora, str(adapter.folder)), 400)
    # Keys of the adapter only: the base model's own parameters are never in its file.
    return list(result.missing_keys), tuple(result.unexpected_keys), ""
