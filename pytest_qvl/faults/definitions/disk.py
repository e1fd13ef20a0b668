"""Adapters and checkpoints that are not what was saved, or are put on another base."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.adapters import another_adapter
from pytest_qvl.faults.tools import after, all_of, attribute, load_again, name_of, values
from pytest_qvl.models.adapters import (
    ADAPTER_FILE,
    adapted_layers,
    adapter_parameters,
    chosen_adapter,
    save_adapter,
)
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import language_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

    Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


@contextmanager
def trained(case: Case, deviation: float) -> Iterator[None]:
    """Give the adapter's B matrices random values: an adapter that has learned something else."""
    import torch

    generator = torch.Generator().manual_seed(1)

    def random(weight: torch.Tensor) -> torch.Tensor:
        return torch.randn(weight.shape, generator=generator, device="cpu").mul(deviation).to(weight.dtype)

    matrices = [p for n, p in adapter_parameters(anatomy(case.model)).items() if ".lora_B." in n]
    with all_of([values(p, random) for p in matrices]):
        yield


@contextmanager
def scaled(case: Case, factor: float) -> Iterator[None]:
    """Apply the adapter with `factor` times its scaling."""
    layers = adapted_layers(anatomy(case.model)).values()
    new = [{name: value * factor for name, value in layer.scaling.items()} for layer in layers]
    with all_of([attribute(layer, "scaling", s) for layer, s in zip(layers, new, strict=True)]):
        yield


@fault(
    "adapter-of-another-base",
    "The adapter was trained on another base model.",
    target="adapter",
    check="alignment",
    expected_words=("with the adapter on, answers are lost", "answers are right"),
    source="huggingface/trl#6591",
)
def _another_base(case: Case) -> Iterator[None]:
    with trained(case, 0.3):
        yield


@fault(
    "alpha-taken-for-scaling",
    "lora_alpha is taken for alpha / r: an adapter that is harmless as saved is applied 8 times as strongly.",
    target="adapter",
    check="adapter_census",
    expected_words=("{language} adapted layers are not applied with the factor", "(16 instead of 2)"),
    source="vllm-project/vllm#39278",
)
def _alpha(case: Case) -> Iterator[None]:
    with trained(case, 0.03), scaled(case, 8):
        yield


@fault(
    "keys-of-half-the-layers-dropped",
    "A release renamed modules: only half of the saved adapter finds its place.",
    target="adapter",
    check="adapter_census",
    expected_words=("{behind_inputs} modules that were asked for have no adapter", "down_proj"),
    source="huggingface/transformers#38627, #42701, illuin-tech/colpali#424",
)
def _half_dropped(case: Case) -> Iterator[None]:
    from dataclasses import replace

    parts = anatomy(case.model)
    inputs = [name_of(parts, linear) for layer in language_layers(parts) for linear in layer.inputs]
    found = replace(case.lora_config, target_modules="|".join(map(re.escape, inputs)))
    with another_adapter(case, found, asked=case.lora_config):
        yield


@fault(
    "merged-and-still-active",
    "The adapter was merged into the weights and is applied once more on top.",
    target="adapter",
    check="alignment",
    expected_words=("with the adapter on, answers are lost", "answers are right"),
    source="huggingface/peft#2321, #2586",
)
def _merged_twice(case: Case) -> Iterator[None]:
    adapter = chosen_adapter(anatomy(case.model))

    def once_more(layer: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        down, up = layer.lora_A[adapter], layer.lora_B[adapter]
        added = up(down(args[0].to(down.weight.dtype))) * layer.scaling[adapter]
        doubled: torch.Tensor = output + added.to(output.dtype)
        return doubled

    with trained(case, 0.1), after(list(adapted_layers(anatomy(case.model)).values()), once_more):
        yield


@contextmanager
def _saved(case: Case) -> Iterator[Path]:
    """Save an adapter with random B matrices to a folder, and put the case's own weights back."""
    with TemporaryDirectory(prefix="qvl-fault-") as name:
        with trained(case, 0.02):
            save_adapter(case.model, Path(name))
        yield Path(name)


@fault(
    "adapter-of-an-old-layout",
    "The adapter was saved when the language backbone was model.layers: it loads as zeros, with a warning only.",
    target="load",
    check="adapter_roundtrip",
    expected_words=(
        "{adapter} adapter tensors are not bitwise those of",
        "0 in the model",
        "the adapter was never loaded",
    ),
    source="huggingface/transformers#38627, illuin-tech/colpali#424, unslothai/unsloth-zoo#1234",
    transformers=(5, 10),
)
def _old_layout(case: Case) -> Iterator[None]:
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    with _saved(case) as folder:
        file = folder / ADAPTER_FILE
        old = {name.replace(".language_model.", "."): value for name, value in load_file(file).items()}
        save_file(old, file, metadata={"format": "pt"})
        base = case.load(dtype=case.policy.compute_dtype, lora=None)
        case.model = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        case.adapter_folder = folder
        yield


@fault(
    "checkpoint-of-another-step",
    "The model holds another training step's adapter than the folder that is to be shipped.",
    target="adapter",
    check="adapter_roundtrip",
    expected_words=("{language} of {adapter} adapter tensors are not bitwise those of", "lora_B"),
    source="huggingface/peft#2586",
)
def _another_step(case: Case) -> Iterator[None]:
    with _saved(case) as folder, trained(case, 0.01):
        case.adapter_folder = folder
        yield


@fault(
    "saving-drops-a-layer",
    "save_pretrained() leaves one layer's matrices out of the file.",
    target="run",
    check="adapter_roundtrip",
    expected_words=(
        "2 of {adapter} adapter tensors of the model are not in what was saved",
        "keep the values they were initialised",
    ),
    source="huggingface/transformers#38489",
)
def _dropped_on_saving(case: Case) -> Iterator[None]:
    from safetensors.torch import load_file, save_file

    parts, real = anatomy(case.model), case.model.save_pretrained
    lost = name_of(parts, language_layers(parts)[0].inputs[0])

    def save(folder: Any, **options: Any) -> None:
        real(folder, **options)
        file = Path(folder) / ADAPTER_FILE
        kept = {name: value for name, value in load_file(file).items() if f".{lost}." not in name}
        save_file(kept, file, metadata={"format": "pt"})

    with attribute(case.model, "save_pretrained", save):
        yield


@fault(
    "two-adapters-attached",
    "A second adapter was left on the model beside the one that is trained.",
    target="adapter",
    check="adapter_census",
    expected_words=("does not have the size of its config", "trainable parameters instead of"),
    source="huggingface/trl#3196",
)
def _two(case: Case) -> Iterator[None]:
    model: Any = case.model
    model.add_adapter("left-over", case.lora_config)
    for name, parameter in adapter_parameters(anatomy(model)).items():
        if "left-over" in name:
            parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.delete_adapter("left-over")
        model.set_adapter("default")


@contextmanager
def changed_checkpoint(case: Case, change: Change) -> Iterator[Path]:
    """A copy of the case's checkpoint whose tensors, by name on disk, `change` has replaced."""
    from safetensors.torch import load_file, save_file

    with TemporaryDirectory(prefix="qvl-fault-") as name:
        folder = Path(shutil.copytree(case.subject.source.location, Path(name) / "checkpoint"))
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
        yield folder


@contextmanager
def loaded_from_changed(case: Case, change: Change) -> Iterator[None]:
    """The model of such a checkpoint in place of the case's."""
    with changed_checkpoint(case, change) as folder:
        load_again(case, folder=folder)
        yield


def rolled_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of the head moved by one."""
    return {**tensors, "lm_head.weight": tensors["lm_head.weight"].roll(1, 0)}


def _without(case: Case, part: str) -> Iterator[None]:
    with loaded_from_changed(case, lambda tensors: {n: t for n, t in tensors.items() if part not in n}):
        yield


@fault(
    "checkpoint-without-head",
    "The checkpoint has no lm_head, and config.json does not tie it: the head is random.",
    target="load",
    check="checkpoint_complete",
    expected_words=("lacks 1 tensor (lm_head.weight)", "random values", "tie_word_embeddings"),
    source="huggingface/transformers#45857",
    requires=("checkpoint file", "untied head"),
)
def _without_head(case: Case) -> Iterator[None]:
    yield from _without(case, "lm_head")


@fault(
    "checkpoint-without-a-vision-block",
    "An upload broke off: one block of the vision tower is random.",
    target="load",
    check="checkpoint_complete",
    expected_words=("lacks 12 tensors (model.visual.blocks.2.", "random values", "not complete"),
    requires=("checkpoint file",),
)
def _without_block(case: Case) -> Iterator[None]:
    yield from _without(case, "blocks.2.")


@fault(
    "checkpoint-without-merger",
    "The checkpoint was saved without the merger: visual tokens are noise.",
    target="load",
    check="checkpoint_complete",
    expected_words=("lacks {merger_tensors} tensors (model.visual.merger.", "random values"),
    requires=("checkpoint file",),
)
def _without_merger(case: Case) -> Iterator[None]:
    yield from _without(case, "visual.merger.")


@fault(
    "adapter-left-in-the-checkpoint",
    "The model was saved with its adapter unmerged: base weights load, what was learned is dropped without an error.",
    target="load",
    check="checkpoint_complete",
    expected_words=("holds 2 tensors", "has no place for", "lora_A", "--qvl-adapter"),
    requires=("checkpoint file",),
)
def _adapter_left(case: Case) -> Iterator[None]:
    import torch

    def with_adapter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parts = anatomy(case.model)
        # On disk the language backbone may have another name than in memory.
        ending = name_of(parts, language_layers(parts)[0].inputs[0]).removeprefix(parts.roots["language"]) + ".weight"
        name = next(n for n in tensors if n.endswith(ending)).removesuffix(".weight")
        rows, columns = tensors[f"{name}.weight"].shape
        learned = {
            "lora_A": torch.ones(8, columns, device="cpu"),
            "lora_B": torch.ones(rows, 8, device="cpu"),
        }
        return {**tensors, **{f"{name}.{key}.default.weight": value for key, value in learned.items()}}

    with loaded_from_changed(case, with_adapter):
        yield


@fault(
    "checkpoint-with-nan-in-an-unused-row",
    "The embedding of a token that is hardly ever used is NaN in the checkpoint: every other prompt is answered.",
    target="load",
    check="checkpoint_complete",
    expected_words=("tensors hold NaN or infinity: model.language_model.embed_tokens.weight",),
    requires=("checkpoint file", "untied head"),
)
def _nan_row(case: Case) -> Iterator[None]:

    def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(n for n in tensors if n.endswith("embed_tokens.weight"))
        table = tensors[name].clone()
        table[-1, 0] = float("nan")
        return {**tensors, name: table}

    with loaded_from_changed(case, with_nan):
        yield
