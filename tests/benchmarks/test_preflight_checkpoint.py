"""What the proof of a whole merged checkpoint costs: layers of the 7B's true size, written as shards and streamed.

Two folders of 1.4 GB each in bfloat16, base and merge. The process is a fresh one; its CPU seconds are its time on one
idle core, and an upper bound of that on two, where adapted weights are proved in parallel. Files come from the page cache:
this is the work and not the disk. What is extrapolated to the 7B are the bytes; the start of the process is counted once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.sources.released import released_config

LAYERS, WORDS, RANK = 2, 16384, 16
WHOLE = 16.6e9  # bytes of the 7B in 16 bits
BUDGET_S, BUDGET_GIB = 90.0, 2.0
GIB = 2**30


def write(folder):
    """Base, merge and adapter below a folder; returns the bytes of the merge."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForImageTextToText

    config = released_config("qwen2.5-vl-7b")
    config.text_config.num_hidden_layers, config.text_config.vocab_size = LAYERS, WORDS
    config.text_config.layer_types = config.text_config.layer_types[:LAYERS]
    config.vision_config.depth, config.vision_config.fullatt_block_indexes = 4, [1, 3]
    with torch.device("meta"):
        names = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).state_dict()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**22, generator=generator) * 0.02
    shards, adapter, size = {}, {}, 0
    for name in names:
        found = re.search(r"language_model\.layers\.(\d+)", name)
        shards.setdefault(found[1] if found else "rest", []).append(name)
    for each in ("base", "merged", "adapter"):
        (folder / each).mkdir()
    for shard, of_shard in shards.items():
        base, merged = {}, {}
        for name in of_shard:
            shape = names[name].shape
            base[name] = noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape).bfloat16()
            merged[name] = base[name]
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and re.fullmatch(LANGUAGE_ONLY, module):
                down = torch.randn(RANK, shape[1], generator=generator) * 0.01
                up = torch.randn(shape[0], RANK, generator=generator) * 0.01
                adapter |= {f"base_model.model.{module}.lora_{k}.weight": v for k, v in (("A", down), ("B", up))}
                merged[name] = torch.addmm(base[name].float(), up, down, alpha=2.0).bfloat16()
        for each, tensors in (("base", base), ("merged", merged)):
            save_file(tensors, folder / each / f"model-{shard}.safetensors", metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in merged.values())
    weight_map = {name: f"model-{shard}.safetensors" for shard, of_shard in shards.items() for name in of_shard}
    for each in ("base", "merged"):
        config.save_pretrained(folder / each)
        (folder / each / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": LANGUAGE_ONLY}
    lora["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(lora))
    return size


def measured(*command):
    """What a process prints, its CPU seconds, and its largest memory in GiB."""
    with subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return printed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / GIB


@pytest.mark.slow
def test_proof_of_a_merged_checkpoint(benchmark, tmp_path):
    # In a process of its own: one that starts another gives it its own size to begin with.
    size = int(measured(__file__, tmp_path)[0].split()[-1])
    command = ["-m", "pytest_qvl.cli", "preflight", tmp_path / "base", tmp_path / "adapter", "--json"]
    alone = min(measured(*command)[1] for _ in range(2))
    rounds = []
    benchmark.pedantic(lambda: rounds.append(measured(*command, "--merged", tmp_path / "merged")), rounds=2)
    reports = [json.loads(printed) for printed, _, _ in rounds]
    assert all("merged" in {each["name"] for each in report["findings"]} for report in reports), reports[-1]
    least, most = min(seconds for _, seconds, _ in rounds), max(peak for _, _, peak in rounds)
    whole = alone + (least - alone) * WHOLE / size
    benchmark.extra_info.update(
        gigabytes=size / 1e9, cpu_seconds=least, cpu_seconds_without=alone, peak_gib=most,
        megabytes_per_cpu_second=size / 1e6 / (least - alone), cpu_seconds_for_7b=whole,
    )  # fmt: skip
    assert most <= BUDGET_GIB
    assert whole <= BUDGET_S


@pytest.mark.skipif("QVL_MERGED_BENCHMARK" not in os.environ, reason="QVL_MERGED_BENCHMARK names a folder")
@pytest.mark.parametrize("cache", ["cold", "as-left"])
def test_a_whole_merged_checkpoint(benchmark, cache):
    """A 7B of true size: base/, adapter/ and merged/ below the folder that ``QVL_MERGED_BENCHMARK`` names.

    ``pytest-qvl synthesize qwen2.5-vl-7b FOLDER/base`` writes a base. Wall time is judged: run it on a quiet machine of two
    cores. ``cold`` drops the files from the page cache first; 33 GB stay in none of fewer.
    """
    folder = Path(os.environ["QVL_MERGED_BENCHMARK"])
    command = ["-m", "pytest_qvl.cli", "preflight", folder / "base", folder / "adapter", "--merged", folder / "merged"]
    if cache == "cold":
        for file in (*(folder / "base").iterdir(), *(folder / "merged").iterdir()):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    rounds = []
    benchmark.pedantic(lambda: rounds.append(measured(*command, "--json")), rounds=1)
    ((printed, seconds, peak),) = rounds
    benchmark.extra_info.update(cpu_seconds=seconds, peak_gib=peak)
    assert "merged" in {each["name"] for each in json.loads(printed)["findings"]}
    assert peak <= BUDGET_GIB
    assert benchmark.stats.stats.max <= BUDGET_S


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
