"""Healthy trainings under the guard: every stop is a false alarm.

    python tests/training/healthy.py --runs 100 --jobs 8 --out healthy-training.json

Each run is drawn from its number: dtype and quantization, adapter, optimizer and schedule, accumulation, checkpointing,
padding, packing, saving, resuming. The exit status is 1 if any run was stopped, warned of, or died.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad")
SCHEDULES = (
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_restarts",
)
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "two-names": {"target_modules": r".*language_model.*\.(q|v)_proj"},
    "bias": {"bias": "lora_only", "quantized": False},
    "head-copied": {"modules_to_save": ["lm_head"], "quantized": False},
    "head-adapted": {"target_modules": r".*language_model.*\.(q|v)_proj|lm_head", "quantized": False},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 4}},
    "renamed": {"adapter_name": "vlm"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "vision": {"target_modules": r".*(language_model|visual).*(q|v|gate|up|down)_proj", "policy": "language, vision"},
}


def drawn(number):
    """The settings of one run."""
    draw = random.Random(f"healthy training {number}")
    adapter = draw.choice(list(ADAPTERS))
    dtype, autocast = draw.choice([("float32", False), ("float32", False), ("float32", True), ("bfloat16", True)])
    optimizer = draw.choice(OPTIMIZERS)
    return {
        "number": number,
        "adapter": adapter,
        "dtype": dtype,
        "quantized": draw.random() < 0.7 and ADAPTERS[adapter].get("quantized", True),
        "side": draw.choice(["left", "right"]),
        "packing": draw.random() < 0.2,
        "text_only": draw.random() < 0.1 and adapter != "vision",
        "every": draw.choice([1, 2, 10]),
        "resumes": draw.random() < 0.2,
        "arguments": {
            "bf16": autocast,
            "optim": optimizer,
            "lr_scheduler_type": draw.choice(SCHEDULES),
            "warmup_steps": draw.choice([0, 0, 1, 2]),
            "learning_rate": draw.choice([1e-5, 1e-4, 1e-3]) * (10 if optimizer == "sgd" else 1),
            "weight_decay": draw.choice([0.0, 0.01]),
            "max_grad_norm": draw.choice([0.0, 0.3, 1.0]),
            "gradient_accumulation_steps": draw.choice([1, 1, 2, 3]),
            "per_device_train_batch_size": draw.choice([1, 2]),
            "gradient_checkpointing": draw.random() < 0.3,
            "gradient_checkpointing_kwargs": {"use_reentrant": draw.random() < 0.3},
            "max_steps": draw.choice([3, 4, 5]),
            "seed": draw.randrange(1000),
            "dataloader_num_workers": 0,
            "logging_nan_inf_filter": draw.random() < 0.8,
            "save_strategy": draw.choice(["no", "steps"]),
            "save_steps": 2,
        },
    }


def run(number):
    """One run: its settings, and what came of it."""
    warnings.simplefilter("ignore")
    settings = drawn(number)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qvl-healthy-") as folder:
        try:
            result = trained(settings, Path(folder))
        except BaseException as error:  # GuardError too: the message says it all
            result = {"state": "stopped", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return {**settings, **result, "seconds": round(time.perf_counter() - started, 2)}


_bench = None


def bench():
    """One workbench for each process."""
    global _bench
    if _bench is None:
        import torch
        from workbench import Workbench

        torch.set_num_threads(1)
        _bench = Workbench.with_scenes(8)
    return _bench


def trained(settings, folder):
    from pytest_qvl.training import Guard

    shop = bench()
    lora = dict(ADAPTERS[settings["adapter"]])
    lora.pop("quantized", None)
    policy = lora.pop("policy", None)
    samples = shop.samples
    if settings["text_only"]:
        samples = [sample for sample in samples if not sample.images]
    arguments = settings["arguments"]
    with shop.model(settings["dtype"], quantized=settings["quantized"], seed=settings["number"], **lora) as model:
        collate = collator(shop, model, settings)

        def train(steps, checkpoint=None):
            guard = Guard(every=settings["every"], policy=policy, vision_gradients="spare", batches=1000)
            changes = {**arguments, "max_steps": steps}
            trainer = shop.trainer(model, folder, guard, collate=collate, samples=samples, **changes)
            trainer.train(resume_from_checkpoint=checkpoint)

        steps = arguments["max_steps"]
        train(steps)
        if settings["resumes"] and arguments["save_strategy"] == "steps":
            train(steps + 2, str(folder / "checkpoint-2"))
    record = json.loads((folder / "qvl_guard.json").read_text())
    return {
        "state": "warned" if record["findings"] else record["state"],
        "findings": record["findings"],
        "judged": {check: judged["times"] for check, judged in record["judged"].items()},
        "notes": sorted(
            {note for judged in record["judged"].values() for note in judged["last"]["notes"] if "learns:" not in note}
        ),
        "not_judged": record["not_judged"],
        "guard_seconds": record["guard_seconds"],
    }


def collator(shop, model, settings):
    from pytest_qvl.checks.support.packing import pack
    from pytest_qvl.models.anatomy import anatomy
    from pytest_qvl.samples import make_batch

    def collate(samples):
        batch = make_batch(shop.processor, samples, padding_side=settings["side"], answers=True)
        if settings["packing"] and len(samples) > 1:
            batch = pack(anatomy(model), batch)
        return batch

    return collate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.runs)
    results = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for result in pool.map(run, numbers):
            results.append(result)
            if result["state"] != "finished":
                print(f"run {result['number']}: {result.get('error') or result['findings']}", flush=True)
    alarms = [result["number"] for result in results if result["state"] != "finished"]
    judged = Counter()
    for result in results:
        judged.update(result.get("judged", {}))
    if options.out:
        options.out.write_text(
            json.dumps({"runs": len(results), "alarms": alarms, "judged": judged, "results": results}, indent=1) + "\n"
        )
    print(
        f"{len(results)} healthy trainings, {len(alarms)} false alarms {alarms or ''}; verdicts: {dict(judged.most_common())}"
    )
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
