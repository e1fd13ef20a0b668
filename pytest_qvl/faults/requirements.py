"""What a model needs for a fault to be possible on it, as data: a fault that a model cannot carry says why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_qvl.checks.support.golden_data import GOLDEN_FILE
from pytest_qvl.checks.support.thoughts import thinking_template
from pytest_qvl.evidence import CannotJudge
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.layers import centred_on_zero, family_of, language_layers
from pytest_qvl.models.state import preserved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_qvl.faults.case import Case

Requirement = Literal[
    "knowledge",
    "untied head",
    "window attention",
    "gated vision MLP",
    "mrope sections in the module",
    "axes in runs",
    "DeepStack",
    "linear attention",
    "value heads that share a key head",
    "gains that bfloat16 rounds",
    "attention in every layer",
    "silence without type ids",
    "greedy releases",
    "norms of q and k",
    "checkpoint file",
    "golden record",
    "biases of q, k and v",
    "CLIP's normalisation",
    "tower's input embeddings",
    "time of videos",
    "times in words",
    "thoughts in the template",
    "CPU",
    "CUDA",
]

# Checks that compare answers: of a model that answers nothing they judge nothing.
BY_CHECK: dict[str, Requirement] = {"alignment": "knowledge", "peak_vram": "CUDA"}


def _knowledge(case: Case) -> bool:
    return case.reference.has_knowledge


def _untied_head(case: Case) -> bool:
    return not anatomy(case.model).config.tie_word_embeddings


def _window_attention(case: Case) -> bool:
    return hasattr(anatomy(case.model).vision_tower, "fullatt_block_indexes")


def _gated_vision_mlp(case: Case) -> bool:
    block: Any = anatomy(case.model).blocks[0]
    return hasattr(block.mlp, "down_proj")


def _sections_in_the_module(case: Case) -> bool:
    parts = anatomy(case.model)
    sections = getattr(parts.language_backbone.rotary_emb, "mrope_section", ())
    # Where axes take turns, one that asks for more than there are turns gets no more: other sections are the same ones.
    fits = not family_of(parts).interleaved or 3 * max(sections[1:], default=0) <= sum(sections)
    return len(set(sections)) > 1 and fits


def _axes_in_runs(case: Case) -> bool:
    return not family_of(anatomy(case.model)).interleaved


def _deepstack(case: Case) -> bool:
    return hasattr(anatomy(case.model).vision_tower, "deepstack_merger_list")


def _linear_attention(case: Case) -> bool:
    return any(not layer.attends for layer in language_layers(anatomy(case.model)))


def _shared_key_heads(case: Case) -> bool:
    mixers = (layer.attention for layer in language_layers(anatomy(case.model)) if not layer.attends)
    return any(mixer.num_v_heads > mixer.num_k_heads for mixer in mixers)


def _rounded_gains(case: Case) -> bool:
    parts = anatomy(case.model)
    norms = (norm for layer in language_layers(parts) for norm in layer.norms if centred_on_zero(parts, norm))
    gains = (1 + norm.weight.detach().float() for norm in norms)
    return any(bool((gain.bfloat16() != gain).any()) for gain in gains)


def _silent_without_type_ids(case: Case) -> bool:
    import torch

    batch = case.batch()
    batch.pop("mm_token_type_ids", None)
    try:
        with preserved(case.model, training=False), torch.no_grad():
            case.model(**batch, logits_to_keep=1)
    except ValueError as error:
        return "mm_token_type_ids" not in str(error)
    return True


def _greedy_releases(case: Case) -> bool:
    return not family_of(anatomy(case.model)).samples


def _head_norms(case: Case) -> bool:
    return any(layer.head_norms for layer in language_layers(anatomy(case.model)))


def _checkpoint_file(case: Case) -> bool:
    source = case.subject.source
    return source.kind in ("embedded", "local") and (Path(source.location) / "model.safetensors").is_file()


def _golden_record(case: Case) -> bool:
    return (Path(case.subject.source.location) / GOLDEN_FILE).is_file()


def _attention_biases(case: Case) -> bool:
    attending = (layer for layer in language_layers(anatomy(case.model)) if layer.attends)
    return next(attending).inputs[0].bias is not None


def _tower_inputs(case: Case) -> bool:
    """Whether Transformers finds the patch embedding where it looks for what to hook."""
    parts = anatomy(case.model)
    tower: Any = parts.vision_tower
    try:
        return tower.get_input_embeddings() is parts.patch_embed
    except NotImplementedError:
        return False


def _clip(case: Case) -> bool:
    return family_of(anatomy(case.model)).image_mean != (0.5, 0.5, 0.5)


def _time(case: Case) -> bool:
    return hasattr(anatomy(case.model).config.vision_config, "tokens_per_second")


def _words(case: Case) -> bool:
    return family_of(anatomy(case.model)).video_time == "words"


def _thoughts(case: Case) -> bool:
    """Whether every generation prompt puts one in front of the reply."""
    try:
        template = thinking_template(case.processor)
    except CannotJudge:
        return False
    return template is not None and all(template.openings)


def _on(device: str) -> Callable[[Case], bool]:
    return lambda case: case.subject.device == device


REQUIREMENTS: dict[Requirement, tuple[Callable[[Case], bool], str]] = {
    "knowledge": (_knowledge, "needs knowledge: these weights answer nothing, so no answer can be lost"),
    "untied head": (_untied_head, "needs an untied head: here the head is the embedding table"),
    "window attention": (_window_attention, "needs window attention: this family's vision tower has none"),
    "gated vision MLP": (_gated_vision_mlp, "needs the gated vision MLP of Qwen2.5-VL: this tower's has other layers"),
    "mrope sections in the module": (
        _sections_in_the_module,
        "needs a rotary module that keeps sections, which differ and fit; releases before 5.17 leave them to attention",
    ),
    "axes in runs": (
        _axes_in_runs,
        "needs axes of M-RoPE in runs: where they take turns, sections in the reverse order are the same ones",
    ),
    "DeepStack": (_deepstack, "needs DeepStack and learned positions in the tower: only Qwen3-VL has them"),
    "linear attention": (_linear_attention, "needs layers of linear attention: only Qwen3.5 has them"),
    "value heads that share a key head": (
        _shared_key_heads,
        "needs value heads that share a key head: with one each, any way to share them out is the same",
    ),
    "gains that bfloat16 rounds": (
        _rounded_gains,
        "needs gains that bfloat16 rounds: 1 + weight is exact where weights are 0, or norms are not centred on it",
    ),
    "attention in every layer": (
        lambda case: not _linear_attention(case),
        "needs attention in every layer: linear attention does not part samples that are packed by positions alone",
    ),
    "silence without type ids": (
        _silent_without_type_ids,
        "needs a model that lays out 1-D positions without mm_token_type_ids: this one's forward raises",
    ),
    "greedy releases": (_greedy_releases, "needs releases that answer by argmax: this family's draw replies at random"),
    "norms of q and k": (_head_norms, "needs norms of queries and keys: attention has them from Qwen3 on"),
    "checkpoint file": (_checkpoint_file, "needs a checkpoint in one file on disk, to make a damaged copy of"),
    "biases of q, k and v": (_attention_biases, "needs biases of q, k and v: this family's attention has none"),
    "CLIP's normalisation": (_clip, "needs CLIP's mean and deviation: this family's are 0.5"),
    "tower's input embeddings": (
        _tower_inputs,
        "needs a patch embedding that Transformers takes for the tower's input embeddings: it hooks no other one",
    ),
    "time of videos": (_time, "needs videos laid out by seconds: only Qwen2.5-VL lays them out so"),
    "times in words": (
        _words,
        "needs frames behind their times in words: only Qwen3-VL and Qwen3.5 have them",
    ),
    "thoughts in the template": (_thoughts, "needs a chat template that opens thoughts: only Qwen3.5 has one"),
    "golden record": (_golden_record, "needs a golden record beside the checkpoint: embedded models have one"),
    "CPU": (_on("cpu"), "CPU only"),
    "CUDA": (_on("cuda"), "CUDA only"),
}


def unmet(required: Iterable[Requirement], check: str, case: Case) -> str:
    """Why a case cannot carry a fault; empty where it can.

    Args:
        required: What the fault says it needs.
        check: The check that must catch it.
        case: A healthy case.
    """
    names = [*required, *([BY_CHECK[check]] if check in BY_CHECK else [])]
    return next((reason for met, reason in map(REQUIREMENTS.__getitem__, names) if not met(case)), "")
