"""What is trained, and how the base is loaded."""

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

TARGETS = r".*language_model.*\.(q_proj|v_proj|gate_proj|up_proj|down_proj)"


def quantization():
    """NF4 for the language model; vision and head stay in 16 bits."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )


def lora():
    """Rank 8 on the language model."""
    return LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, use_rslora=True, target_modules=TARGETS)
