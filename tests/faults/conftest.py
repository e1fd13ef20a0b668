"""A checkpoint that knows nothing, in a folder: what a user's model of another size is to the faults."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, BLOCKS = 5, 6


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of another depth than the embedded model's, the head tied, with the embedded processor."""
    from pytest_qvl.faults.matrix.random_models import random_config
    from pytest_qvl.models.sources.embedded import embedded_model_dir
    from pytest_qvl.models.sources.processors import load_processor, save_processor
    from pytest_qvl.models.sources.synthetic_checkpoint import write_checkpoint

    config = random_config("qwen2_5_vl", layers=LAYERS, blocks=BLOCKS, tied=True)
    folder = tmp_path_factory.mktemp("random") / "model"
    processor = load_processor(embedded_model_dir())
    write_checkpoint(config, folder, lambda to: save_processor(processor, to), device="cpu", dtype="float32")
    return folder
