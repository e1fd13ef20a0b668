"""Ways to find the first values of an adapter: what PEFT refuses, and what they leave of a training's memory."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.synthetic import build_synthetic
from pytest_qvl.vram.forecast.engine.build import asked_lora
from pytest_qvl.vram.forecast.engine.dry_run import DryRun
from pytest_qvl.vram.forecast.engine.trace import ALLOC
from pytest_qvl.vram.forecast.source import find_source
from pytest_qvl.vram.forecast.trainer_settings import from_lora
from tests.unit.test_forecast_real_trainer import USUAL, base

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def adapted(request: Any) -> dict[str, Any]:
    """Its adapted layers by name, on a small model of that many bits on the CPU, by the real PEFT."""
    from peft import get_peft_model

    if request.base_bits == 16:
        model = build_synthetic(find_source(request.model).config, None, "cpu", torch.bfloat16)
    else:
        model = base(request)
    model = get_peft_model(model, asked_lora(anatomy(model), request))
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "orthogonal"])
def test_what_the_real_peft_refuses_of_a_quantized_base_is_refused_with_its_rule(name: str) -> None:
    asked = replace(USUAL, base_bits=16, init_lora_weights=name)
    adapted(asked)
    quantized = replace(USUAL)
    object.__setattr__(quantized, "init_lora_weights", name)  # past the refusal
    with pytest.raises((TypeError, RuntimeError)):
        adapted(quantized)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{name}' and base_bits is 4: PEFT "):
        replace(USUAL, init_lora_weights=name)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'", "ignore:lora with eva initialization")
@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora", "eva", "orthogonal"])
def test_an_initialisation_of_16_bits_leaves_every_dtype_shape_and_gradient(name: str) -> None:
    usual, other = (adapted(replace(USUAL, base_bits=16, init_lora_weights=init)) for init in ("", name))
    assert usual.keys() == other.keys()
    for layer, module in usual.items():
        theirs = dict(other[layer].named_parameters())
        for part, own in module.named_parameters():
            found = theirs[part]
            assert (own.shape, own.dtype, own.requires_grad) == (found.shape, found.dtype, found.requires_grad), part
            assert found.untyped_storage().nbytes() == own.untyped_storage().nbytes(), part


class Unpacked(TorchDispatchMode):
    """Dtypes that 4-bit weights are unpacked to."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.bitsandbytes.dequantize_4bit.default:
            self.dtypes.add(out.dtype)
        return out


@pytest.mark.parametrize(("name", "dtype"), [("", torch.bfloat16), ("olora", torch.float32)])
def test_olora_leaves_a_4_bit_base_whose_backward_unpacks_to_float32(name: str, dtype: torch.dtype) -> None:
    for module in adapted(replace(USUAL, init_lora_weights=name)).values():
        inputs = torch.ones(4, module.in_features, dtype=torch.bfloat16, requires_grad=True)
        with Unpacked() as unpacked:
            module.base_layer(inputs).sum().backward()
        assert unpacked.dtypes == {dtype}


def test_the_forecast_of_olora_unpacks_every_adapted_weight_to_float32_in_backward() -> None:
    sizes = []
    for name in ("", "olora"):
        request = replace(USUAL, checkpoint="nf4", init_lora_weights=name)
        trace = DryRun(request, find_source(request.model)).run(request, inference=False)
        sizes.append(Counter(size for code, _, size, _ in trace.events if code == ALLOC))
    layers = [module.base_layer for module in adapted(USUAL).values()]
    unpacked = Counter(4 * layer.in_features * layer.out_features for layer in layers)
    more = sizes[1] - sizes[0]
    assert more.keys() == unpacked.keys()
    assert not sizes[0] - sizes[1]
    # Of two steps; the first layer's inputs have no gradient, and so its first weights are not unpacked for one.
    assert all(count <= 2 * unpacked[size] for size, count in more.items())
    assert more[max(more)] == 2 * unpacked[max(more)]


@pytest.fixture
def configuration(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: Any) -> str:
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **changes}))
        return str(file)

    return write


def test_a_configuration_says_how_an_adapter_is_initialised(configuration: Callable[..., str]) -> None:
    for name in (True, False, "gaussian"):
        assert "init_lora_weights" not in from_lora(configuration(init_lora_weights=name))
    for name in ("pissa", "olora", "loftq"):
        assert from_lora(configuration(init_lora_weights=name))["init_lora_weights"] == name
    with pytest.raises(ValueError, match=r"init_lora_weights='eva' with rho=2.0, which is not forecast: EVA gives"):
        from_lora(configuration(init_lora_weights="eva"))
    for said in ({"eva_config": {"rho": 1.0}}, {"rank_pattern": {"q_proj": 7}}):
        assert from_lora(configuration(init_lora_weights="eva", **said))["init_lora_weights"] == "eva"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"init_lora_weights": "loftq"}, "PEFT's LoftQ is not to be given a quantized model"),
        ({"init_lora_weights": "loftq", "base_bits": 8}, "base_bits is 8: PEFT's LoftQ"),
        ({"init_lora_weights": "olora", "base_bits": 8}, "is followed in NF4 and without DoRA"),
        ({"init_lora_weights": "olora", "use_dora": True}, "base_bits is 4 beside use_dora"),
        ({"init_lora_weights": "mica"}, "'mica', which is not forecast: followed are pissa, loftq, orthogonal, olora"),
        ({"init_lora_weights": "corda", "base_bits": 16}, "'corda', which is not forecast"),
        ({"init_lora_weights": "eva", "trainer": "unsloth"}, "trainer is 'unsloth', whose own code"),
    ],
    ids=["loftq", "loftq-8", "olora-8", "olora-dora", "mica", "corda", "unsloth"],
)
def test_what_is_not_followed_is_refused_in_a_sentence(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(USUAL, **changes)
