"""The baseline: Transformers, bitsandbytes and PEFT as their documentation uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import AdapterSlot
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends import LoadRequest, ModelLoadError
from pytest_qvl.models.quantized import keep_quantized_weights_in_place
from pytest_qvl.models.released import released_config
from pytest_qvl.models.renamed import enable_checkpointing
from pytest_qvl.models.synthetic import build_synthetic

if TYPE_CHECKING:
    import torch


class TransformersBackend:
    """``from_pretrained`` with a ``BitsAndBytesConfig``, then ``get_peft_model``."""

    name = "transformers"

    def load(self, request: LoadRequest) -> Any:
        """Load a frozen base model in eval mode; see :class:`pytest_qvl.models.backends.Backend`."""
        import torch

        try:
            model = _build(request, getattr(torch, request.dtype))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            # `from None`, because the traceback's frames would keep the half-built model alive on the GPU.
            raise ModelLoadError(
                f"{request.source} could not be loaded: {type(error).__name__}: {first_line}"
            ) from None
        keep_quantized_weights_in_place(model)
        model.requires_grad_(False)
        model.eval()
        return model

    def attach(self, model: Any, lora_config: Any, adapter: str | None) -> AdapterSlot:
        """Wrap the base model in place with a fresh adapter, or with the one saved in the folder ``adapter``.

        Raises:
            ValueError: The configuration names no module of this model.
        """
        from peft import PeftModel, get_peft_model

        if adapter is None:
            return AdapterSlot.of(get_peft_model(model, lora_config))
        return AdapterSlot.of(PeftModel.from_pretrained(model, adapter, config=lora_config, is_trainable=True))

    def rest(self, model: Any) -> None:
        """Eval mode."""
        model.eval()

    def prepare_training(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Train mode, with non-reentrant checkpointing if asked, and the vision tower out of autograd's way.

        Enabling checkpointing on Transformers 5 also hooks the vision patch embed so that its output requires grad:
        the frozen tower is then back-propagated through. The hook on the text embeddings has to stay.
        """
        parts = anatomy(model)
        model.train()
        if gradient_checkpointing:
            enable_checkpointing(parts.base, {"use_reentrant": False})
            parts.base.enable_input_require_grads()
        remove_vision_grad_hooks(parts.patch_embed)

    def give_back(self) -> None:
        """It keeps nothing."""


def _build(request: LoadRequest, dtype: torch.dtype) -> Any:
    source = request.source
    if source.kind == "synthetic":
        config = released_config(source.location)
        return build_synthetic(config, request.quantization_config, request.device, dtype)
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        source.pretrained,
        quantization_config=request.quantization_config,
        dtype=dtype,
        device_map={"": request.device},
        attn_implementation="sdpa",
        local_files_only=source.kind != "hub",
        use_safetensors=True,
    )


def remove_vision_grad_hooks(patch_embed: Any) -> int:
    """Remove every ``make_inputs_require_grads`` hook from the vision patch embed and return how many there were.

    ``disable_input_require_grads`` does not do: k-bit preparation registers twice and keeps one handle.
    """
    hooks = patch_embed._forward_hooks
    silent = [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "make_inputs_require_grads"]
    for key in silent:
        del hooks[key]
    return len(silent)
