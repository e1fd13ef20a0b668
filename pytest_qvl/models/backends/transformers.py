"""The baseline: Transformers, bitsandbytes and PEFT as their documentation uses them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import AdapterSlot
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends import LoadRequest, ModelLoadError
from pytest_qvl.models.quantized import finish_saved_in_4bit, keep_quantized_weights_in_place
from pytest_qvl.models.renamed import enable_checkpointing
from pytest_qvl.models.sources.hub import hub_options, saved_quantization
from pytest_qvl.models.sources.loading import keep_report, reported_by_transformers, why_not_loaded
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic import build_synthetic

if TYPE_CHECKING:
    import torch


class TransformersBackend:
    """Loads by ``from_pretrained`` with a ``BitsAndBytesConfig``, and adapts by ``get_peft_model``."""

    name = "transformers"

    def load(self, request: LoadRequest) -> Any:
        """Load a frozen base model in eval mode; see :class:`pytest_qvl.models.backends.Backend`."""
        import torch

        try:
            model = _build(request, getattr(torch, request.dtype))
        except (torch.OutOfMemoryError, ModelSourceError):
            raise
        except Exception as error:
            # `from None`, because the traceback's frames would keep the half-built model alive on the GPU.
            said = why_not_loaded(request.source, error)
            raise ModelLoadError(f"{request.source} could not be loaded: {said}") from None
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

    def reset(self, model: Any) -> None:
        """Put the model into eval mode; nothing else differs from how it was loaded."""
        model.eval()

    def prepare_training(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Put the model into train mode, with non-reentrant checkpointing if asked; no gradients for the vision tower.

        Enabling checkpointing on Transformers 5 also hooks the vision patch embed so that its output requires grad:
        the frozen tower is then back-propagated through. The hook on the text embeddings has to stay.
        """
        parts = anatomy(model)
        model.train()
        if gradient_checkpointing:
            enable_checkpointing(parts.base, {"use_reentrant": False})
            parts.base.enable_input_require_grads()
        remove_vision_grad_hooks(parts.patch_embed)

    def free_buffers(self) -> None:
        """Do nothing: this backend keeps no buffers of its own between trainings."""


def _build(request: LoadRequest, dtype: torch.dtype) -> Any:
    """Build synthetic weights, or read a checkpoint by ``from_pretrained`` and keep a report of what did not fit.

    A checkpoint saved in 4 bits is loaded as it was saved, and dequantized afterwards where full precision is asked
    for.
    """
    source = request.source
    if source.kind == "synthetic":
        config = released_config(source.location)
        return build_synthetic(config, request.quantization_config, request.device, dtype)
    from transformers import AutoModelForImageTextToText

    options: dict[str, Any] = {}
    own = saved_quantization(source)
    if request.quantization_config is not None and own is None:
        options["quantization_config"] = request.quantization_config
    model, info = AutoModelForImageTextToText.from_pretrained(
        source.pretrained,
        dtype=dtype,
        device_map={"": request.device},
        attn_implementation="sdpa",
        use_safetensors=True,
        # Reported, and refused by whoever asked for the model, with names and shapes.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **hub_options(source),
        **options,
    )
    keep_report(model, reported_by_transformers(info, model, source))
    if own is not None:
        finish_saved_in_4bit(model, dtype, full_precision=request.quantization_config is None)
    return model


def remove_vision_grad_hooks(patch_embed: Any) -> int:
    """Remove every ``make_inputs_require_grads`` hook from the vision patch embed and return how many there were.

    ``disable_input_require_grads`` does not do: k-bit preparation registers twice and keeps one handle.
    """
    hooks = patch_embed._forward_hooks
    silent = [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "make_inputs_require_grads"]
    for key in silent:
        del hooks[key]
    return len(silent)
