"""Adapters in the wrong place, of the wrong size, or not the only thing that is trained."""

from __future__ import annotations

import re
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import after, all_of, attribute, name_of, values
from pytest_qvl.models.adapters import AdapterSlot, adapted_layers, adapter_parameters, chosen_adapter, save_adapter
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers, mergers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextmanager
def another_adapter(case: Case, config: Any, *, asked: Any = None) -> Iterator[None]:
    """Wrap the same base model with another adapter; `asked` is the configuration that checks are given."""
    from peft import get_peft_model

    slot, old = AdapterSlot.of(case.model), case.model
    base = anatomy(old).base
    slot.detach()
    # A copy, because PEFT writes into it: "all-linear" becomes a list of names.
    made = AdapterSlot.of(get_peft_model(base, deepcopy(config)))
    case.model, case.lora_config = made.peft_model.eval(), config if asked is None else asked
    try:
        yield
    finally:
        made.detach()
        slot.attach()


def _config(case: Case, **changed: Any) -> Any:
    from dataclasses import replace

    return replace(case.lora_config, **changed)


@fault(
    "seven-names-hit-vision",
    "Seven target names also match gate_proj, up_proj and down_proj of the vision blocks.",
    target="adapter",
    check="adapter_census",
    expected_words=("LoRA leaked into vision ({vision_mlp})", "name the language backbone"),
    source="yiqiao-yin/deepspeed-course#31, sgl-project/sglang#11519",
    requires=("gated vision MLP",),
)
def _seven_names(case: Case) -> Iterator[None]:
    with another_adapter(case, _config(case, target_modules=SEVEN)):
        yield


@fault(
    "all-linear",
    'target_modules="all-linear" adapts vision tower and merger too.',
    target="adapter",
    check="adapter_census",
    expected_words=("LoRA leaked into vision ({vision}), merger ({merger})", "all-linear"),
    source="huggingface/peft#2267, 2U1/Qwen-VL-Series-Finetune#61",
)
def _all_linear(case: Case) -> Iterator[None]:
    with another_adapter(case, _config(case, target_modules="all-linear")):
        yield


@fault(
    "adapter-on-one-merger-layer",
    "One LoRA too many, on one layer of the merger.",
    target="adapter",
    check="adapter_census",
    expected_words=("LoRA leaked into merger (1)", "model.visual.merger.{merger_last}"),
)
def _one_merger_layer(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    last = name_of(parts, next(mergers(parts)).second)
    regex = f"{case.lora_config.target_modules}|{re.escape(last)}"
    with another_adapter(case, _config(case, target_modules=regex)):
        yield


@fault(
    "regex-matches-half",
    "After a rename the regex matches only some of the modules that were meant.",
    target="adapter",
    check="adapter_census",
    expected_words=("{beyond_two_layers} modules that were asked for have no adapter", "language_model.layers."),
    source="axolotl-ai-cloud/axolotl#2792, #2735",
)
def _regex_matches_half(case: Case) -> Iterator[None]:
    regex = case.lora_config.target_modules.replace("language_model.*", r"language_model\.layers\.[01]\..*")
    with another_adapter(case, _config(case, target_modules=regex), asked=case.lora_config):
        yield


@fault(
    "head-target-dropped",
    "lm_head is asked for, and silently dropped from target_modules.",
    target="adapter",
    check="adapter_census",
    expected_words=("1 modules that were asked for have no adapter: lm_head",),
    source="unslothai/unsloth#9326",
)
def _head_target_dropped(case: Case) -> Iterator[None]:
    case.lora_config = _config(case, target_modules=case.lora_config.target_modules + "|lm_head")
    yield


@fault(
    "merger-adapter-dropped",
    "The merger is asked for, and the framework leaves it out.",
    target="adapter",
    check="adapter_census",
    expected_words=("match nothing in language",),
    source="hiyouga/LlamaFactory#6754, #8900",
)
def _merger_adapter_dropped(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    merger = next(mergers(parts))
    linears = [name_of(parts, linear) for linear in (merger.first, merger.second)]
    case.lora_config = _config(case, target_modules="|".join(map(re.escape, linears)))
    yield


@fault(
    "rank-halved",
    "The adapter has rank 4 where 8 was asked for.",
    target="adapter",
    check="adapter_census",
    expected_words=("does not have the size of its config (r=8)", "trainable parameters instead of"),
)
def _rank_halved(case: Case) -> Iterator[None]:
    with another_adapter(case, _config(case, r=4), asked=case.lora_config):
        yield


@fault(
    "freeze-flag-inverted",
    "The merger is trained in full beside the adapter: ten times the parameters.",
    target="model",
    check="adapter_census",
    expected_words=("tensors that are not the adapter's require grad", "merger ({merger_tensors})"),
    source="modelscope/ms-swift#6079, #7318",
)
def _freeze_flag(case: Case) -> Iterator[None]:
    for parameter in anatomy(case.model).merger.parameters():
        parameter.requires_grad_(True)
    yield


@fault(
    "biases-trained",
    'bias="all" trains every bias of the base model, the vision tower\'s too.',
    target="adapter",
    check="adapter_census",
    expected_words=("bias='all' in the LoRA config trains them", "vision"),
)
def _biases_trained(case: Case) -> Iterator[None]:
    with another_adapter(case, _config(case, bias="all")):
        yield


def _trainable(case: Case) -> list[Any]:
    return [p for p in case.model.parameters() if p.requires_grad]


@fault(
    "optimizer-before-adapter",
    "The optimizer was made before the adapter was attached and holds none of it.",
    target="run",
    check="adapter_census",
    expected_words=("the optimizer misses {adapter} of {adapter}", "made before the adapter was attached"),
)
def _optimizer_before(case: Case) -> Iterator[None]:
    import torch

    case.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1, device=case.subject.device))])
    yield


@fault(
    "optimizer-holds-vision",
    "The optimizer was made from all parameters, weight decay included.",
    target="run",
    check="adapter_census",
    expected_words=("the optimizer holds", "tensors that are not trainable", "model.visual"),
)
def _optimizer_holds_vision(case: Case) -> Iterator[None]:
    import torch

    vision = list(anatomy(case.model).vision_tower.parameters())
    case.optimizer = torch.optim.AdamW([*_trainable(case), *vision])
    yield


@fault(
    "adapter-ignores-disabling",
    "One adapted layer keeps its adapter inside disable_adapter(): a wrong reference for DPO.",
    target="adapter",
    check="adapter_neutrality",
    expected_words=("disabled adapter", "first at the output of model.language_model.layers.1.mlp.up_proj"),
    source="huggingface/trl#6591, unslothai/unsloth#2736",
)
def _ignores_disabling(case: Case) -> Iterator[None]:
    name = "model.language_model.layers.1.mlp.up_proj"
    layer, adapter = adapted_layers(anatomy(case.model))[name], chosen_adapter(anatomy(case.model))

    def forward(x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        low = b(a(x.to(a.weight.dtype))) * layer.scaling[adapter]
        made: torch.Tensor = layer.base_layer(x) + low.to(x.dtype)
        return made

    weight = layer.lora_B[adapter].weight
    with attribute(layer, "forward", forward), values(weight, lambda b: b + 0.05):
        yield


@fault(
    "adapter-not-neutral",
    "A patched LoRA layer rounds its output once more than the base layer does.",
    target="adapter",
    check="adapter_neutrality",
    expected_words=("adapter with B = 0", "first at the output of model.language_model.layers.0.{first_input}"),
    source="huggingface/transformers#33294",
)
def _not_neutral(case: Case) -> Iterator[None]:
    layer = language_layers(anatomy(case.model))[0].inputs[0]

    def rounded(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 2**-7)

    with after([layer], rounded):
        yield


@fault(
    "adapter-for-inference",
    "The adapter was loaded with is_trainable=False: nothing is trained.",
    target="adapter",
    check="adapter_census",
    expected_words=("no adapter parameter requires grad", "is_trainable=False"),
    silent=False,
)
def _for_inference(case: Case) -> Iterator[None]:
    for parameter in adapter_parameters(anatomy(case.model)).values():
        parameter.requires_grad_(False)
    yield


@contextmanager
def _loaded_from_a_folder(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[Path]:
    """The adapter saved with its B matrices changed, and the same in the model, as if it had been loaded from there."""
    from pytest_qvl.checks.support.lora import zero_initialised_matrices

    matrices = list(zero_initialised_matrices(adapter_parameters(anatomy(case.model))).values())
    with TemporaryDirectory(prefix="qvl-fault-") as name, all_of([values(p, change) for p in matrices]):
        case.adapter_folder = save_adapter(case.model, Path(name))
        yield case.adapter_folder


@fault(
    "adapter-without-effect",
    "The adapter in the folder was saved before its training: B is zero, and the model is the base model.",
    target="adapter",
    check="adapter_roundtrip",
    expected_words=("the adapter does nothing: {language} of {language} adapted layers", "B is all zero"),
    source="vllm-project/vllm#39278, huggingface/transformers#38627",
)
def _without_effect(case: Case) -> Iterator[None]:
    with _loaded_from_a_folder(case, lambda b: b * 0):
        yield


@fault(
    "adapter-not-finite",
    "The training diverged before the checkpoint: one B matrix after the other holds NaN.",
    target="adapter",
    check="adapter_roundtrip",
    expected_words=("{language} of {adapter} adapter tensors", "NaN or infinity", "take an earlier checkpoint"),
)
def _not_finite(case: Case) -> Iterator[None]:
    with _loaded_from_a_folder(case, lambda b: b + float("nan")):
        yield


@fault(
    "adapter-names-another-base",
    "The adapter was trained for a model of another family, and its shapes fit this one all the same.",
    target="adapter",
    check="adapter_roundtrip",
    expected_words=("the adapter was trained for 'Qwen/Qwen", "load it on the model it was trained for"),
    source="huggingface/trl#6591",
)
def _names_another_base(case: Case) -> Iterator[None]:
    import json

    is_second = anatomy(case.model).config.model_type == "qwen2_vl"
    other = "Qwen/Qwen3-VL-8B-Instruct" if is_second else "Qwen/Qwen2-VL-2B-Instruct"
    with _loaded_from_a_folder(case, lambda b: b + 0.02) as folder:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": other}))
        yield


@fault(
    "matrix-in-two-layers",
    "Two layers were given one and the same A matrix: what one learns is written into the other.",
    target="adapter",
    check="adapter_census",
    expected_words=(
        "1 adapter matrices are one tensor in several modules",
        "layers.0.{first_output}.lora_A",
        "layers.1.{first_output}.lora_A",
    ),
)
def _matrix_in_two_layers(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    first, second = (layer.output.lora_A for layer in language_layers(parts)[:2])
    kept = second[chosen_adapter(parts)]
    second[chosen_adapter(parts)] = first[chosen_adapter(parts)]
    try:
        yield
    finally:
        second[chosen_adapter(parts)] = kept


@fault(
    "second-adapter-active",
    "A frozen second adapter was left active and changes every answer.",
    target="adapter",
    check="adapter_census",
    expected_words=("2 adapters take part in every forward (default, left-over)", "describes one"),
    source="huggingface/trl#3196",
)
def _second_active(case: Case) -> Iterator[None]:
    model: Any = case.model
    model.add_adapter("left-over", _config(case, init_lora_weights=False))
    model.base_model.set_adapter(["default", "left-over"])
    model.set_requires_grad("left-over", requires_grad=False)
    try:
        yield
    finally:
        model.delete_adapter("left-over")
        model.set_adapter("default")
