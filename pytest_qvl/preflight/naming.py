"""Keys of adapter files: which module and which matrix each of them means, however it was written."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pytest_qvl.models.renamed import in_todays_layout

PREFIX = "base_model.model."
# What DistributedDataParallel, torch.compile and FSDP put into names, and PEFT around what it trains in full.
_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|lora_(?:down|up))"
    r"(?:\.(?P<adapter>[^.]+?))??(?:\.(?P<end>weight|bias))?"
)
_COPY = re.compile(r"(?P<module>.+)\.modules_to_save(?:\.(?P<adapter>[^.]+?))??\.(?P<end>weight|bias)")
# Rows of embeddings that are trained, and what PEFT keeps of a layer that it adapts (its bias, resized embeddings).
_ROWS = ".token_adapter.trainable_tokens_delta"
_KEPT = re.compile(r"\.base_layer(?=\.(weight|bias)$)")
_KOHYA = {"lora_down": "lora_A", "lora_up": "lora_B"}
# The innermost numbered part on: ``layers.3.self_attn.q_proj``, ``blocks.0.attn.qkv``.
_TAIL = re.compile(r"(?:layers|blocks|deepstack_merger_list)\.\d+\..+$|merger\..+$|lm_head$|embed_tokens$")


@dataclass(frozen=True)
class Key:
    """One key of an adapter file.

    Attributes:
        text: As it stands in the file.
        module: The module it means, without prefix, in its own layout.
        part: ``"lora_A"`` and so on; ``"rows"`` for trained rows of embeddings; ``""`` for a copy of a whole module or
            any other tensor.
        adapter: Name of an adapter in it, which PEFT takes out when it saves; empty for none.
        prefixes: How often :data:`PREFIX` stands in front.
        wrapped: A wrapper's name in it, such as ``"module"``; empty for none.
        kohya: Whether matrices are called down and up, as image models' trainers do.
    """

    text: str
    module: str
    part: str
    adapter: str = ""
    prefixes: int = 1
    wrapped: str = ""
    kohya: bool = False

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias, of the module itself or of its B."""
        return self.text.endswith(".bias")

    @cached_property
    def tail(self) -> str:
        """The end of the module's name that every layout has."""
        found = _TAIL.search(self.module)
        return found[0] if found else self.module


def parse(text: str) -> Key:
    """What a key means."""
    wrappers = [found[2] for found in _WRAPPERS.finditer(text)]
    plain = _WRAPPERS.sub("", text).lstrip(".") if wrappers else text
    prefixes = 0
    while plain.startswith(PREFIX):
        plain = plain.removeprefix(PREFIX)
        prefixes += 1
    wrapped = wrappers[0] if wrappers else ""
    if plain.endswith(_ROWS):
        return Key(text, plain.removesuffix(_ROWS), "rows", "", prefixes, wrapped)
    plain = _KEPT.sub("", plain)
    found = _PART.fullmatch(plain)
    if found is not None:
        part = found["part"]
        return Key(
            text, found["module"], _KOHYA.get(part, part), found["adapter"] or "", prefixes, wrapped, part in _KOHYA
        )
    copy = _COPY.fullmatch(plain)
    if copy is not None:
        return Key(text, copy["module"], "", copy["adapter"] or "weight", prefixes, wrapped)
    return Key(text, re.sub(r"\.(weight|bias)$", "", plain), "", "", prefixes, wrapped)


LAYOUTS = {
    "": "as the installed Transformers names them",
    "old": "as Transformers named them before 4.52",
    "vllm": "as vLLM names them",
    "other": "under another parent",
}


def place(key: Key, modules: Collection[str], by_tail: dict[str, str]) -> tuple[str, str]:
    """The module of the model that a key means, and the layout (of :data:`LAYOUTS`) that its name is in.

    Args:
        key: The key.
        modules: Names of all modules.
        by_tail: The same by :attr:`Key.tail`, where only one module has it.

    Returns:
        ``("", "")`` if no module of this model is meant.
    """
    if key.module in modules:
        return key.module, ""
    today = in_todays_layout(key.module)
    if today in modules:
        return today, "old"
    vllm = from_vllm(key.module)
    if vllm in modules:
        return vllm, "vllm"
    return (by_tail[key.tail], "other") if key.tail in by_tail else ("", "")


class Placed(NamedTuple):
    """What a key means in a model.

    Attributes:
        key: The key.
        module: The module that it means; ``""`` for none of this model.
        layout: The layout of its name, of :data:`LAYOUTS`.
    """

    key: Key
    module: str
    layout: str


def place_all(texts: Iterable[str], modules: Collection[str]) -> dict[str, Placed]:
    """Every key by its text, with the module of the model that it means."""
    by_tail = tails(modules)
    keys = {text: parse(text) for text in texts}
    return {text: Placed(key, *place(key, modules, by_tail)) for text, key in keys.items()}


def from_vllm(name: str) -> str:
    """The Transformers name of what vLLM calls so."""
    for theirs, ours in (("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model.")):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def tails(modules: Collection[str]) -> dict[str, str]:
    """Modules by the end of their name that every layout has; those that share one are left out."""
    found: dict[str, str] = {}
    twice = set()
    for name in modules:
        tail = Key(name, name, "").tail
        if tail in found:
            twice.add(tail)
        found[tail] = name
    return {tail: name for tail, name in found.items() if tail not in twice}
