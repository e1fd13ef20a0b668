"""Whether the model that a configuration describes can run: its real class, one layer deep, on one small image."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

# Several times what released models of these families have: at most 80 layers, 32 blocks, 152,064 words, 8,192 wide.
MOST = {"num_hidden_layers": 512, "depth": 256, "vocab_size": 2**22, "deepstack_visual_indexes": 64}
WIDEST = 2**20
_COUNTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_NARROW = 32  # of the MLP, whose width nothing else has to fit
_WEIGHT = 0.01


class NotRunnableError(ValueError):
    """A configuration whose model cannot run, with the installed library."""


def absurd_size(fields: Mapping[str, Any]) -> str:
    """The first size of a configuration that no model has, in words; empty if there is none.

    Args:
        fields: Content of a ``config.json``.
    """
    for key, value in fields.items():
        if isinstance(value, dict) and (said := absurd_size(value)):
            return said
        size = len(value) if isinstance(value, list) else value
        most = MOST.get(key, WIDEST if "size" in str(key) or "dim" in str(key) else 2**53)
        if isinstance(size, int) and not isinstance(size, bool) and not -1 <= size <= most:
            return f"{str(key)[:80]} {str(size)[:40]}, which no model of this family has (at most {most:,})"
    return ""


def why_not_runnable(config: Any) -> str:
    """Why a forward pass of the model fails or gives no numbers, in one sentence; empty if it works.

    The installed class is built with one layer in each half and a narrow MLP, on the CPU. Every weight is one number
    (stored once, so that no size needs memory); rotary frequencies and all else that the configuration decides are the
    real ones. One image of 2 x 4 visual tokens goes through it.

    Args:
        config: A Qwen-VL configuration of Transformers; not changed.
    """
    import torch

    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.vram.forecast.engine.linear_attention import linear_attention_by

    if said := next(_settings_at_fault(config), ""):
        return said
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            model = _shallow(config)
            with linear_attention_by(anatomy(model), "torch", (0, 0)):  # kernels that are installed need CUDA
                states = model.model(**_inputs(model, config), use_cache=False)[0]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return f"its forward pass fails with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if not bool(torch.isfinite(states).all()):
        return "its forward pass gives NaN or infinity whatever the weights are"
    return ""


def _settings_at_fault(config: Any) -> Iterator[str]:
    """Settings that are known to stop the model, by their names."""
    text, vision = config.get_text_config(), config.vision_config
    if none := [name for name in _COUNTS if (getattr(text, name, None) or 0) < 1]:
        yield f"{none[0]} is {getattr(text, none[0], None)}, and has to be at least 1"
        return
    heads, keys, width = text.num_attention_heads, text.num_key_value_heads, text.hidden_size
    if heads % keys:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {keys}"
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if not 0 <= getattr(config, name, 0) < text.vocab_size:
            yield f"{name} is {getattr(config, name)}, and the vocabulary has {text.vocab_size} tokens"
    head = getattr(text, "head_dim", None) or width // heads
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", 1.0))
    if not isinstance(theta, int | float) or not theta > 0:
        yield f"rope_theta is {theta}, and positions are powers of it: it has to be above 0"
    sections = rope.get("mrope_section")
    turned = int(head * rope.get("partial_rotary_factor", 1.0))
    if sections is not None and sum(sections) != turned // 2:
        of = f"a head's {head}" if turned == head else f"the {turned} of a head's {head} that are turned"
        yield f"mrope_section {sections} adds up to {sum(sections)}, and has to be {turned // 2}, half of {of}"
    window = getattr(vision, "window_size", None)
    cell = vision.patch_size * vision.spatial_merge_size
    if window is not None and window < cell:
        yield f"window_size of the vision tower is {window}, less than the {cell} pixels of one merged patch"


def _shallow(config: Any) -> Any:
    """The model class with one layer in each half, its weights all one number."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForImageTextToText

    small = copy.deepcopy(config)
    text, vision = small.get_text_config(), small.vision_config
    text.num_hidden_layers, vision.depth = 1, 1
    text.intermediate_size = _NARROW
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if getattr(vision, "deepstack_visual_indexes", None):
        vision.deepstack_visual_indexes = [0]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(small, dtype=torch.float32, attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(_constant_linear, module)  # type: ignore[method-assign]
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.full((1,), _WEIGHT).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model.eval()


def _constant_linear(module: Any, inputs: Any) -> Any:
    """A linear layer whose weights are all one number, without multiplying by them one by one."""
    if inputs.shape[-1] != module.in_features:
        raise ValueError(f"a layer of {module.in_features} inputs gets {inputs.shape[-1]}")
    return (inputs.sum(-1, keepdim=True) * _WEIGHT).expand(*inputs.shape[:-1], module.out_features)


def _inputs(model: Any, config: Any) -> dict[str, Any]:
    """One image of 2 x 4 visual tokens between its markers, and a token on either side."""
    import torch

    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    rows, columns = 2 * merge, 4 * merge
    values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    image = [config.image_token_id] * 8
    ids = torch.tensor([[0, config.vision_start_token_id, *image, config.vision_end_token_id, 0]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.full((rows * columns, values), 0.5),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }
    known = inspect.signature(type(model.model).forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name in known}
