"""Will it fit? Device memory of loading, inference and training, without a GPU and without weights.

The real model code (Transformers, PEFT, bitsandbytes) runs on tensors without data; every allocation and free
is followed through a simulation of torch's caching allocator. Importing this package is cheap: torch comes
with the first forecast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_qvl.vram.forecast.request import Request
from pytest_qvl.vram.forecast.result import Forecast

if TYPE_CHECKING:
    from pytest_qvl.vram.cards import Card
    from pytest_qvl.vram.forecast.request import Checkpoint, Optimizer

__all__ = ["Forecast", "Request", "forecast"]


def forecast(
    model: str = "qwen2.5-vl-7b",
    *,
    image: tuple[int, int] = (1024, 1024),
    images: int = 1,
    batch: int = 1,
    tokens: int = 256,
    lora_r: int = 16,
    gradient_checkpointing: bool = True,
    optimizer: Optimizer = "paged_adamw_8bit",
    compute_dtype: str | None = None,
    vision_hook: bool = False,
    kbit_upcast: bool = False,
    autocast: bool | None = None,
    generate: int = 0,
    pixel_dtype: str = "float32",
    all_logits: bool = False,
    checkpoint: Checkpoint = "16bit",
    card: str | Card | None = None,
) -> Forecast:
    """Forecast the device memory of one configuration; the arguments are those of :class:`Request`.

    Args:
        model: Released name or a local folder with a ``config.json``.
        image: Height and width of each image in pixels.
        images: Images per sample.
        batch: Samples per step.
        tokens: Text tokens per sample; visual tokens come on top.
        lora_r: Rank of the LoRA on all language linears; 0 for inference on the bare quantized model.
        gradient_checkpointing: Whether layers are recomputed in backward.
        optimizer: ``adamw_torch``, ``adamw_8bit``, ``paged_adamw_8bit`` or ``paged_adamw_32bit``.
        compute_dtype: ``None`` for bfloat16 where the card has it, else float16.
        vision_hook: Whether the frozen vision tower is back-propagated through (the silent hook of
            Transformers 5).
        kbit_upcast: Whether ``prepare_model_for_kbit_training`` raised 16-bit parameters to fp32.
        autocast: Whether the forward runs under autocast; ``None`` for yes after the upcast and for float16.
        generate: New tokens to decode.
        pixel_dtype: Dtype in which images reach the device.
        all_logits: Whether inference keeps the logits of every position.
        checkpoint: Whether a ``16bit`` checkpoint is quantized while loading, one saved in ``nf4`` is loaded, or
            random weights are drawn layer by layer (``synthetic``).
        card: The card to judge, such as ``"t4"``.

    Raises:
        ValueError: Unknown model, card or option; an image without pixels; a negative rank; bfloat16 on a
            card that lacks it.
    """
    request = Request(
        model=model,
        image=image,
        images=images,
        batch=batch,
        tokens=tokens,
        lora_r=lora_r,
        gradient_checkpointing=gradient_checkpointing,
        optimizer=optimizer,
        vision_hook=vision_hook,
        kbit_upcast=kbit_upcast,
        autocast=autocast,
        generate=generate,
        pixel_dtype=pixel_dtype,
        all_logits=all_logits,
        checkpoint=checkpoint,
    )
    from pytest_qvl.vram.forecast.run import make_forecaster

    forecaster, request = make_forecaster(request, card, compute_dtype)
    return forecaster.forecast(request)
