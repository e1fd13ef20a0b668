"""What the reader of a page has already: files (``given NAME``) and names of a script (``before NAME``)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .blocks import ROOT, blocks_of

RANK = 2
ADAPTED = r".*language_model.*_proj"


def repository(folder: Path) -> None:
    """The files of this repository, for commands that only read them."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)


def checkpoint(folder: Path) -> None:
    """``my-checkpoint``: a base model with its processor."""
    from pytest_qvl.models.sources.embedded import embedded_model_dir

    shutil.copytree(embedded_model_dir(), folder / "my-checkpoint")


def checkpoint_7b(folder: Path) -> None:
    """``Qwen2.5-VL-7B-Instruct``: configuration and processor of a 7B model, and no weights."""
    from pytest_qvl.models.sources.released import released_config
    from pytest_qvl.models.sources.synthetic_processor import synthetic_processor

    released_config("qwen2.5-vl-7b").save_pretrained(folder / "Qwen2.5-VL-7B-Instruct")
    synthetic_processor("qwen2.5-vl-7b").save_pretrained(folder / "Qwen2.5-VL-7B-Instruct")


def adapter(folder: Path) -> None:
    """``out/checkpoint-500``: an adapter of ``my-checkpoint`` that has learned a little."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder / "my-checkpoint")
    _save_adapter(model, folder, str(folder / "my-checkpoint"))


def adapter_7b(folder: Path) -> None:
    """The same for ``qwen2.5-vl-7b``, of which nobody has the weights here."""
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.sources.released import released_config

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(released_config("qwen2.5-vl-7b"))
    _save_adapter(model, folder, "Qwen/Qwen2.5-VL-7B-Instruct")


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file

    config = LoraConfig(r=RANK, target_modules=ADAPTED, task_type="CAUSAL_LM")
    state = get_peft_model_state_dict(get_peft_model(model, config), save_embedding_layers=False)
    draw = torch.Generator().manual_seed(0)
    drawn = {name: 0.01 * torch.randn(tensor.shape, generator=draw) for name, tensor in state.items()}
    (folder / "out" / "checkpoint-500").mkdir(parents=True)
    save_file(drawn, folder / "out" / "checkpoint-500" / "adapter_model.safetensors", metadata={"format": "pt"})
    config.base_model_name_or_path = base  # PEFT wrote the model's own name there, which one without weights has not
    config.inference_mode = True
    config.save_pretrained(folder / "out" / "checkpoint-500")


def train(folder: Path) -> None:
    """``train.py``, as the page on collators has it."""
    (block,) = (b for b in blocks_of(ROOT / "docs" / "howto" / "collator.md") if b.said.get("as") == "train.py")
    (folder / "train.py").write_text(block.source, encoding="utf-8")


def lora(folder: Path) -> None:
    """``lora.json`` and ``adapter_config.json``: fields of a ``LoraConfig``."""
    fields = {"r": 16, "lora_alpha": 32, "target_modules": ADAPTED, "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    for name in ("lora.json", "adapter_config.json"):
        (folder / name).write_text(json.dumps(fields), encoding="utf-8")


def arguments(folder: Path) -> None:
    """``training_args.json``, and the same as a name of the module ``my_training``."""
    script = (
        "from transformers import TrainingArguments\n"
        'arguments = TrainingArguments("out", bf16=True, use_cpu=True, per_device_train_batch_size=2,\n'
        '    gradient_checkpointing=True, optim="paged_adamw_8bit", report_to="none")\n'
    )
    (folder / "my_training.py").write_text(script, encoding="utf-8")
    names: dict[str, Any] = {}
    exec(script, names)
    (folder / "training_args.json").write_text(names["arguments"].to_json_string(), encoding="utf-8")


def rows(folder: Path) -> None:
    """``train.jsonl``: two rows with an image each."""
    from PIL import Image

    Image.new("RGB", (640, 480)).save(folder / "cat.jpg")
    lines = [json.dumps({"image": "cat.jpg", "text": text}) for text in ("A cat.", "A cat that sleeps on a chair.")]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def records(folder: Path) -> None:
    """``old.json`` and ``new.json``: records of two runs; ``record.json`` is the newer one."""
    for name in ("old.json", "new.json", "record.json"):
        shutil.copyfile(ROOT / "docs" / "records" / "h200-embedded.json", folder / name)
    (folder / "results").mkdir()
    shutil.copyfile(folder / "record.json", folder / "results" / "record.json")


def load_lora(folder: Path) -> dict[str, Any]:
    """``model`` and ``processor``: a 4-bit base with a fresh adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.quantized import usual_quantization
    from pytest_qvl.models.sources.embedded import embedded_model_dir
    from pytest_qvl.models.sources.processors import load_processor

    base = AutoModelForImageTextToText.from_pretrained(
        embedded_model_dir(),
        quantization_config=usual_quantization(torch.float32),
        dtype=torch.float32,
        device_map="cpu",
    )
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=ADAPTED, task_type="CAUSAL_LM")).eval()
    return {"model": model, "processor": load_processor(embedded_model_dir())}


def training(folder: Path) -> dict[str, Any]:
    """The same, and what a ``Trainer`` takes besides: ``args``, ``rows`` and ``collate``."""
    from transformers import Trainer, TrainingArguments

    from pytest_qvl.samples import make_batch, scenes

    names = load_lora(folder)
    processor = names["processor"]
    args = TrainingArguments(
        str(folder / "out"),
        max_steps=1,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
    )
    return {
        **names,
        "Trainer": Trainer,
        "args": args,
        "rows": scenes(seed=1, per_skill=2),
        "collate": lambda rows: make_batch(processor, rows, answers=True),
    }
