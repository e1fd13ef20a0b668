"""Images and questions with known answers, and the batches made of them."""

from pytest_qvl.samples.batch import answer_ids, make_batch, prompt
from pytest_qvl.samples.clips import Clip, clip_batch, scene_clips
from pytest_qvl.samples.folder import folder_samples
from pytest_qvl.samples.photos import has_photos, photo_samples
from pytest_qvl.samples.probes import (
    first_of_each_skill,
    long_sample,
    probe_samples,
    row_groups,
    structure_rows,
    training_rows,
)
from pytest_qvl.samples.sample import Sample
from pytest_qvl.samples.scenes import ALL_SKILLS, IMAGE_ORDER_SKILLS, PLACE_SKILLS, TEXT_ONLY_SKILLS, scenes
from pytest_qvl.samples.sizes import ProbeSizes, attention_window, pixel_limits, probe_sizes, window_count

__all__ = [
    "ALL_SKILLS",
    "IMAGE_ORDER_SKILLS",
    "PLACE_SKILLS",
    "TEXT_ONLY_SKILLS",
    "Clip",
    "ProbeSizes",
    "Sample",
    "answer_ids",
    "attention_window",
    "clip_batch",
    "first_of_each_skill",
    "folder_samples",
    "has_photos",
    "long_sample",
    "make_batch",
    "photo_samples",
    "pixel_limits",
    "probe_samples",
    "probe_sizes",
    "prompt",
    "row_groups",
    "scene_clips",
    "scenes",
    "structure_rows",
    "training_rows",
    "window_count",
]
