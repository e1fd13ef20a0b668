"""Mistakes of training scripts and collators, planted into real trainings; the guard stops each by step 1."""

from . import collators, loops, models  # noqa: F401 - each registers its own
from .mistake import MISTAKES

__all__ = ["MISTAKES"]
