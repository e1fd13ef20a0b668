"""What preparing a model for training leaves behind."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.renamed import disable_checkpointing, enable_checkpointing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_qvl.faults.case import Case

_SPARED = ("back-propagated through", "make_inputs_require_grads", "remove_vision_grad_hooks")


@fault(
    "checkpointing-hooks-vision",
    "gradient_checkpointing_enable() makes the vision tower's output require grad.",
    target="run",
    check="vision_not_backpropagated",
    expected_words=_SPARED,
    source="huggingface/peft#2880, huggingface/transformers#41993",
    transformers=(5,),
    requires=("tower's input embeddings",),
)
def _checkpointing_hooks_vision(case: Case) -> Iterator[None]:
    base = anatomy(case.model).base
    enable_checkpointing(base, {"use_reentrant": False})
    try:
        yield
    finally:
        disable_checkpointing(base)
        base.disable_input_require_grads()


def _prepared(case: Case, **options: Any) -> Any:
    from peft import get_peft_model, prepare_model_for_kbit_training

    base = case.load(dtype=case.policy.compute_dtype, lora=None)
    prepared = prepare_model_for_kbit_training(base, **options)
    # A copy, because PEFT writes into the configuration what it made of it.
    return get_peft_model(prepared, deepcopy(case.lora_config)).eval()


@fault(
    "kbit-hooks-vision",
    "prepare_model_for_kbit_training() hooks the vision patch embedding, twice.",
    target="load",
    check="vision_not_backpropagated",
    expected_words=("make_inputs_require_grads (2)", "remove_vision_grad_hooks"),
    source="bitsandbytes-foundation/bitsandbytes#1569",
    transformers=(5,),
    requires=("tower's input embeddings",),
)
def _kbit_hooks_vision(case: Case) -> Iterator[None]:
    case.model = _prepared(case, gradient_checkpointing_kwargs={"use_reentrant": True})
    yield


@fault(
    "hook-survives-disabling",
    "disable_input_require_grads() removes one of the two hooks of k-bit preparation.",
    target="load",
    check="vision_not_backpropagated",
    expected_words=("make_inputs_require_grads (1)", "all of them"),
    source="bitsandbytes-foundation/bitsandbytes#1569",
    transformers=(5,),
    requires=("tower's input embeddings",),
)
def _hook_survives(case: Case) -> Iterator[None]:
    case.model = _prepared(case, gradient_checkpointing_kwargs={"use_reentrant": True})
    anatomy(case.model).base.disable_input_require_grads()
    yield


@fault(
    "pixels-require-grad",
    "A collator hands over pixel_values that require grad.",
    target="batch",
    check="vision_not_backpropagated",
    expected_words=("back-propagated through", "because pixel_values do"),
)
def _pixels_require_grad(case: Case) -> Iterator[None]:
    case.collators.append(lambda batch, _: {**batch, "pixel_values": batch["pixel_values"].requires_grad_(True)})
    yield


@fault(
    "reentrant-without-hooks",
    "Reentrant checkpointing where no input requires grad: no gradient reaches any adapter.",
    target="run",
    check="training_step",
    expected_words=("has no path to", "use_reentrant"),
    source="huggingface/peft#2880, QwenLM/Qwen-VL#490",
    silent=False,
)
def _reentrant(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    enable_checkpointing(parts.base, {"use_reentrant": True})
    # PreTrainedModel keeps handles of some hooks only; all of them are named alike.
    for module in (parts.embeddings, parts.patch_embed):
        hooks: Any = module._forward_hooks
        for key in [k for k, h in hooks.items() if getattr(h, "__name__", "") == "make_inputs_require_grads"]:
            del hooks[key]
    try:
        yield
    finally:
        disable_checkpointing(parts.base)
