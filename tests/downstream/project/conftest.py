"""What this project fine-tunes, in the place of pytest-qvl's defaults."""

import pytest
import torch
from captioner.data import Collator, row
from captioner.lora import lora, quantization

from pytest_qvl.samples import scenes


@pytest.fixture(scope="session")
def qvl_model():
    return "embedded"


@pytest.fixture(scope="session")
def qvl_compute_dtype():
    return "float32"


@pytest.fixture(scope="session")
def qvl_quantization_config():
    return quantization()


@pytest.fixture(scope="session")
def qvl_lora_config():
    return lora()


@pytest.fixture(scope="session")
def qvl_image_samples():
    return scenes(seed=7, per_skill=8)


@pytest.fixture(scope="session")
def qvl_vram_limit():
    return "6GiB"


@pytest.fixture(scope="session")
def qvl_dataset(qvl_image_samples):
    return [row(sample.question, sample.answer, sample.images) for sample in qvl_image_samples]


@pytest.fixture(scope="session")
def qvl_collator(qvl_processor):
    return Collator(qvl_processor)


@pytest.fixture
def qvl_optimizer(qvl_lora_model):
    return torch.optim.AdamW([p for p in qvl_lora_model.parameters() if p.requires_grad], lr=1e-4)
