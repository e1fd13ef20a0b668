"""Pictures and questions with known answers, and the batches made of them."""

from pytest_qvl.samples.batch import answer_ids, make_batch, prompt
from pytest_qvl.samples.folder import folder_samples
from pytest_qvl.samples.photos import photo_samples
from pytest_qvl.samples.sample import Sample
from pytest_qvl.samples.scenes import ALL_SKILLS, IMAGE_ORDER_SKILLS, PLACE_SKILLS, TEXT_ONLY_SKILLS, scenes

__all__ = [
    "ALL_SKILLS",
    "IMAGE_ORDER_SKILLS",
    "PLACE_SKILLS",
    "TEXT_ONLY_SKILLS",
    "Sample",
    "answer_ids",
    "folder_samples",
    "make_batch",
    "photo_samples",
    "prompt",
    "scenes",
]
