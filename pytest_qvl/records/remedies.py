"""What a broken check usually comes from, and what to do first: two sentences for each."""

from __future__ import annotations

from typing import NamedTuple


class Remedy(NamedTuple):
    """Where to look first.

    Attributes:
        cause: What usually causes it.
        fix: What to do about that.
    """

    cause: str
    fix: str


_TRANSFORMERS = "Try the release of Transformers before or after; the threads of the faults below say which are meant."
_OVERRIDE = "Look at what replaces it: a patched forward, a fused kernel, a hook, an override of the fixture."

REMEDIES = {
    "peak_vram": Remedy(
        "A phase needs more memory than its limit: longer batches, larger images, another attention kernel, or "
        "something stays allocated beside the model.",
        "Look at the table for the phase, lower max_pixels or the batch, turn on gradient checkpointing; "
        "`pytest-qvl forecast` says what each costs.",
    ),
    "forecast_fits_card": Remedy(
        "The configuration needs more than the card that --qvl-card names.",
        "Take a smaller batch, smaller images, gradient checkpointing or a paged optimizer; `pytest-qvl forecast` says "
        "what each costs.",
    ),
    "forecast_agrees": Remedy(
        "The model allocates what the forecast does not know: a patched forward, another kernel or release of torch.",
        "Compare the phases in the table with those of `pytest-qvl forecast` for the same batch.",
    ),
    "checkpoint_complete": Remedy(
        "A folder was saved partly, by another class, or with names of another release; what is missing is random.",
        "Save it again with save_pretrained of the class that loads it, and heed the load report of Transformers.",
    ),
    "weights_as_stored": Remedy(
        "Weights changed after they were stored: a merge into 4 bits, a cast, a download that was cut off, a shard of "
        "another run.",
        "Download or save it again; merge an adapter in 16 bits and quantize afterwards.",
    ),
    "quantization_census": Remedy(
        "llm_int8_skip_modules names modules by paths that this release does not have, or replaces the default list, "
        "so that lm_head or the vision tower is quantized.",
        'Name them as they are called from the root (["model.visual", "lm_head"]), and print the class of each linear.',
    ),
    "adapter_census": Remedy(
        "target_modules matches the vision tower's linears too (q_proj and qkv differ by family), or misses some.",
        "Give a regular expression for the language model alone, and set modules_to_save only where you mean it.",
    ),
    "adapter_roundtrip": Remedy(
        "The adapter is saved under other names than it is loaded by, or in another dtype.",
        "Save with PeftModel.save_pretrained, load with PeftModel.from_pretrained onto the same class and release.",
    ),
    "adapter_neutrality": Remedy(
        "A fresh adapter's B is not zero, dropout is on, or something acts besides the adapter (DoRA, a trained bias).",
        "Call eval(), and look at init_lora_weights and at modules_to_save.",
    ),
    "placeholder_counts": Remedy(
        "Text and images were processed apart, cut off at max_length, or with other pixel limits than the model's.",
        "Process both in one call, without truncation, and with the checkpoint's own processor.",
    ),
    "feature_scatter": Remedy(
        "The mask that finds placeholders is shifted, inverted or of another token id; or pixels were cast on the way.",
        _OVERRIDE,
    ),
    "visual_token_order": Remedy("The reordering for window attention is not undone after the tower.", _OVERRIDE),
    "malformed_inputs": Remedy(
        "A batch whose pixels and placeholders do not belong together is accepted.", _TRANSFORMERS
    ),
    "causality": Remedy(
        "The attention mask is missing or wrong: a fused kernel that ignores it, packed rows, a bidirectional mask.",
        "Run with attn_implementation='sdpa' or 'eager'; where that holds, it is the kernel.",
    ),
    "image_isolation": Remedy(
        "Images of a batch attend to one another: cu_seqlens of the tower are wrong or are not used.",
        "Run with attn_implementation='sdpa'; where that holds, it is the kernel.",
    ),
    "picture_pairing": Remedy(
        "A collator sorts, drops or doubles samples or their images apart from each other.",
        "Build prompt and images of each row from the same sample, in the sample's order.",
    ),
    "image_preprocessing": Remedy(
        "Pixel limits, mean, deviation or the resampling filter are not those of the model's family.",
        "Load the processor from the checkpoint, without arguments of your own.",
    ),
    "mrope_positions": Remedy(
        "Positions are counted as for text alone, or are left over from another batch.",
        "Hand over image_grid_thw and mm_token_type_ids, and no position_ids of your own: the model computes them.",
    ),
    "decode_positions": Remedy("rope_deltas or the cache's length are wrong while decoding.", _TRANSFORMERS),
    "position_state": Remedy("rope_deltas of an earlier call stay in the model.", _TRANSFORMERS),
    "vision_stability": Remedy(
        "The vision tower is quantized, runs in float16 with activations beyond its range, or is not the base's.",
        "Keep it in bfloat16 (float32 on cards without), and name model.visual in llm_int8_skip_modules.",
    ),
    "greedy_is_argmax": Remedy(
        "generation_config or a logits processor changes greedy decoding: a penalty, a ban, a temperature.",
        "Print model.generation_config, and pass do_sample=False, repetition_penalty=1.0.",
    ),
    "generation_repeatable": Remedy(
        "Dropout is on, or a kernel is not deterministic.",
        "Call eval(), and set CUBLAS_WORKSPACE_CONFIG=:4096:8 to see whether a kernel is meant.",
    ),
    "generation_batch_invariance": Remedy(
        "Rows are padded on the right, padding is attended to, or positions count it.",
        "Set tokenizer.padding_side='left' and hand over attention_mask.",
    ),
    "generation_cache_invariance": Remedy(
        "The key-value cache is quantized, cut off, or filled at wrong places.",
        "Run with use_cache=False; where answers differ, it is the cache's implementation.",
    ),
    "generation_wellformed": Remedy(
        "Logits are not finite, the end token is unknown, or the model repeats itself after training.",
        "Look at eos_token_id of generation_config, and at the compute dtype.",
    ),
    "generation_as_found": Remedy(
        "The model was left in train mode, or generation_config bans or cuts answers.",
        "Call eval() before generating, and look at max_length, bad_words_ids and penalties.",
    ),
    "alignment": Remedy(
        "The model does not look at its images any more: features are lost, shuffled or ignored after training.",
        "See which of the promises 4 to 7 is broken too; where none is, the adapter learned to answer without them.",
    ),
    "training_step": Remedy(
        "The loss does not reach the adapter: gradients are off, inputs do not require them under checkpointing, or "
        "the learning rate is far off.",
        "Call prepare_model_for_kbit_training and enable_input_require_grads before attaching the adapter.",
    ),
    "vision_not_backpropagated": Remedy(
        "Something of the vision tower requires gradients, so that backward runs through it for nothing.",
        "Freeze model.visual, and restrict LoRA to the language model.",
    ),
    "label_mask": Remedy(
        "The collator supervises prompts, image placeholders or padding, no answer at all, or a part of a thought.",
        "Set labels to -100 everywhere but on the answer and its end token, and render thoughts by the chat template.",
    ),
    "training_collation": Remedy(
        "Rows are cut off, padded inside, or carry another sample's answer.",
        "Pad on the right, and do not truncate rows with images.",
    ),
    "batch": Remedy(
        "A collator hands over what the model does not take: placeholders without pixels, padding that is attended to, "
        "labels on prompts or on nothing.",
        "Each finding names kind, row, token and usual cause; compare with what the processor makes of that sample.",
    ),
    "packing_isolation": Remedy(
        "Attention or positions do not notice where packed samples begin: position_ids without text positions, a mask "
        "beside them, a kernel or a patch that does not look.",
        "Give position_ids as (4, rows, length), text positions first, without an attention_mask; or train unpacked.",
    ),
    "loss_arithmetic": Remedy(
        "The mean is taken over the wrong number of tokens, above all under gradient accumulation.",
        "Let the trainer hand over num_items_in_batch, or divide by all supervised tokens of one optimizer step.",
    ),
    "gradient_arithmetic": Remedy(
        "A backward pass is wrong: a custom autograd function, a fused kernel, checkpointing that runs other code.",
        "Run without the fused kernel, and without checkpointing; the layer is named.",
    ),
    "frozen_vision": Remedy(
        "The optimizer holds parameters of the base, or a step changes them in place.",
        "Give the optimizer the parameters with requires_grad only, after the adapter is attached.",
    ),
    "layer_arithmetic": Remedy(
        "A layer does not compute what it is defined to: a patched forward, a wrong eps, a scaling, a swapped weight.",
        _OVERRIDE,
    ),
    "golden_record": Remedy(
        "An installed release computes something else than those that confirmed the record.",
        "Compare the versions with those that the record names; layer_arithmetic says which layer.",
    ),
}
