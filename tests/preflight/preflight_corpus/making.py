"""Small artefacts by the real libraries, and edits of them."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
LANGUAGE_ONLY = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
BOTH_SIDES = r".*(visual|language_model).*\.(q_proj|v_proj|qkv)"
ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.json")
PROCESSOR = (*_TOKENIZER, "preprocessor_config.json", "generation_config.json")
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One set-up.

    Attributes:
        name: A few words with hyphens.
        family: ``model_type``.
        build: Makes it, and returns the arguments of ``preflight``.
        red: Names of the findings that must be red, whatever else is; empty for a healthy one.
        words: What their causes, fixes or lines must say.
        thread: Where it was reported; empty for what was made up.
        versions: Releases of Transformers in which it is broken; the others take it as it was meant.
    """

    name: str
    family: str
    build: Callable[[Workshop, str], Arguments]
    red: tuple[str, ...] = ()
    words: str = ""
    thread: str = ""
    versions: str = ""

    @property
    def id(self) -> str:
        """Its name in a test's id."""
        return f"{self.name}-{self.family}"


class Workshop:
    """Makes artefacts below one folder, each once.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._made: dict[str, Path] = {}
        self._copies = 0

    def base(self, family: str, **changes: Any) -> Path:
        """The folder of a 16-bit base: weights, configuration, processor, tokenizer. Not to be changed."""
        return self._once(f"base-{family}", changes, lambda folder: _make_base(folder, family, **changes))

    def packed(self, family: str, **changes: Any) -> Path:
        """The folder of a base that bitsandbytes has packed and Transformers saved. Not to be changed."""

        def make(folder: Path) -> None:
            _make_packed(self.base(family), folder, **changes)

        return self._once(f"packed-{family}", changes, make)

    def adapter(self, family: str, *, base: Path | None = None, name: str = "default", **lora: Any) -> Path:
        """A copy of an adapter that the installed PEFT has saved, with values in A and B; to be changed at will."""
        source = self.base(family) if base is None else base
        made = self._once(
            f"adapter-{family}",
            {**lora, "of": source.name, "name": name},
            lambda folder: _make_adapter(source, folder, name, lora),
        )
        return self.copy(made)

    def merged(self, base: Path, adapter: Path, *, dtype: str = "bfloat16", times: int = 1, **settings: Any) -> Path:
        """A folder of the installed PEFT's merge, saved by Transformers; to be changed at will.

        Args:
            base: The base's folder.
            adapter: The adapter's.
            dtype: That the base is loaded and saved in.
            times: How often the adapter is merged.
            settings: Further arguments of ``from_pretrained``.
        """
        self._copies += 1
        folder = self.root / f"merged-{self._copies}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _make_merged(base, adapter, folder, dtype, times, settings)
        return folder

    def merged_in_four_bits(self, base: Path, adapter: Path | None, *, first_packed: bool = True) -> Path:
        """A folder in 4 bits: packed, then merged by PEFT (or not at all); or merged in bfloat16, then packed."""
        self._copies += 1
        folder = self.root / f"merged-{self._copies}"
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if first_packed:
                _make_packed(base, folder, adapter=adapter)
            else:
                assert adapter is not None
                _make_packed(self.merged(base, adapter), folder)
        return folder

    def copy(self, folder: Path) -> Path:
        """A copy of a folder, to be changed at will."""
        self._copies += 1
        return Path(shutil.copytree(folder, self.root / f"copy-{self._copies}-{folder.name}"))

    def _once(self, kind: str, changes: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        key = f"{kind}-{json.dumps(changes, sort_keys=True, default=str)}"
        if key not in self._made:
            folder = self.root / f"{kind}-{len(self._made)}"
            folder.mkdir(parents=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(folder)
            self._made[key] = folder
        return self._made[key]


def _make_base(folder: Path, family: str, *, vocabulary: int = 0, **changes: Any) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.faults.matrix.random_models import random_config
    from pytest_qvl.models.families import FAMILIES as ROWS
    from pytest_qvl.models.sources.embedded import embedded_model_dir

    torch.manual_seed(0)
    config = random_config(family, **changes)
    if vocabulary:
        config.get_text_config().vocab_size = vocabulary
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            # Some CPUs draw exact zeros, which take any ΔW, however small.
            module.weight.data.masked_fill_(module.weight.data == 0, 2.0**-20)
    model.save_pretrained(folder)
    embedded = embedded_model_dir()
    for name in (*_TOKENIZER, "generation_config.json"):
        shutil.copy(embedded / name, folder)
    row = ROWS[family]
    images = json.loads((embedded / "preprocessor_config.json").read_text(encoding="utf-8"))
    images |= {
        "patch_size": config.vision_config.patch_size,
        "image_mean": list(row.image_mean),
        "image_std": list(row.image_std),
        "processor_class": row.processor_class,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images), encoding="utf-8")


def _make_packed(
    source: Path,
    folder: Path,
    *,
    skip: tuple[str, ...] | None = ("model.visual", "lm_head"),
    adapter: Path | None = None,
    **bnb: Any,
) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.quantized import keep_quantized_weights_in_place, usual_quantization

    asked = usual_quantization(torch.bfloat16, llm_int8_skip_modules=None if skip is None else list(skip), **bnb)
    model = AutoModelForImageTextToText.from_pretrained(source, quantization_config=asked, dtype=torch.bfloat16)
    keep_quantized_weights_in_place(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        keep_quantized_weights_in_place(model)
    model.save_pretrained(folder)
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not (folder / file.name).exists():
            shutil.copy(file, folder)


def _make_merged(base: Path, adapter: Path, folder: Path, dtype: str, times: int, settings: Mapping[str, Any]) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=getattr(torch, dtype), **settings)
    for _ in range(times):
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if hasattr(model.config, "quantization_config"):
        model = model.dequantize()
        model.to(getattr(torch, dtype))
    model.save_pretrained(folder)


def _make_adapter(source: Path, folder: Path, name: str, lora: Mapping[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    fields: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": LANGUAGE_ONLY, **lora}
    save_embedding_layers = fields.pop("save_embedding_layers", False)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**fields), adapter_name=name)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key and "init_lora_weights" in fields:
                parameter.add_(torch.randn_like(parameter) * 0.004)  # as trained from a start of its own
            elif "lora_B" in key or "lora_embedding_A" in key:
                parameter.normal_(std=0.004)
            elif "modules_to_save" in key:
                parameter.mul_(1.01).add_(1e-4)  # as trained: a copy with the base's values is one that was not
    adapted.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
    if name != "default":
        for file in (folder / name).iterdir():
            file.rename(folder / file.name)
        (folder / name).rmdir()


def with_adapter(shop: Workshop, family: str, **lora: Any) -> dict[str, Any]:
    """A base and an adapter of it."""
    return {"base": shop.base(family), "adapter": shop.adapter(family, **lora)}


def with_processor(shop: Workshop, family: str) -> dict[str, Any]:
    """A base and an adapter of it with the base's processor beside it."""
    found = with_adapter(shop, family)
    copy_processor(found["base"], found["adapter"])
    return found


def copy_processor(source: Path, folder: Path) -> None:
    """Processor, tokenizer, template and generation settings, as training scripts save them beside the weights."""
    for name in PROCESSOR:
        shutil.copy(source / name, folder)


def with_edits(shop: Workshop, family: str, lora: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A base and an adapter of which some fields were edited after it was saved."""
    found = with_adapter(shop, family, **(lora or {}))
    edit(found["adapter"] / CONFIG, lambda content: content.update(changes))
    return found


def with_merge(shop: Workshop, family: str, *, base: dict[str, Any] | None = None, **lora: Any) -> dict[str, Any]:
    """A base, an adapter of it, and the installed PEFT's merge of both."""
    source = shop.base(family, **(base or {}))
    adapter = shop.adapter(family, base=source, **lora)
    return {"base": source, "adapter": adapter, "merged": shop.merged(source, adapter)}


def edit(file: Path, change: Callable[[dict[str, Any]], object] | None = None, **values: Any) -> None:
    """Change a JSON file: by a function that changes its content in place, or field by field (``None`` removes one)."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if change is not None:
        change(content)
    content |= values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}), encoding="utf-8")


def retensor(file: Path, change: Callable[[str, Any], Mapping[str, Any]]) -> None:
    """Change a safetensors file: ``change`` gets each name and tensor and says what stands in its place."""
    from safetensors.torch import load_file, save_file

    found: dict[str, Any] = {}
    for name, tensor in load_file(file).items():
        found |= change(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, file, metadata={"format": "pt"})


def rename(file: Path, change: Callable[[str], str]) -> None:
    """Change the names of a safetensors file's tensors."""
    retensor(file, lambda name, tensor: {change(name): tensor})


def drop(file: Path, unwanted: Callable[[str], bool]) -> None:
    """Leave tensors out of a safetensors file."""
    retensor(file, lambda name, tensor: {} if unwanted(name) else {name: tensor})


def old_names(text: str) -> str:
    """A key as Transformers before 4.52 named it."""
    return text.replace(".model.language_model.", ".model.").replace(".model.visual.", ".visual.")


def in_shards(folder: Path, *, index: bool) -> None:
    """Cut a checkpoint's one file in two."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, of_shard in shards.items():
        save_file({name: tensors[name] for name in of_shard}, folder / shard, metadata={"format": "pt"})
    (folder / WEIGHTS).unlink()
    weight_map = {name: shard for shard, of_shard in shards.items() for name in of_shard}
    if index:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
