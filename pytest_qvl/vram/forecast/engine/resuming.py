"""What a trainer has on the device when it loads a checkpoint of an adapter and its optimizer.

Followed from source: ``transformers/trainer.py`` (``_load_from_checkpoint``, ``_load_optimizer_and_scheduler``,
``_load_best_model``), ``peft/peft_model.py`` (``load_adapter``), ``torch/optim/optimizer.py`` and
``bitsandbytes/optim/optimizer.py`` (``load_state_dict``).

Saving has nothing there that a step has not: ``state_dict()`` hands out the tensors themselves, which safetensors and
``torch.save`` copy to the host one by one. Only NF4's table of nested statistics is cloned for each layer (1 KiB),
after the update, when the gradients are gone.
"""

from __future__ import annotations

from typing import Any

import torch


def load_adapter(model: Any) -> None:
    """``PeftModel.load_adapter`` into an adapter that is there.

    The file is read to the device, so that the adapter is there twice until it returns, and what is in 16 bits becomes
    fp32 in between (``autocast_adapter_dtype``): also the adapter that ``SFTTrainer`` cast to bfloat16.
    """
    loaded = [torch.empty_like(parameter) for parameter in model.parameters() if parameter.requires_grad]
    model.base_model._cast_adapter_dtype(adapter_name=model.active_adapter, autocast_adapter_dtype=True)
    del loaded


def load_best(model: Any) -> None:
    """The same at the end of a training, which changes the model for nobody: what it allocates, and frees."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    held = [torch.empty_like(parameter) for _, parameter in trained]
    # One of 16 bits is no longer the model's, but still the optimizer's.
    halves = [own for name, own in trained if "lora_" in name and own.dtype != torch.float32]
    held += [torch.empty_like(own, dtype=torch.float32) for own in halves]
    del held


def load_states(optimizer: Any, *, ddp: bool) -> None:
    """``optimizer.load_state_dict`` of a checkpoint, of which ``optimizer`` has the states, not on the device.

    A training on one card reads the file to the host, and each tensor goes to the device by itself: paged states as
    well, as bitsandbytes pages only what it makes. Each of several cards reads the file to the card, where bitsandbytes
    copies all of it once more.

    Args:
        optimizer: Its states are replaced by those on the device.
        ddp: Whether it is one of several cards.
    """
    bitsandbytes = hasattr(optimizer, "non_castable_tensor_keys")
    as_they_are = optimizer.non_castable_tensor_keys if bitsandbytes else {"step"}
    read = _copied(optimizer) if ddp and bitsandbytes else []
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                cast = value.is_floating_point() and name not in as_they_are
                copy = value.clone()
                state[name] = copy.to(parameter.dtype) if cast else copy
    del read


def _copied(optimizer: Any) -> list[torch.Tensor]:
    """A copy of every tensor, one of those that several parameters share."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    tensors = {id(value): value for value in values if isinstance(value, torch.Tensor)}
    return [tensor.clone() for tensor in tensors.values()]
