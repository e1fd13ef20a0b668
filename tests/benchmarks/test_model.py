"""What a user does with a QLoRA model: seconds, tokens per second, and VRAM (``extra_info``) on CUDA.

Nothing is judged: on a busy machine a limit would say what else runs there. The suite holds what must be held.
"""

from __future__ import annotations

import gc

import pytest

from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends import backend
from pytest_qvl.models.training import checkpointing, weights_restored

ROUNDS = {"cpu": 3, "cuda": 5}
NEW_TOKENS = 32


@pytest.fixture
def measured(benchmark, qvl_vram, qvl_target):
    """Run something a few times, device synchronised, in a phase of the meter; returns the median seconds."""

    def measure(name, work, *, rounds=None):
        def phase():
            with qvl_vram.phase(name, settle=False):
                work()

        qvl_vram.reclaim("before the first round")  # what is reserved must not depend on what ran before
        benchmark.pedantic(phase, rounds=rounds or ROUNDS[qvl_target.device], warmup_rounds=1)
        return benchmark.stats.stats.median if benchmark.stats else None

    return measure


@pytest.fixture
def inputs(qvl_batch, qvl_image_samples):
    return qvl_batch(qvl_image_samples[:4])


def test_load(measured, _qvl_load_request, qvl_backend):  # noqa: PT019 - its value is used
    """From the source to the 4-bit model on the device; the first time, with imports, is not counted."""

    def load():
        backend(qvl_backend).load(_qvl_load_request)
        gc.collect()

    measured("load", load)


def test_prefill(measured, benchmark, qvl_lora_model, inputs):
    import torch

    def prefill():
        with torch.no_grad():
            qvl_lora_model(**inputs, logits_to_keep=1)

    if seconds := measured("prefill", prefill):
        benchmark.extra_info["tokens_per_second"] = int(inputs["attention_mask"].sum()) / seconds


def test_decode(measured, benchmark, qvl_lora_model, inputs):
    """Prefill included, as in any reply."""

    def decode():
        qvl_lora_model.generate(**inputs, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)

    if seconds := measured("decode", decode):
        benchmark.extra_info["new_tokens_per_second"] = NEW_TOKENS * len(inputs["input_ids"]) / seconds


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_train_step(measured, benchmark, qvl_lora_model, qvl_batch, qvl_image_samples, gradient_checkpointing):
    """Forward, backward and AdamW on the adapter."""
    import torch

    batch = qvl_batch(qvl_image_samples[:4], padding_side="right", answers=True)
    trainable = [parameter for parameter in qvl_lora_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)

    def step():
        qvl_lora_model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    qvl_lora_model.train()
    with weights_restored(trainable), checkpointing(anatomy(qvl_lora_model), gradient_checkpointing):
        if seconds := measured("train step", step):
            benchmark.extra_info["tokens_per_second"] = int(batch["attention_mask"].sum()) / seconds
