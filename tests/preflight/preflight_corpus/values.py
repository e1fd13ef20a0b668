"""Adapters whose values are broken, and healthy ones whose values look unusual (question 4)."""

from __future__ import annotations

from typing import Any

from .broken import broken
from .healthy import healthy
from .making import ADAPTER, BOTH_SIDES, FAMILIES, Arguments, Workshop, retensor, with_adapter, with_edits


@broken("tloen/alpaca-lora/issues/357", "adapter-zero", "B is 0 in 21, A in 0", FAMILIES)
def never_trained(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: tensor * ("lora_A" in name)})
    return found


@broken("huggingface/peft/issues/1402", "adapter-zero", "A in 21")
def gathered_by_nobody(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: tensor * 0})
    return found


@broken("huggingface/peft/issues/2880", "modules-zero", "vision 4 of 4", FAMILIES)
def tower_without_gradients(shop: Workshop, family: str) -> Arguments:
    """Reentrant checkpointing cut the vision tower's gradients off."""
    found = with_adapter(shop, family, target_modules=BOTH_SIDES)

    def untrained(name: str, tensor: Any) -> dict[str, Any]:
        return {name: tensor * 0 if "visual" in name and "lora_B" in name else tensor}

    retensor(found["adapter"] / ADAPTER, untrained)
    return found


@broken("predibase/lorax/issues/81", "not-finite", "NaN or infinite", FAMILIES)
def diverged(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)

    def broken_values(name: str, tensor: Any) -> dict[str, Any]:
        return {name: tensor * float("nan") if ".layers.1." in name else tensor}

    retensor(found["adapter"] / ADAPTER, broken_values)
    return found


@broken("openvla/openvla/issues/53", "not-finite", "above 65,504 were cast to float16")
def overflown_in_float16(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: (tensor * 2e6).half()})
    return found


@broken("Nerogar/OneTrainer/issues/146", "subnormal", "keeps as a normal number")
def below_what_float16_keeps(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)

    def faint(name: str, tensor: Any) -> dict[str, Any]:
        return {name: (tensor * 1e-4 if "lora_B" in name else tensor).half()}

    retensor(found["adapter"] / ADAPTER, faint)
    return found


@broken("Blaizzy/mlx-vlm/issues/841", "exploded", "the scaling is 256", ("qwen2_5_vl", "qwen3_vl"))
def alpha_of_another_convention(shop: Workshop, family: str) -> Arguments:
    """The trainer multiplied by alpha and wrote what alpha / r would have to be."""
    return with_edits(shop, family, lora_alpha=2048)


@broken("ymcui/Chinese-LLaMA-Alpaca/issues/604", "copy-untrained", "base's values bit for bit", FAMILIES)
def head_and_embeddings_as_they_were(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family, modules_to_save=["lm_head", "embed_tokens"])
    _copies_of_the_base(found)
    return found


def _copies_of_the_base(found: dict[str, Any]) -> None:
    from safetensors.torch import load_file

    base = load_file(found["base"] / "model.safetensors")

    def copied(name: str, tensor: Any) -> dict[str, Any]:
        if "lora_" in name:
            return {name: tensor}
        end = name.rpartition(".model.")[2].rpartition(".")[0].rpartition(".")[2]
        return {name: next(value for key, value in base.items() if key.endswith(f"{end}.weight")).float()}

    retensor(found["adapter"] / ADAPTER, copied)


@healthy()
def matrices_in_bfloat16(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)
    retensor(found["adapter"] / ADAPTER, lambda name, tensor: {name: tensor.bfloat16()})
    return found


@healthy()
def a_few_steps_only(shop: Workshop, family: str) -> Arguments:
    """B after ten steps of AdamW at 1e-4: each value about as large as what the steps add up to."""
    found = with_adapter(shop, family)

    def young(name: str, tensor: Any) -> dict[str, Any]:
        return {name: tensor.sign() * 1e-3 * tensor.abs().clamp(0.2, 1) if "lora_B" in name else tensor}

    retensor(found["adapter"] / ADAPTER, young)
    return found


@healthy(("qwen2_5_vl", "qwen3_vl"))
def rows_of_zeros_as_a_server_pads_them(shop: Workshop, family: str) -> Arguments:
    found = with_adapter(shop, family)

    def padded(name: str, tensor: Any) -> dict[str, Any]:
        made = tensor.clone()
        (made[4:] if "lora_A" in name else made[:, 4:]).zero_()
        return {name: made}

    retensor(found["adapter"] / ADAPTER, padded)
    return found


@healthy(("qwen2_vl",))
def new_tokens_trained(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, target_modules=["q_proj", "v_proj"], trainable_token_indices=[5, 7])


@healthy(("qwen3_vl",))
def embeddings_adapted_and_saved_whole(shop: Workshop, family: str) -> Arguments:
    """PEFT saves the base's embeddings with an adapter of theirs, unless it is told not to."""
    return with_adapter(shop, family, target_modules=["q_proj", "embed_tokens"], save_embedding_layers=True)


@healthy(("qwen2_5_vl",))
def biases_trained(shop: Workshop, family: str) -> Arguments:
    return with_adapter(shop, family, bias="lora_only")


@healthy(("qwen2_5_vl",))
def tower_and_merger_on_purpose(shop: Workshop, family: str) -> Arguments:
    return with_adapter(
        shop, family, target_modules=r".*(visual\.(blocks|merger)|language_model).*\.(qkv|mlp\.[02]|q_proj)"
    )
