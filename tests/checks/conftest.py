"""Tiny real Qwen2.5-VL models for the tests of the checks, loaded, quantized and adapted on the CPU.

Session fixtures; ``fresh_model`` and ``lora_config`` are factories. A test that damages a model takes its own
from ``fresh_model(...)``; ``lora_model`` is shared and has to be left as it was found.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import load_processor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

LANGUAGE_ONLY = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
KEEP_16BIT = ("model.visual", "lm_head")


class LoraConfigFactory(Protocol):
    def __call__(self, **overrides: Any) -> Any:
        """A `LoraConfig`, rank 8 on the language linears, with any field overridden."""


class ModelFactory(Protocol):
    def __call__(
        self,
        *,
        quantized: bool = True,
        dtype: str = "float32",
        skip: tuple[str, ...] | None = KEEP_16BIT,
        lora: Any = None,
        seed: int = 0,
        in_place: bool = True,
        **quantization: Any,
    ) -> Any:
        """A new model in eval mode, nothing shared with any other.

        Args:
            quantized: NF4 with double quantization, or full precision.
            dtype: Load dtype, and compute dtype unless `quantization` has another. What damages a model is damage in
                every dtype, and not every CPU multiplies 16-bit numbers in hardware; healthy models are judged in
                bfloat16 and float16 too, here and in tests/faults.
            skip: Modules kept out of the quantization.
            lora: True for the usual adapter, a dictionary of `LoraConfig` overrides, or a `LoraConfig`.
            seed: Seed of the adapter's initial weights.
            in_place: Keep bitsandbytes from repacking weights for the CPU (what every backend does after
                loading).
            quantization: Fields of `BitsAndBytesConfig` to override.
        """


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir() -> Path:
    """Folder of the embedded checkpoint."""
    return embedded_model_dir()


@pytest.fixture(scope="session")
def processor(tiny_dir: Path) -> Any:
    """The embedded checkpoint's processor."""
    return load_processor(tiny_dir)


@pytest.fixture(scope="session")
def config(tiny_dir: Path) -> Any:
    """The embedded checkpoint's configuration; shared, so leave it as it was found."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def lora_config() -> LoraConfigFactory:
    from peft import LoraConfig

    def make(**overrides: Any) -> Any:
        return LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE_ONLY, **overrides})

    return make


def copied(model: Any) -> Any:
    """A model without adapter that shares nothing with this one, as if it was loaded."""
    from bitsandbytes.nn import Linear4bit

    model = deepcopy(model)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # Transformers' mark of what was loaded
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.quant_state is not None:
            # The copy that bitsandbytes makes of a weight knows the first one's module.
            module.weight.module, module.weight.quant_state = module, module.quant_state
    return model


@pytest.fixture(scope="session")
def fresh_model(tiny_dir: Path, lora_config: LoraConfigFactory) -> ModelFactory:
    import torch
    from peft import get_peft_model
    from transformers import BitsAndBytesConfig, Qwen2_5_VLForConditionalGeneration

    from pytest_qvl.models.quantized import keep_quantized_weights_in_place

    loaded: dict[str, Any] = {}  # by settings: a copy takes a quarter of the time

    def load(
        *,
        quantized: bool = True,
        dtype: str = "float32",
        skip: tuple[str, ...] | None = KEEP_16BIT,
        lora: Any = None,
        seed: int = 0,
        in_place: bool = True,
        **quantization: Any,
    ) -> Any:
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": getattr(torch, dtype),
            "llm_int8_skip_modules": None if skip is None else list(skip),
            **quantization,
        }
        key = repr((dtype, settings if quantized else None))
        if key not in loaded:
            loaded[key] = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                tiny_dir,
                quantization_config=BitsAndBytesConfig(**settings) if quantized else None,
                dtype=getattr(torch, dtype),
                attn_implementation="sdpa",
            )
        model = copied(loaded[key])
        if in_place:
            keep_quantized_weights_in_place(model)
        model.requires_grad_(False)
        model.eval()
        if lora is None or lora is False:
            return model
        overrides = {} if lora is True else lora
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, lora_config(**overrides) if isinstance(overrides, dict) else overrides)
        return adapted.eval()

    return load


@pytest.fixture(scope="session")
def lora_model(fresh_model: ModelFactory) -> Any:
    """NF4 and bfloat16 with a fresh LoRA on the language backbone; shared, so leave it as it was found."""
    return fresh_model(dtype="bfloat16", lora=True)


@pytest.fixture(scope="session")
def rounded_otherwise() -> Callable[[Any, Callable[[torch.Size], bool]], AbstractContextManager[None]]:
    """Kernels that round outputs of some shapes otherwise than the rest, the same way at every call.

    By as much as products in float32 do (docs/limits.md#last-place-noise): sqrt(n / 6) last places, n being 256.
    """
    import torch

    from pytest_qvl.checks.support.activations import leaves
    from pytest_qvl.models.anatomy import anatomy

    @contextmanager
    def rounded(model: Any, chosen: Callable[[torch.Size], bool]) -> Iterator[None]:
        parts, generator = anatomy(model), torch.Generator()

        def after(number: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> Any:
                if not isinstance(output, torch.Tensor) or not chosen(output.shape):
                    return None
                signs = torch.randint(0, 2, output.shape, generator=generator.manual_seed(number)) * 2 - 1
                return output * (1 + (256 / 6) ** 0.5 * torch.finfo(output.dtype).eps * signs)

            return hook

        modules = [*leaves(parts.language_backbone), *leaves(parts.lm_head)]
        handles = [module.register_forward_hook(after(number)) for number, module in enumerate(modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    return rounded


@pytest.fixture(scope="session")
def autocasting() -> Callable[..., AbstractContextManager[None]]:
    """Autocast in a forward: of a model (as Accelerate's), of one of its modules, or of a class of modules."""
    import torch

    from pytest_qvl.faults.tools import attribute
    from pytest_qvl.models.anatomy import anatomy

    @contextmanager
    def inside(owner: Any, dtype: torch.dtype, *, enabled: bool = True) -> Iterator[None]:
        if isinstance(getattr(owner, "base_model", None), torch.nn.Module):
            owner = anatomy(owner).base
        own = owner.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast("cpu", dtype, enabled=enabled):
                return own(*args, **kwargs)

        with attribute(owner, "forward", forward):
            yield

    return inside


@pytest.fixture
def compiler() -> Any:
    """``torch.compile``; what was compiled with it, and the count of it, goes with the test."""
    import torch
    from torch._dynamo.utils import counters

    yield torch.compile
    torch.compiler.reset()
    counters.clear()
