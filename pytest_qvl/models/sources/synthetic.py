"""True-size models with random weights, built straight onto the device: no download, no 16-bit copy of the whole.

Every tensor is drawn from its own seed, so one layer can be made again without the others. Linear weights are drawn
with standard deviation ``1/sqrt(in_features)``, those that write into a residual stream of depth ``n`` smaller by
``1/sqrt(2 n)`` (Radford et al. 2019, section 2.3): each layer keeps its input's scale and the stream stays of order
one, so that nothing overflows in float16 and nothing collapses to a constant. Embeddings have standard deviation one;
where the head is tied to them, that of the head, so that logits are of order one in every family.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import TOWER, Parts, anatomy
from pytest_qvl.models.layers import centred_on_zero
from pytest_qvl.models.sources.loading import LoadingReport, keep_report, wanted_tensors
from pytest_qvl.models.sources.synthetic_processor import special_id

if TYPE_CHECKING:
    import torch
    from torch import nn

BIAS_STD = 0.02
RESIDUAL_WRITERS = ("o_proj", "out_proj", "down_proj", "proj", "fc2", "linear_fc2")
# A head's memory in a linear-attention mixer: decay rates and steps as its authors start them (Gu and Dao 2023,
# section 3.6), so that heads forget within a token up to a thousand.
DECAY, STEP = (1.0, 16.0), (1e-3, 1e-1)
_KEPT_AS = "_qvl_drawn"


@dataclass(frozen=True)
class Drawn:
    """How a synthetic model's tensors were drawn, which is all it takes to draw them again.

    Attributes:
        device: Where; CPU and CUDA give different values.
        dtype: Of the values before any quantization.
        seed: Of the whole model.
        config: What the model was built for, as ``config.json`` would hold it.
        tensors: The shape of each of them by name, as the model was built.
    """

    device: torch.device
    dtype: torch.dtype
    seed: int
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)


def keep_drawn(model: Any, config: Any, device: str, dtype: torch.dtype, seed: int = 0) -> None:
    """Keep with a model how its tensors were drawn.

    Args:
        model: The model.
        config: The configuration that it was built for.
        device: Where they were drawn.
        dtype: Of what was drawn.
        seed: Of all of them.
    """
    import torch

    said, parts = json.loads(config.to_json_string(use_diff=False)), anatomy(model)
    setattr(parts.base, _KEPT_AS, Drawn(torch.device(device), dtype, seed, said, wanted_tensors(parts)))


def kept_drawn(parts: Parts) -> Drawn | None:
    """How this model's tensors were drawn; ``None`` for a model that was loaded."""
    drawn: Drawn | None = getattr(parts.base, _KEPT_AS, None)
    return drawn


def build_synthetic(config: Any, quantization_config: Any, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The exact architecture that ``config`` describes, with random weights.

    Which layers are quantized is decided by Transformers' own quantizer from ``quantization_config``, as in
    ``from_pretrained``; each quantized weight exists in 16 bits only while it is being packed.

    Args:
        config: A Qwen-VL configuration (:func:`pytest_qvl.models.sources.released.released_config`).
        quantization_config: A ``transformers.BitsAndBytesConfig``, or ``None`` for all weights in ``dtype``.
        device: Where to build.
        dtype: Dtype of what is not quantized.
        seed: Seed of all tensors.

    Raises:
        torch.OutOfMemoryError: The device is too small.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=dtype)
    quantizer = None
    if quantization_config is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        quantizer = AutoHfQuantizer.from_config(quantization_config, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": device})
    model.tie_weights()  # the skeleton has the head twice, and it would be drawn to be thrown away
    _fill(model, torch.device(device), dtype, seed)
    if quantizer is not None:
        model.hf_quantizer = quantizer
        quantizer.postprocess_model(model)
    model.generation_config = generation_config(config)
    keep_report(model, LoadingReport("synthetic weights, drawn and not loaded"))
    keep_drawn(model, config, device, dtype, seed)
    return model.eval()


def generation_config(config: Any) -> Any:
    """A ``transformers.GenerationConfig``: greedy, with the special ids of the released checkpoint.

    A release stops at the ends of a turn and of a text; the text configuration of Qwen3.5 names the latter alone.
    """
    from transformers import GenerationConfig

    text = config.get_text_config()
    end_of_text, end_of_turn = text.bos_token_id, text.eos_token_id
    if end_of_turn == end_of_text:
        end_of_turn = special_id(config, "<|im_end|>")
    return GenerationConfig(bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text)


def _fill(model: nn.Module, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Give every parameter real values on the device, packing quantized ones at once."""
    import torch

    parts = anatomy(model)
    seen: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:  # tied: the head of the smaller models is the embedding table
                setattr(module, key, seen[id(parameter)])
                continue
            name = f"{module_name}.{key}"
            values = draw(parts, name, device, dtype, seed)
            seen[id(parameter)] = _store(module, key, parameter, values, device)
        for key, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[key] = buffer.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw(parts: Parts, name: str, device: torch.device, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The values of one parameter, of which only the shape need exist yet (meta device).

    Args:
        parts: The model.
        name: Dotted name of the parameter in the model, which its own seed comes from.
        device: Where to draw: CPU and CUDA give different values.
        dtype: Of the values.
        seed: Of the whole model.
    """
    return draw_again(parts, parts.base.get_submodule(name.rpartition(".")[0]), name, Drawn(device, dtype, seed))


def drawn_shape(module: nn.Module, key: str) -> torch.Size:
    """The shape that a parameter is drawn in, packed or not by now."""
    import torch
    from torch import nn

    shape = module._parameters[key].shape  # type: ignore[union-attr]
    if isinstance(module, nn.Linear) and key == "weight":
        return torch.Size((module.out_features, module.in_features))
    return shape


def draw_again(parts: Parts, module: nn.Module, name: str, drawn: Drawn) -> torch.Tensor:
    """What :func:`draw` gives, of a module that may stand elsewhere by now, as PEFT moves what it adapts.

    Args:
        parts: The model.
        module: The module that the parameter belongs to.
        name: Name of the parameter where it was when it was drawn.
        drawn: Device, dtype and seed.
    """
    import torch
    from torch import nn

    generator = torch.Generator(drawn.device).manual_seed((drawn.seed << 32) ^ zlib.crc32(name.encode()))
    # Embeddings and head may have been resized since.
    shape = drawn.tensors.get(name) or drawn_shape(module, name.rpartition(".")[2])
    values = torch.empty(shape, dtype=drawn.dtype, device=drawn.device)
    if len(shape) == 1:
        return _drawn_vector(parts, module, name.rpartition(".")[2], values, generator)
    if isinstance(module, nn.Embedding) and not parts.config.tie_word_embeddings:
        return values.normal_(0.0, 1.0, generator=generator)
    std = 1.0 / math.sqrt(math.prod(shape[1:]))
    if name.split(".")[-2] in RESIDUAL_WRITERS:
        in_vision = parts.group_of(name) in TOWER
        depth = len(parts.blocks) if in_vision else parts.text_config.num_hidden_layers
        std /= math.sqrt(2 * depth)
    return values.normal_(0.0, std, generator=generator)


def _drawn_vector(
    parts: Parts, module: nn.Module, key: str, values: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Biases, normalisation gains, and what the heads of a linear-attention mixer remember, into `values`."""
    if key == "A_log":
        return values.uniform_(*DECAY, generator=generator).log_()
    if key == "dt_bias":  # softplus of it is the step
        low, high = (math.log(each) for each in STEP)
        return values.uniform_(low, high, generator=generator).exp_().expm1_().log_()
    if key.endswith("bias"):
        return values.normal_(0.0, BIAS_STD, generator=generator)
    return values.fill_(0.0 if centred_on_zero(parts, module) else 1.0)


def _store(module: nn.Module, key: str, parameter: Any, values: torch.Tensor, device: torch.device) -> nn.Parameter:
    import bitsandbytes as bnb
    from torch import nn

    stored: nn.Parameter
    if isinstance(module, bnb.nn.Linear4bit) and key == "weight":
        packed = bnb.nn.Params4bit(
            values,
            requires_grad=False,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            module=module,
        )
        stored = packed.to(device)
    else:
        stored = nn.Parameter(values, requires_grad=False)
    module._parameters[key] = stored
    return stored
