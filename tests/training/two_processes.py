"""Two processes train one model on the CPU; run by ``test_processes.py`` through ``torch.distributed.run``.

First a healthy training, then one in which process 1 alone has a collator that learns prompts.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from workbench import Workbench

from pytest_qvl.training import Guard, GuardError


def main(folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    bench = Workbench.with_scenes(4)
    settings = {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": False}
    with bench.model() as model:
        saves = {"save_strategy": "steps", "save_steps": 2}
        bench.trainer(model, folder / "healthy", Guard(every=1), max_steps=2, **settings, **saves).train()

    def prompts(samples):
        batch = bench.collate(samples)
        if rank == 1:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    found = None
    with bench.model() as model:
        trainer = bench.trainer(model, folder / "broken", Guard(), collate=prompts, max_steps=2, **settings)
        try:
            trainer.train()
        except GuardError as error:
            found = {"check": error.check, "rank": error.findings[0].rank, "steps": trainer.state.global_step}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
