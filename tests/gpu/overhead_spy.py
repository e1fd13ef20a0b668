"""A pytest plugin for :mod:`overhead` (``-p overhead_spy``): when imports and the reference were done, and on what tape.

Given ``QVL_OVERHEAD_OUT``, writes seconds of imports and of the reference pass and the peaks of VRAM there. Given
``QVL_OVERHEAD_TAPE`` too, writes down every forward, generate, vision, backward and optimizer call that the checks make
of the model, with its inputs; that costs time, so it is done in a run whose time is not taken.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from pathlib import Path

import pytest

MODELS = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
found = {"imports": 0.0, "reference": 0.0}
after_reference = []


def import_stack():
    """What every run imports at some point; done first, so that its time is charged to nothing else."""
    import bitsandbytes
    import peft
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from pytest_qvl import checks

    known = [getattr(transformers, f"{name}ForConditionalGeneration", None) for name in MODELS]
    return checks.alignment, AutoModelForImageTextToText, AutoTokenizer, bitsandbytes, peft, torch, known


def pytest_sessionstart(session):
    started = time.perf_counter()
    import_stack()
    found["imports"] = time.perf_counter() - started
    if "QVL_OVERHEAD_TAPE" in os.environ:
        Tape().attach()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.argname != "qvl_reference":
        return (yield)
    started = time.perf_counter()
    if Tape.running:
        Tape.running.stage = "reference"
    try:
        return (yield)
    finally:
        found["reference"] = time.perf_counter() - started
        if Tape.running:
            Tape.running.stage = "quantized"
        after_reference.append(_meter(request.config).begin("after the reference"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if Tape.running:
        Tape.running.test = getattr(item, "originalname", item.name)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    meter = _meter(session.config)
    usage = {"after_reference": meter.end(after_reference[0]).as_dict()} if after_reference else {}
    found["vram"] = {"all": meter.session().usage.as_dict(), **usage}
    Path(os.environ["QVL_OVERHEAD_OUT"]).write_text(json.dumps(found))
    if Tape.running:
        Tape.running.save(os.environ["QVL_OVERHEAD_TAPE"])


def _meter(config):
    from pytest_qvl.session.keys import METER_KEY

    return config.stash[METER_KEY]


def _without_data(tensors):
    from pytest_qvl.vram.forecast.engine.recorder import DatalessTensor

    return any(isinstance(tensor, DatalessTensor) for tensor in tensors)


class Tape:
    """Calls of the model in their order: the outermost of each only, ``generate`` without its own forwards."""

    running = None

    def __init__(self):
        self.calls = []
        self.tensors = {}
        self.stage = "quantized"
        self.test = ""
        self._inside = 0

    def attach(self):
        import torch
        import transformers
        from torch.optim.optimizer import register_optimizer_step_post_hook

        Tape.running = self
        for name in MODELS:
            outer = getattr(transformers, f"{name}ForConditionalGeneration", None)
            core = getattr(transformers, f"{name}Model", None)
            if outer is None or core is None:
                continue
            outer.forward = self._spied("forward", outer.forward)
            outer.generate = self._spied("generate", outer.generate)
            core.get_image_features = self._spied("vision", core.get_image_features)
        torch.Tensor.backward = self._spied("backward", torch.Tensor.backward)
        register_optimizer_step_post_hook(lambda *_: self.calls.append(self._call("step")))

    def _call(self, kind):
        return {"kind": kind, "stage": self.stage, "test": self.test}

    def _spied(self, kind, original):
        @functools.wraps(original)
        def call(model, *args, **kwargs):
            note = None if self._inside else self._note(kind, model, args, kwargs)
            self._inside += 1
            try:
                result = original(model, *args, **kwargs)
            except Exception:
                if note is not None:
                    note["raised"] = True
                raise
            finally:
                self._inside -= 1
            if note is not None and kind == "generate":
                sequences = getattr(result, "sequences", result)
                config = kwargs.get("generation_config") or model.generation_config
                note["new_tokens"] = sequences.shape[1] - kwargs["input_ids"].shape[1]
                note["use_cache"] = kwargs.get("use_cache", config.use_cache) is not False
            return result

        return call

    def _note(self, kind, model, args, kwargs):
        import torch

        note = self._call(kind)
        if _without_data([model] if kind == "backward" else model.parameters()):
            return None  # a dry run of the forecast
        if kind != "backward":
            names = ("pixel_values", "image_grid_thw") if kind == "vision" else ("input_ids", "attention_mask")
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            modules = list(model.modules())
            note |= {
                "grad": torch.is_grad_enabled(),
                "training": model.training,
                "checkpointing": any(getattr(m, "gradient_checkpointing", False) for m in modules),
                "adapted": any(hasattr(m, "lora_A") for m in modules),
                "inputs": {name: self._kept(value) for name, value in given.items() if self._plain(value)},
            }
        self.calls.append(note)
        return note

    @staticmethod
    def _plain(value):
        import torch

        return isinstance(value, torch.Tensor | bool | int | float | str)

    def _kept(self, value):
        import torch

        if not isinstance(value, torch.Tensor):
            return value
        value = value.detach().cpu().contiguous()
        key = hashlib.sha256(
            value.flatten().view(torch.uint8).numpy().tobytes() + str(value.shape).encode()
        ).hexdigest()
        self.tensors.setdefault(key, value.clone())
        return {"tensor": key}

    def save(self, path):
        import torch

        torch.save({"calls": self.calls, "tensors": self.tensors}, path)
