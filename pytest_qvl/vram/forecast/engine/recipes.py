"""How a model is quantized and adapted, read from the configurations that a user gives or from a loaded model."""

from __future__ import annotations

import sys
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

from pytest_qvl.models.adapters import active_adapters, adapter_parameters
from pytest_qvl.models.anatomy import Parts, anatomy
from pytest_qvl.models.quantized import linear_states
from pytest_qvl.vram.forecast.engine.build import Recipe
from pytest_qvl.vram.forecast.request import DTYPES, Request
from pytest_qvl.vram.forecast.source import Source, source_of

if TYPE_CHECKING:
    from collections.abc import Iterator

# What ``LoraConfig`` can ask for that the forecast does not follow, with the value that does not ask for it.
_NOT_FOLLOWED: dict[str, Any] = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
}


class NotFollowed(ValueError):
    """A configuration that the forecast knows nothing about; the message names it."""


def recipe_from_configs(config: Any, quantization_config: Any, lora_config: Any) -> Recipe:
    """The recipe that a loader would follow.

    Which linears are quantized is decided by Transformers' own quantizer on a model without memory.

    Args:
        config: The model's Transformers configuration.
        quantization_config: A ``transformers.BitsAndBytesConfig`` for 4 bits.
        lora_config: A ``peft.LoraConfig``.

    Raises:
        NotFollowed: Not 4 bits, a kind of LoRA that the forecast does not follow, or Unsloth's process.
    """
    _runs_their_own_code()
    import bitsandbytes as bnb
    from transformers import AutoModelForImageTextToText
    from transformers.quantizers.auto import AutoHfQuantizer

    if not getattr(quantization_config, "load_in_4bit", False):
        raise NotFollowed("the forecast knows 4-bit models, and the quantization config does not ask for one")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(deepcopy(config), attn_implementation="sdpa")
    quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    quantized = frozenset(name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit))
    return Recipe(
        quantized=quantized,
        nested=bool(quantization_config.bnb_4bit_use_double_quant),
        lora=_followed(lora_config),
    )


def recipe_from_model(model: Any) -> tuple[Request, Source, Recipe]:
    """What would build a model like this one again, without data; images and lengths are left at their defaults.

    Args:
        model: A LoRA model.

    Raises:
        NotFollowed: Not 4 bits, no or several adapters, a kind that the forecast does not follow, or Unsloth's process.
    """
    _runs_their_own_code()
    parts = anatomy(model)
    states = [state for state in linear_states(parts) if state.is_quantized]
    if not states or not all(state.is_4bit for state in states):
        raise NotFollowed("the forecast knows 4-bit models, and this one is not quantized to 4 bits")
    compute, stored = _one({str(state.compute_dtype) for state in states}), parts.embeddings.weight.dtype
    if compute not in DTYPES:
        raise NotFollowed(f"the forecast knows models that compute in {' or '.join(DTYPES)}, not in {compute}")
    adapters = active_adapters(parts)
    if len(adapters) != 1:
        raise NotFollowed(f"the forecast knows one active adapter, and this model has {len(adapters)}")
    lora = _followed(model.peft_config[adapters[0]])
    recipe = Recipe(
        quantized=frozenset(state.name for state in states),
        nested=all(state.double_quantized for state in states),
        lora=lora,
        adapter_in_float32=all(p.dtype == torch.float32 for p in adapter_parameters(parts).values()),
    )
    request = Request(
        lora_r=lora.r,
        compute_dtype=compute,
        kbit_upcast=stored == torch.float32,
        capability=_capability(parts),
        checkpoint="nf4",
        trainer="loop",
    )
    config = deepcopy(parts.config)
    vars(config).pop("quantization_config", None)
    return request, source_of(config, parts.family), recipe


def _runs_their_own_code() -> None:
    if "unsloth" in sys.modules:
        raise NotFollowed(
            "the forecast follows Transformers' and PEFT's own code, and in this process Unsloth has put its own in "
            "place: it keeps activations in host memory, and buffers for them on the GPU"
        )


def _followed(lora_config: Any) -> Any:
    asked = [*_asks_for(lora_config)]
    if asked:
        raise NotFollowed(f"the forecast does not follow {', '.join(asked)} of the LoRA configuration")
    return lora_config


def _asks_for(lora_config: Any) -> Iterator[str]:
    kind = getattr(lora_config.peft_type, "value", lora_config.peft_type)
    if kind != "LORA":
        yield f"peft_type={kind!r}"
    for name, harmless in _NOT_FOLLOWED.items():
        value = getattr(lora_config, name, harmless)
        if value != harmless and value:
            yield f"{name}={value!r}"


def _one(names: set[str]) -> str:
    return names.pop() if len(names) == 1 else " and ".join(sorted(names))


def _capability(parts: Parts) -> tuple[int, int]:
    """Of the GPU the model is on; the default of a request elsewhere."""
    if parts.device.type == "cuda":
        return torch.cuda.get_device_capability(parts.device)
    return Request().capability
