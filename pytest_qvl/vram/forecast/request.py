"""What a forecast is asked, checked before anything heavy is imported. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
Dtype = Literal["bfloat16", "float16"]
Checkpoint = Literal["16bit", "nf4", "synthetic"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
CHECKPOINTS: tuple[Checkpoint, ...] = get_args(Checkpoint)


@dataclass(frozen=True)
class Request:
    """One configuration to forecast.

    Attributes:
        model: Released name (``"qwen2.5-vl-7b"``) or a local folder with a ``config.json``.
        image: Height and width of each image in pixels, before the processor resizes it.
        images: Images per sample.
        batch: Samples per step, all of the same length (no padding).
        tokens: Text tokens per sample, the markers around images included; visual tokens come on top.
        lora_r: Rank of the LoRA on all language linears; 0 for the bare quantized model, without a training
            step.
        gradient_checkpointing: Whether decoder layers (and vision blocks) are recomputed in backward.
        optimizer: Which AdamW, by its name in Transformers' ``TrainingArguments``.
        compute_dtype: Dtype of 4-bit products and of everything that is not quantized.
        vision_hook: Whether the vision patch embed keeps the hook that ``gradient_checkpointing_enable`` puts
            on it, so that the frozen vision tower is back-propagated through.
        kbit_upcast: Whether ``prepare_model_for_kbit_training`` raised all 16-bit parameters to fp32.
        autocast: Whether forward and loss run under autocast to ``compute_dtype``; ``None`` for what trainers
            do: yes after the fp32 upcast and for float16, else no.
        generate: New tokens to decode; 0 for none.
        pixel_dtype: Dtype in which images reach the device; processors give float32.
        all_logits: Whether the inference forward keeps the logits of every position (a plain
            ``model(**batch)``) rather than of the last one (``generate``).
        checkpoint: Whether a 16-bit checkpoint is quantized while it loads, one saved in NF4 is loaded, or random
            weights are drawn layer by layer (``synthetic:`` models).
        capability: CUDA compute capability, which decides attention kernels and library workspaces.
    """

    model: str = "qwen2.5-vl-7b"
    image: tuple[int, int] = (1024, 1024)
    images: int = 1
    batch: int = 1
    tokens: int = 256
    lora_r: int = 16
    gradient_checkpointing: bool = True
    optimizer: Optimizer = "paged_adamw_8bit"
    compute_dtype: Dtype = "bfloat16"
    vision_hook: bool = False
    kbit_upcast: bool = False
    autocast: bool | None = None
    generate: int = 0
    pixel_dtype: str = "float32"
    all_logits: bool = False
    checkpoint: Checkpoint = "16bit"
    capability: tuple[int, int] = (9, 0)

    def __post_init__(self) -> None:
        """Refuse values that describe no run.

        Raises:
            ValueError: Names the field, what it was and what it may be.
        """
        height, width = self.image
        if height < 1 or width < 1:
            raise ValueError(f"image {height}x{width} has no pixels: both sides must be at least 1")
        for name, least in (("images", 1), ("batch", 1), ("lora_r", 0), ("generate", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.tokens < 2 * self.images + 2:
            raise ValueError(
                f"tokens is {self.tokens}: each of {self.images} images needs two marker tokens, and a "
                "sample one token at its start and end"
            )
        choices: dict[str, tuple[str, ...]] = {
            "optimizer": OPTIMIZERS,
            "compute_dtype": DTYPES,
            "pixel_dtype": ("float32", *DTYPES),
            "checkpoint": CHECKPOINTS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: known are {', '.join(known)}")

    @property
    def trains_under_autocast(self) -> bool:
        """Whether the training forward runs under autocast."""
        if self.autocast is not None:
            return self.autocast
        return self.kbit_upcast or self.compute_dtype == "float16"
