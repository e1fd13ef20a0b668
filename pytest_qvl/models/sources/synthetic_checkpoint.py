"""Synthetic weights as a checkpoint folder: true size, through the same ``from_pretrained`` as anybody's own model.

The tensors are those of :mod:`pytest_qvl.models.sources.synthetic`, bit for bit, drawn one by one and written shard by
shard: host memory holds two shards at most, whatever the size of the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.sources.synthetic import draw, generation_config

if TYPE_CHECKING:
    import torch

GIB = 2**30
SHARD_BYTES = 2 * GIB
SMALL_FILES = 64 * 2**20  # the tokenizer's 150,000 fillers, configurations, the index


def write_checkpoint(
    config: Any,
    folder: Path,
    write_processor: Callable[[Path], object],
    *,
    device: str,
    dtype: str,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    notify: Callable[[str], object] = lambda _: None,
) -> int:
    """Write what ``save_pretrained`` would of ``build_synthetic(config, None, device, dtype, seed)`` and a processor.

    The folder appears when it is complete, never before.

    Args:
        config: A Qwen-VL configuration.
        folder: Where to; must not exist or be empty.
        write_processor: Writes the processor's files into the folder it is given.
        device: Where the values are drawn; ``"cpu"`` and ``"cuda"`` give different ones.
        dtype: Name of their dtype, such as ``"bfloat16"``.
        seed: Of all tensors.
        shard_bytes: At most so many in one file, unless a single tensor needs more.
        notify: Called with a line of progress per file.

    Returns:
        Bytes of weights.

    Raises:
        ValueError: The folder is not empty, or the disk is too small; says what is needed and what is free.
    """
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: give a new one, or remove it first")
    chosen: torch.dtype = getattr(torch, dtype)
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=chosen)
    model.tie_weights()
    parts = anatomy(model)
    # A head tied to the embeddings comes once, under their name.
    sizes = {name: parameter.numel() * chosen.itemsize for name, parameter in model.named_parameters()}
    shards = _shards(sizes, shard_bytes)
    total: int = sum(sizes.values())
    with _complete_or_nothing(folder, total + SMALL_FILES) as partial:
        files: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            notify(f"{file}: {len(names)} tensors")
            tensors = {name: draw(parts, name, torch.device(device), chosen, seed).cpu() for name in names}
            save_file(tensors, partial / file, metadata={"format": "pt"})
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        config.save_pretrained(partial)
        generation_config(config).save_pretrained(partial)
        write_processor(partial)
    return total


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Tensors in their order, as many together as fit under the limit."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


@contextmanager
def _complete_or_nothing(folder: Path, needed: int) -> Iterator[Path]:
    """A folder beside the one asked for, which takes its name at the end of a block without an error."""
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise ValueError(f"{folder} needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free on its disk")
    partial = Path(tempfile.mkdtemp(dir=parent, prefix=f".{folder.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
