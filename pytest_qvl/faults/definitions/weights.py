"""Numbers in memory, or in the checkpoint, that are not those of the model: nothing raises, answers get worse."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.definitions.disk import changed_checkpoint
from pytest_qvl.faults.tools import all_of, attribute, values
from pytest_qvl.models.adapters import base_modules
from pytest_qvl.models.anatomy import anatomy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from pytest_qvl.faults.case import Case

LAYER = "model.language_model.layers.1.mlp.up_proj"
_WRITTEN = f"{LAYER}.weight: its "


def _state(case: Case) -> Any:
    """The quantization state of one language linear."""
    weight: Any = base_modules(anatomy(case.model))[LAYER].weight
    return weight.quant_state


@fault(
    "code-book-exchanged",
    "Two entries of a layer's NF4 code book changed places: kernels for the CPU do not read it, those of a GPU do.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}code book differs in 2 of 16 elements, first at [3]",),
)
def _code_book(case: Case) -> Iterator[None]:
    def exchange(code: torch.Tensor) -> torch.Tensor:
        code[[3, 12]] = code[[12, 3]]
        return code

    with values(_state(case).code, exchange):
        yield


@contextmanager
def _block(case: Case, factor: float) -> Iterator[None]:
    """Scale the absmax of the first block whose nearest code is another one then."""
    import torch

    state = _state(case)
    codes, book = state.absmax.long(), state.state2.code
    size = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(codes)]
    wanted = factor * (book[codes] * size + state.offset)
    nearest = ((wanted - state.offset) / size)[:, None].sub(book[None]).abs().argmin(dim=1)
    block = int((nearest != codes).nonzero()[0])

    def change(absmax: torch.Tensor) -> torch.Tensor:
        absmax[block] = nearest[block].to(torch.uint8)
        return absmax

    with values(state.absmax, change):
        yield


@fault(
    "absmax-of-one-block-zero",
    "The scale of one block of 64 weights is zero, and so are they.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}absmax differs in 1 of",),
)
def _block_zero(case: Case) -> Iterator[None]:
    with _block(case, 0.0):
        yield


@fault(
    "absmax-of-one-block-halved",
    "The scale of one block of 64 weights is half of what it should be.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}absmax differs in 1 of",),
)
def _block_halved(case: Case) -> Iterator[None]:
    with _block(case, 0.5):
        yield


@fault(
    "absmax-of-one-block-2-percent-off",
    "The scale of one block of 64 weights is 2 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}absmax differs in 1 of",),
)
def _block_two_percent(case: Case) -> Iterator[None]:
    with _block(case, 1.02):
        yield


@fault(
    "nested-absmax-2-percent-off",
    "The scale that double quantization keeps for 256 block scales is 2 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}nested absmax differs in 1 of",),
)
def _nested(case: Case) -> Iterator[None]:
    def scale(absmax: torch.Tensor) -> torch.Tensor:
        absmax[0] *= 1.02
        return absmax

    with values(_state(case).state2.absmax, scale):
        yield


@fault(
    "offset-of-double-quantization-lost",
    "A layer lost the offset of its double quantization: every weight is too small.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{LAYER}.weight: the offset of its double quantization is 0 instead of",),
)
def _offset(case: Case) -> Iterator[None]:
    with values(_state(case).offset, lambda offset: offset * 0):
        yield


@fault(
    "half-of-the-packed-weights-zero",
    "The second half of a layer's packed bytes is zero, as after a copy that broke off.",
    target="model",
    check="weights_as_stored",
    expected_words=(f"{_WRITTEN}packed data differs in", "its values were lost after they were loaded"),
)
def _half_packed(case: Case) -> Iterator[None]:
    def cut(packed: torch.Tensor) -> torch.Tensor:
        packed[len(packed) // 2 :] = 0
        return packed

    weight: Any = base_modules(anatomy(case.model))[LAYER].weight
    with values(weight, cut):
        yield


@fault(
    "biases-of-q-and-v-lost",
    "The biases of all query and value projections are zero.",
    target="model",
    check="weights_as_stored",
    expected_words=("self_attn.q_proj.bias: differs in", "is zero in memory: its values were lost"),
)
def _biases(case: Case) -> Iterator[None]:
    modules = base_modules(anatomy(case.model))
    lost: list[Any] = [m.bias for n, m in modules.items() if n.endswith((".q_proj", ".v_proj")) and m.bias is not None]
    with all_of([values(bias, lambda old: old * 0) for bias in lost]):
        yield


@fault(
    "vision-bias-dropped",
    "The bias of one vision block's attention output is not there: the checkpoint has one, the module does not.",
    target="model",
    check="weights_as_stored",
    expected_words=("blocks.1.attn.proj.bias", "that the model has no place for"),
)
def _vision_bias(case: Case) -> Iterator[None]:
    projection: Any = anatomy(case.model).blocks[1].attn.proj  # type: ignore[union-attr]
    bias = projection.bias
    projection.bias = None
    try:
        yield
    finally:
        projection.bias = bias


@fault(
    "one-vision-weight-one-step-off",
    "One weight of the tower has another last bit: the smallest change that there is.",
    target="model",
    check="weights_as_stored",
    expected_words=("blocks.1.attn.proj.weight: differs in 1 of", "first at [0, 0]"),
)
def _one_bit(case: Case) -> Iterator[None]:
    import torch

    def step(weight: torch.Tensor) -> torch.Tensor:
        bits = weight.view({2: torch.int16, 4: torch.int32}[weight.itemsize])
        bits[0, 0] ^= 1
        return weight

    projection: Any = anatomy(case.model).blocks[1].attn.proj  # type: ignore[union-attr]
    with values(projection.weight, step):
        yield


@fault(
    "language-layers-exchanged",
    "The first two language layers run in the wrong order.",
    target="model",
    check="weights_as_stored",
    expected_words=("holds the values of model.language_model.layers.1.", "two layers changed places"),
)
def _exchanged(case: Case) -> Iterator[None]:
    layers = anatomy(case.model).language_backbone.layers
    layers[0], layers[1] = layers[1], layers[0]
    try:
        yield
    finally:
        layers[0], layers[1] = layers[1], layers[0]


@fault(
    "vision-blocks-exchanged",
    "Two vision blocks of the same kind run in the wrong order.",
    target="model",
    check="weights_as_stored",
    expected_words=("holds the values of model.visual.blocks.2.", "two layers changed places"),
)
def _blocks_exchanged(case: Case) -> Iterator[None]:
    blocks = anatomy(case.model).blocks
    blocks[0], blocks[2] = blocks[2], blocks[0]
    try:
        yield
    finally:
        blocks[0], blocks[2] = blocks[2], blocks[0]


@fault(
    "head-rows-moved-by-one",
    "The rows of the head are moved by one: each token's logit is its neighbour's.",
    target="model",
    check="weights_as_stored",
    expected_words=("lm_head.weight: differs in", "rows were moved by one"),
    requires=("untied head",),
)
def _head(case: Case) -> Iterator[None]:
    head: Any = base_modules(anatomy(case.model))["lm_head"]
    with values(head.weight, lambda weight: weight.roll(1, 0)):
        yield


def _settings(case: Case, name: str, change: Callable[[Any], Any], where: Callable[[str], bool]) -> Any:
    """Change an attribute of every module of the base model that has it and whose name is meant."""
    modules = base_modules(anatomy(case.model))
    meant = [m for n, m in modules.items() if where(n) and getattr(m, name, None) is not None]
    return all_of([attribute(module, name, change(getattr(module, name))) for module in meant])


@fault(
    "epsilon-of-the-tower",
    "The norms of the vision tower add 1e-2 instead of 1e-6.",
    target="model",
    check="weights_as_stored",
    expected_words=("not as config.json has it", "blocks.0.norm1: epsilon is 0.01 instead of 1e-06"),
)
def _epsilon(case: Case) -> Iterator[None]:
    def tower(name: str) -> bool:
        return name.startswith("model.visual")

    with _settings(case, "variance_epsilon", lambda _: 1e-2, tower), _settings(case, "eps", lambda _: 1e-2, tower):
        yield


@fault(
    "epsilon-of-the-language-layers",
    "The norms of the language layers add 1e-5 instead of the checkpoint's 1e-6, another library's default.",
    target="model",
    check="weights_as_stored",
    expected_words=("layers.0.input_layernorm: epsilon is 1e-05 instead of 1e-06",),
)
def _language_epsilon(case: Case) -> Iterator[None]:
    with _settings(case, "variance_epsilon", lambda _: 1e-5, lambda name: "language_model" in name):
        yield


@fault(
    "mrope-section-moved",
    "M-RoPE divides a head's frequencies among time, height and width otherwise: one more for width.",
    target="model",
    check="weights_as_stored",
    expected_words=("mrope_section is [", "not as config.json has it"),
)
def _sections(case: Case) -> Iterator[None]:
    parts = anatomy(case.model)
    rotary: Any = parts.language_backbone.rotary_emb
    changes = []
    if hasattr(rotary, "mrope_section"):
        changes.append(attribute(rotary, "mrope_section", _moved(rotary.mrope_section)))
    for layer in parts.language_backbone.layers:
        for name in ("rope_scaling", "rope_parameters"):  # where some releases read them
            kept = getattr(layer.self_attn, name, None) or {}
            if section := kept.get("mrope_section"):
                changes.append(attribute(layer.self_attn, name, {**kept, "mrope_section": _moved(section)}))
    with all_of(changes):
        yield


def _moved(section: Sequence[int]) -> list[int]:
    time, height, width = section
    return [time, height - 1, width + 1]


@contextmanager
def _rotary_base(case: Case, factor: float) -> Iterator[None]:
    rotary: Any = anatomy(case.model).language_backbone.rotary_emb

    def other(frequencies: torch.Tensor) -> torch.Tensor:
        import torch

        share = torch.arange(len(frequencies), device=frequencies.device) / len(frequencies)
        return frequencies * factor**-share

    with values(rotary.inv_freq, other):
        yield


@fault(
    "rotary-base-10-percent-off",
    "The rotary base of the language model is 10 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=("rotary_emb.inv_freq[1] is", "as of a rotary base of"),
)
def _base(case: Case) -> Iterator[None]:
    with _rotary_base(case, 1.1):
        yield


@fault(
    "rotary-base-times-1000",
    "The rotary base of the language model is a thousand times too large: another release's default.",
    target="model",
    check="weights_as_stored",
    expected_words=("rotary_emb.inv_freq[1] is", "as of a rotary base of"),
)
def _base_thousand(case: Case) -> Iterator[None]:
    with _rotary_base(case, 1000.0):
        yield


@fault(
    "frequencies-in-bfloat16",
    "The whole model was cast after it was loaded, rotary frequencies included: positions beyond 256 blur.",
    target="model",
    check="weights_as_stored",
    expected_words=("rotary_emb.inv_freq is bfloat16 instead of float32", ".half() or .to(dtype)"),
)
def _coarse(case: Case) -> Iterator[None]:
    rotary: Any = anatomy(case.model).language_backbone.rotary_emb
    frequencies = rotary.inv_freq
    rotary.inv_freq = frequencies.bfloat16()
    try:
        yield
    finally:
        rotary.inv_freq = frequencies


@fault(
    "attention-scaling-5-percent-off",
    "Attention scores of the language layers are 5 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=("layers.0.self_attn.scaling is",),
)
def _scaling(case: Case) -> Iterator[None]:
    with _settings(case, "scaling", lambda s: s * 1.05, lambda n: "language_model" in n and n.endswith("self_attn")):
        yield


@fault(
    "vision-scaling-5-percent-off",
    "Attention scores of the vision tower are 5 % too large.",
    target="model",
    check="weights_as_stored",
    expected_words=("blocks.0.attn.scaling is",),
)
def _vision_scaling(case: Case) -> Iterator[None]:
    with _settings(case, "scaling", lambda scaling: scaling * 1.05, lambda name: name.endswith(".attn")):
        yield


def _drawn_anew(case: Case, part: str) -> Iterator[None]:
    """Load a checkpoint in which a part has the values that Transformers initialises it with."""
    import torch

    def draw(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        made = {}
        for name, tensor in tensors.items():
            if part not in name:
                continue
            new = torch.full(tensor.shape, float(not name.endswith("bias")))
            if tensor.ndim > 1:
                new = torch.randn(tensor.shape, generator=generator) * 0.02
            made[name] = new.to(tensor.dtype)
        return {**tensors, **made}

    with changed_checkpoint(case, draw) as folder:
        case.model = case.load(folder=folder, dtype=case.policy.compute_dtype)
        yield


@fault(
    "checkpoint-with-a-random-tower",
    "Every tensor of the checkpoint's vision tower is there, and has the values of a fresh initialisation.",
    target="load",
    check="weights_as_stored",
    expected_words=("have weights as they were drawn", "model.visual.blocks.0", "initialised anew"),
    requires=("checkpoint file",),
)
def _random_tower(case: Case) -> Iterator[None]:
    yield from _drawn_anew(case, "visual.")


@fault(
    "checkpoint-with-a-random-vision-block",
    "One block of the checkpoint's vision tower has the values of a fresh initialisation.",
    target="load",
    check="weights_as_stored",
    expected_words=("layers have weights as they were drawn (model.visual.blocks.2)", "initialised anew"),
    requires=("checkpoint file",),
)
def _random_block(case: Case) -> Iterator[None]:
    yield from _drawn_anew(case, "blocks.2.")


@fault(
    "loaded-from-another-checkpoint",
    "The model was loaded from another folder than the one that is meant: the rows of its head are moved by one.",
    target="load",
    check="weights_as_stored",
    expected_words=("lm_head.weight: differs in", "rows were moved by one"),
    requires=("checkpoint file", "untied head"),
)
def _other_checkpoint(case: Case) -> Iterator[None]:
    def roll(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["lm_head.weight"].roll(1, 0)}

    with changed_checkpoint(case, roll) as folder:
        case.model = case.load(folder=folder, dtype=case.policy.compute_dtype)
        case.checkpoint = Path(case.subject.source.location)
        yield


@fault(
    "cached-checkpoint-altered",
    "A file in the hub's cache is not the one that was published: the rows of its head are moved by one.",
    target="load",
    check="weights_as_stored",
    expected_words=("was altered: its SHA-256 is", "under which it was published"),
    requires=("checkpoint file", "untied head"),
)
def _altered(case: Case) -> Iterator[None]:
    import hashlib

    def roll(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "lm_head.weight": tensors["lm_head.weight"].roll(1, 0)}

    published = (Path(case.subject.source.location) / "model.safetensors").read_bytes()
    with changed_checkpoint(case, roll) as folder:
        blob = folder.parent / "blobs" / hashlib.sha256(published).hexdigest()
        blob.parent.mkdir()
        (folder / "model.safetensors").rename(blob)
        (folder / "model.safetensors").symlink_to(blob)
        case.model = case.load(folder=folder, dtype=case.policy.compute_dtype)
        yield
