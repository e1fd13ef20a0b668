"""What :class:`pytest_qvl.training.Guard` costs: seconds a step and peak VRAM, with it and without it, in turns.

    python tests/gpu/guard_overhead.py --out guard.json
    python tests/gpu/guard_overhead.py --model embedded --device cpu --out guard.json

One process trains one model by the real ``transformers.Trainer`` again and again: without the guard, with it, without,
with. A step is timed from its beginning to the next one's, so that all callbacks count; of every training the first ten
steps are left out, and the others, whole tens, hold each moment of the guard's as often as a long training does. Two
figures come of it: the difference of the medians of tens, and the guard's own clock over the same steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several GPUs the Trainer would use all
LEFT_OUT = 10
TENS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="synthetic:qwen2.5-vl-7b")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--pairs", type=int, default=3, help="trainings without and with, in turns")
    parser.add_argument("--steps", type=int, default=30, help="of each training; the first ten are not counted")
    parser.add_argument("--rows", type=int, default=1, help="of a batch")
    parser.add_argument("--every", type=int, default=10, help="the guard judges every so many steps")
    parser.add_argument(
        "--cell", type=int, default=240, help="pixels a side of an image's cells, of which it has 3 or 4"
    )
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.steps < LEFT_OUT + TENS or options.steps % TENS:
        parser.error(f"--steps is a multiple of {TENS} and at least {LEFT_OUT + TENS}")
    result = measured(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(told(result))


def measured(options):
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    model, rows, collate, processor = prepared(options)
    loaded = time.perf_counter() - started
    runs = []
    for number in range(2 * options.pairs):
        guarded = number % 2 == 1
        runs.append({"guard": guarded, **training(model, rows, collate, processor, options, guarded=guarded)})
        print(f"{'with' if guarded else 'without'}: {runs[-1]['step_seconds']:.4f} s a step", flush=True)
    return {
        "options": {**vars(options), "out": None},
        "load_seconds": loaded,
        **compared(runs),
        "runs": runs,
        **machine(options),
    }


def prepared(options):
    """The model with its adapter, samples, a collator and the processor."""
    import torch
    from peft import LoraConfig, get_peft_model

    from pytest_qvl.models.adapters import LANGUAGE_ONLY
    from pytest_qvl.models.backends import LoadRequest, backend
    from pytest_qvl.models.quantized import keep_quantized_weights_in_place, usual_quantization
    from pytest_qvl.models.sources.model_source import parse_model
    from pytest_qvl.models.sources.synthetic_processor import processor_for
    from pytest_qvl.samples import make_batch, scenes

    torch.manual_seed(0)
    source = parse_model(options.model)
    request = LoadRequest(source, usual_quantization(torch.bfloat16), options.device, "bfloat16")
    base = backend("transformers").load(request)
    keep_quantized_weights_in_place(base)
    base.requires_grad_(False)
    base.is_loaded_in_4bit = True  # as from_pretrained says
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=LANGUAGE_ONLY, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    processor = processor_for(source)
    cell = options.cell if source.kind == "synthetic" else 14
    rows = scenes(0, options.rows, ("colour",), cell=cell) * options.steps

    def collate(samples):
        return make_batch(processor, samples, padding_side="right", answers=True)

    return model, rows, collate, processor


def clock_and_sparer(guard, device):
    """Two callbacks: the one that times each step, and the one that spares the tower with the guard and without."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """First of the callbacks: what the others do in a step lies between two of its beginnings."""

        def __init__(self):
            self.moments, self.guards, self.begun = [], [], time.perf_counter()

        def on_step_begin(self, args, state, control, **kwargs):
            if device == "cuda":
                torch.cuda.synchronize()
            self.moments.append(time.perf_counter())
            self.guards.append(guard.seconds if guard else 0.0)

        on_train_end = on_step_begin

    class Spares(TrainerCallback):
        """Without the guard the tower is spared too: otherwise sparing it would be what is measured."""

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            from pytest_qvl.models.anatomy import anatomy
            from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks

            remove_vision_grad_hooks(anatomy(model).patch_embed)

    return Clock(), Spares()


def training(model, rows, collate, processor, options, *, guarded):
    """One training by the real Trainer."""
    import torch
    from transformers import Trainer, TrainingArguments

    from pytest_qvl.training import Guard

    guard = Guard(processor, every=options.every, vision_gradients="spare") if guarded else None
    if options.device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock, sparer = clock_and_sparer(guard, options.device)
    with tempfile.TemporaryDirectory(prefix="qvl-guard-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.rows,
            max_steps=options.steps,
            learning_rate=1e-4,
            bf16=True,
            use_cpu=options.device == "cpu",
            gradient_checkpointing=not options.no_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            report_to="none",
            save_strategy="no",
            logging_steps=10,
            remove_unused_columns=False,
            disable_tqdm=True,
            seed=1,
        )
        callbacks = [clock, sparer, *([guard] if guard else [])]
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, processing_class=processor,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        record = json.loads((Path(folder) / "qvl_guard.json").read_text()) if guard else None
        trainer.accelerator.free_memory()
    result = timed(clock, options.steps) | (judged(record) if record else {})
    if options.device == "cuda":
        result["peak_allocated"] = torch.cuda.max_memory_allocated()
        result["peak_reserved"] = torch.cuda.max_memory_reserved()
    model.zero_grad(set_to_none=True)
    return result


def timed(clock, steps):
    """Seconds of one training, and the guard's own among them."""
    tens = range(LEFT_OUT, steps, TENS)
    return {
        "step_seconds": statistics.median((clock.moments[n + TENS] - clock.moments[n]) / TENS for n in tens),
        "tens": [clock.moments[n + TENS] - clock.moments[n] for n in tens],
        "seconds_before_first_step": clock.moments[0] - clock.begun,
        "first_ten_seconds": clock.moments[LEFT_OUT] - clock.moments[0],
        "guard_seconds_in_tens": [clock.guards[n + TENS] - clock.guards[n] for n in tens],
        "guard_seconds_before_first_step": clock.guards[0],
        "guard_seconds_first_ten": clock.guards[LEFT_OUT] - clock.guards[0],
    }


def judged(record):
    """What the guard's record says of one training."""
    base = record["judged"]["base_unchanged"]["last"]["figures"]
    return {
        "findings": [finding["check"] for finding in record["findings"]],
        "not_judged": record["not_judged"],
        "judged": {check: verdict["times"] for check, verdict in record["judged"].items()},
        "base": {figure["name"]: figure["value"] for figure in base},
    }


def compared(runs):
    """With the guard against without it."""
    ours, others = ([run for run in runs if run["guard"] is guarded] for guarded in (True, False))
    tens = {
        name: statistics.median(t for run in some for t in run["tens"]) / TENS
        for name, some in (("with", ours), ("without", others))
    }
    own = sum(sum(run["guard_seconds_in_tens"]) for run in ours) / sum(sum(run["tens"]) for run in ours)
    result = {
        "step_seconds": tens,
        "step_seconds_ratio": tens["with"] / tens["without"],
        "guard_share_by_its_own_clock": own,
        "guard_seconds_before_first_step": statistics.median(run["guard_seconds_before_first_step"] for run in ours),
    }
    for name in ("peak_allocated", "peak_reserved"):
        if name in runs[0]:
            peaks = {"with": max(run[name] for run in ours), "without": max(run[name] for run in others)}
            result[name] = {**peaks, "ratio": peaks["with"] / peaks["without"]}
    return result


def machine(options):
    import torch

    packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")}
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    return {"packages": packages, "python": platform.python_version(), "gpu": gpu}


def told(result):
    lines = [
        f"a step: {result['step_seconds']['without']:.4f} s without, {result['step_seconds']['with']:.4f} s with: "
        f"{result['step_seconds_ratio'] - 1:+.2%}; by the guard's own clock {result['guard_share_by_its_own_clock']:.2%}",
        f"before the first step: {result['guard_seconds_before_first_step']:.2f} s",
    ]
    lines += [
        f"{name.replace('_', ' ')}: {result[name]['without'] / 2**20:,.1f} MiB without, "
        f"{result[name]['with'] / 2**20:,.1f} MiB with: {result[name]['ratio'] - 1:+.3%}"
        for name in ("peak_allocated", "peak_reserved")
        if name in result
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
