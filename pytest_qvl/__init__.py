"""Proves that QLoRA still leaves a Qwen2.5-VL seeing. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
