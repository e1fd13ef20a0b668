"""What a preflight of a 7B base with an adapter costs, from the start of the command to its answer."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from pytest_qvl.models.sources.released import released_config

BUDGET_S = 10.0
BUDGET_GIB = 1.5
GIB = 2**30
MODEL = "qwen2.5-vl-7b"
RANK = 16


def write_adapter(folder):
    """An adapter of rank 16 on every linear layer of the language backbone: 161 MB of random float32."""
    import torch
    from safetensors.torch import save_file

    text = released_config(MODEL).get_text_config()
    heads = text.num_attention_heads * (text.hidden_size // text.num_attention_heads)
    key_value = text.num_key_value_heads * (text.hidden_size // text.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (text.hidden_size, heads),
        "self_attn.k_proj": (text.hidden_size, key_value),
        "self_attn.v_proj": (text.hidden_size, key_value),
        "self_attn.o_proj": (heads, text.hidden_size),
        "mlp.gate_proj": (text.hidden_size, text.intermediate_size),
        "mlp.up_proj": (text.hidden_size, text.intermediate_size),
        "mlp.down_proj": (text.intermediate_size, text.hidden_size),
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(text.num_hidden_layers):
        for name, (width, height) in shapes.items():
            prefix = f"base_model.model.model.language_model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 0.01 * torch.randn(RANK, width, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = 0.01 * torch.randn(height, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct",
    }
    config["target_modules"] = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_preflight_of_7b_with_an_adapter(benchmark, tmp_path):
    """A fresh process each round: its CPU seconds, which on an idle machine are its time, and the most memory of any."""
    write_adapter(tmp_path)
    command = [sys.executable, "-m", "pytest_qvl.cli", "preflight", MODEL, str(tmp_path), "--json"]
    reports, seconds = [], []

    def run():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        reports.append(json.loads(done.stdout))

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / GIB
    benchmark.extra_info.update(cpu_seconds=min(seconds), peak_gib=most, findings=reports[-1]["counts"])
    assert {report["state"] for report in reports} == {"green"}, reports[-1]
    assert most <= BUDGET_GIB
    assert min(seconds) <= BUDGET_S
