"""What bitsandbytes saves beside a 4-bit weight, read from headers and from a few bytes of JSON per weight."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_qvl.models.renamed import in_todays_layout
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.preflight.files.headers import Tensor
from pytest_qvl.preflight.findings import neutral
from pytest_qvl.preflight.refusals import UnsafeFileError

STATE = ".quant_state.bitsandbytes__"
STATE_LIMIT = 4096  # bytes; real ones have some 170
STATISTICS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_STATISTIC = re.compile(rf"\.weight\.({'|'.join(STATISTICS)})$")
# Why packed weights have no quantization_config.
CONFIGURATION_LOST = "it was lost when the folder was copied or edited, and Transformers takes packed bytes for weights"
CODES = {"quant_map": 16, "nested_quant_map": 256}


@dataclass(frozen=True)
class Packed:
    """One 4-bit weight as it is stored.

    Attributes:
        module: The module it belongs to, as the installed Transformers names it.
        kind: ``"nf4"`` or ``"fp4"``, by the name of its state.
        weight: The packed data; ``None`` if the file lacks it.
        parts: What is saved beside it: ``absmax``, ``quant_map``, and with double quantization ``nested_absmax`` and
            ``nested_quant_map``.
        state: What bitsandbytes keeps as JSON.
    """

    module: str
    kind: str
    weight: Tensor | None
    parts: Mapping[str, Tensor]
    state: Mapping[str, Any]

    @property
    def nested(self) -> bool:
        """Whether its statistics are quantized too."""
        return "nested_blocksize" in self.state or "nested_absmax" in self.parts

    def faults(self, shape: tuple[int, ...] | None) -> Iterator[str]:
        """What of it does not fit together, in a few words each.

        Args:
            shape: Of the weight in the model; ``None`` if the model has no such module.
        """
        if self.weight is None:
            yield "its packed data are missing"
            return
        stored = self.state.get("shape")
        if shape is not None and stored != list(shape):
            yield f"its state says shape {neutral(stored, 60)}, the model {list(shape)}"
        count = math.prod(stored) if isinstance(stored, list) and all(isinstance(n, int) for n in stored) else 0
        if 2 * self.weight.nbytes != count:
            yield f"{self.weight.nbytes:,} bytes of data are not {count:,} weights of 4 bits"
        if self.state.get("quant_type") != self.kind:
            yield f"its state says {neutral(repr(self.state.get('quant_type')), 40)} and is named {self.kind}"
        yield from self._statistics(count)

    def _statistics(self, count: int) -> Iterator[str]:
        blocksize = self.state.get("blocksize")
        if not isinstance(blocksize, int) or blocksize <= 0:
            yield f"its block size is {neutral(repr(blocksize), 40)}"
            return
        blocks = math.ceil(count / blocksize)
        wanted = {"absmax": blocks, "quant_map": CODES["quant_map"]}
        if self.nested:
            outer = self.state.get("nested_blocksize")
            wanted["nested_quant_map"] = CODES["nested_quant_map"]
            wanted["nested_absmax"] = math.ceil(blocks / outer) if isinstance(outer, int) and outer > 0 else 0
        for name, size in wanted.items():
            if name not in self.parts:
                yield f"its {name} is missing"
            elif self.parts[name].numel != size:
                yield f"its {name} has {self.parts[name].numel:,} entries and not {size:,}"
        dtypes = dict.fromkeys(wanted, "F32") | ({"absmax": "U8"} if self.nested else {})
        for name, dtype in dtypes.items():
            if name in self.parts and self.parts[name].dtype != dtype:
                yield f"its {name} is {self.parts[name].dtype} and not {dtype}"


def packed_weights(tensors: Mapping[str, Tensor], *, with_states: bool = True) -> dict[str, Packed]:
    """Every 4-bit weight of a checkpoint that has a state, by module.

    Args:
        tensors: By the names in its files.
        with_states: Whether to read the states; they are data, which are not at hand where only headers are.

    Raises:
        UnsafeFileError: A state is larger than any real one.
        ModelSourceError: A state is no JSON.
    """
    found = {}
    for name, tensor in tensors.items():
        weight, mark, kind = name.partition(STATE)
        if mark:
            parts = {part: tensors[f"{weight}.{part}"] for part in STATISTICS if f"{weight}.{part}" in tensors}
            module = in_todays_layout(weight).removesuffix(".weight")
            found[module] = Packed(module, kind, tensors.get(weight), parts, _read(tensor) if with_states else {})
    return found


def without_state(tensors: Mapping[str, Tensor]) -> list[str]:
    """Modules whose weight has statistics of 4 bits beside it, or is packed, and no state."""
    states = {name.partition(STATE)[0] for name in tensors if STATE in name}
    weights = {f"{name[: found.start()]}.weight" for name in tensors if (found := _STATISTIC.search(name))}
    weights |= {
        name for name, t in tensors.items() if name.endswith(".weight") and t.dtype == "U8" and t.shape[1:] == (1,)
    }
    return sorted(in_todays_layout(name).removesuffix(".weight") for name in weights - states)


def _read(tensor: Tensor) -> dict[str, Any]:
    if tensor.nbytes > STATE_LIMIT:
        raise UnsafeFileError(f"{neutral(tensor.name, 200)} has {tensor.nbytes:,} bytes; it is not read")
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        content = stream.read(tensor.nbytes)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelSourceError(f"{neutral(tensor.name, 200)} is no JSON object: download or quantize the base again")
    return found
