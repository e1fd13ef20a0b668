"""Random weights of an exact architecture: here cut to a few layers, everything else as released."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.quantized import base_tensors, keep_quantized_weights_in_place, linear_states
from pytest_qvl.models.sources import synthetic
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic import build_synthetic, draw, generation_config
from pytest_qvl.models.sources.synthetic_processor import synthetic_processor
from pytest_qvl.models.taps import tapped
from pytest_qvl.samples import make_batch, scenes


def small(name: str, tiny: bool = False) -> Any:
    """Fewer and narrower layers; `tiny` also a narrow vision tower and a few words, which is quickly drawn and packed."""
    config = released_config(name)
    text, vision = config.get_text_config(), config.vision_config
    if tiny:
        text.vocab_size = 1024
        vision.hidden_size, vision.num_heads, vision.intermediate_size = 160, 2, 320
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = 2, 256, 512
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    vision.depth, vision.fullatt_block_indexes, vision.out_hidden_size = 4, [1, 3], 256
    return config


def nf4(skip: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )


@pytest.fixture(scope="module", params=["qwen2.5-vl-3b", pytest.param("qwen2.5-vl-7b", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> tuple[str, Any]:
    quantization = nf4(["model.visual", "lm_head"])
    model = build_synthetic(small(request.param), quantization, "cpu", torch.bfloat16)
    keep_quantized_weights_in_place(model)
    return request.param, model


def test_placement_is_decided_by_transformers(built: tuple[str, Any]) -> None:
    _, model = built
    found = Counter((state.group, state.storage) for state in linear_states(anatomy(model)))
    assert found == {
        ("language", "nf4"): 14,
        ("vision", "bfloat16"): 20,
        ("merger", "bfloat16"): 2,
        ("lm_head", "bfloat16"): 1,
    }


def test_nothing_stays_on_the_meta_device(built: tuple[str, Any]) -> None:
    _, model = built
    assert {tensor.device.type for _, tensor in base_tensors(anatomy(model))} == {"cpu"}


def test_a_tied_head_is_the_table_and_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Counter[str]()

    def counting(parts: Any, name: str, *rest: Any) -> torch.Tensor:
        drawn[name.rpartition(".")[0].rpartition(".")[2]] += 1
        return draw(parts, name, *rest)

    monkeypatch.setattr(synthetic, "draw", counting)
    model = build_synthetic(small("qwen2.5-vl-3b", tiny=True), None, "cpu", torch.bfloat16)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert (drawn["embed_tokens"], drawn["lm_head"]) == (1, 0), "600 MiB of a 3B model for nothing"


def test_activations_neither_explode_nor_collapse(built: tuple[str, Any]) -> None:
    name, model = built
    batch = make_batch(synthetic_processor(name), scenes(0, 1)[:1])
    with torch.no_grad(), tapped(anatomy(model)) as tap:
        logits = model(**batch).logits.float()
    features = tap.vision[0].features.float()
    assert 0.1 < features.std() < 10
    assert 0.1 < logits.std() < 10, "of order one, or 16-bit rounding of logits drowns what is compared"
    assert len(features.unique(dim=0)) == len(features), "visual tokens must differ for routing to be judged"


def test_the_same_seed_gives_the_same_weights() -> None:
    one, same = (
        build_synthetic(small("qwen2.5-vl-7b", tiny=True), None, "cpu", torch.bfloat16, seed=3) for _ in range(2)
    )
    for (name, a), (_, b) in zip(base_tensors(anatomy(one)), base_tensors(anatomy(same)), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="Transformers 4 matches parts of names")
def test_the_silent_skip_list_is_silent_here_too() -> None:
    model = build_synthetic(small("qwen2.5-vl-7b", tiny=True), nf4(["visual", "lm_head"]), "cpu", torch.bfloat16)
    quantized = {state.group for state in linear_states(anatomy(model)) if state.is_4bit}
    assert "vision" in quantized, "Transformers 5 matches from the start of the name"


def test_the_processor_has_the_released_special_ids() -> None:
    tokenizer = synthetic_processor("qwen2.5-vl-7b").tokenizer
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<|im_end|>", "<|image_pad|>")}
    assert ids == {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|image_pad|>": 151655}
    text = "What colour is the shape?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["qwen2-vl-2b", "qwen2.5-vl-7b", "qwen3-vl-8b", "qwen3.5-9b"])
def test_generation_stops_where_the_template_ends_a_turn(name: str) -> None:
    settings, token = (
        generation_config(released_config(name)),
        synthetic_processor(name).tokenizer.convert_tokens_to_ids,
    )
    assert settings.eos_token_id == [token("<|im_end|>"), token("<|endoftext|>")]
    assert settings.pad_token_id == token("<|endoftext|>")


def test_a_thinking_family_has_its_own_tokens_and_template() -> None:
    processor, config = synthetic_processor("qwen3.5-9b"), released_config("qwen3.5-9b")
    token = processor.tokenizer.convert_tokens_to_ids
    assert token("<|endoftext|>") == config.text_config.eos_token_id
    assert token("<|vision_start|>") == config.vision_start_token_id
    assert (token("<|image_pad|>"), token("<|video_pad|>")) == (config.image_token_id, config.video_token_id)
    assert (token("<think>"), token("</think>")) == (248068, 248069)
    batch = make_batch(processor, scenes(0, 1)[:1], answers=True)
    assert "<think>\n\n</think>\n\n" in processor.tokenizer.decode(batch["input_ids"][0])
    assert (processor.image_processor.size.shortest_edge, processor.image_processor.patch_size) == (65536, 16)
