"""Names of the phases of a forecast, in the order in which they run. Standard library only."""

from __future__ import annotations

LOAD = "load"
PREPARE = "k-bit preparation"
ATTACH = "attach adapter"
VISION = "vision"
PREFILL = "prefill"
DECODE = "decode"
RESUME = "resume"
FIRST = "first step"
STATES = "optimizer states"
TRAIN_VISION = "train: vision"
FORWARD = "train: forward"
LOSS = "train: loss"
BACKWARD = "train: backward"
OPTIMIZER = "train: optimizer"
EVALUATION = "evaluation"
GENERATION = "generation in training"
LOAD_BEST = "load best"

TRAINING = (TRAIN_VISION, FORWARD, LOSS, BACKWARD, OPTIMIZER)
# What the phases of a trainer's first step are called, to tell them from those of the step that repeats.
OF_THE_FIRST = {**dict.fromkeys(TRAINING[:-1], FIRST), OPTIMIZER: STATES}
EXPLAIN = {
    LOAD: "weights arrive and become NF4",
    PREPARE: "16-bit parameters raised to fp32",
    ATTACH: "LoRA parameters created",
    RESUME: "adapter and optimizer states from a checkpoint",
    VISION: "images through the vision tower",
    PREFILL: "the whole prompt through the language model",
    DECODE: "new tokens, one by one",
    FIRST: "a trainer's first forward and backward",
    STATES: "created by the first update",
    TRAIN_VISION: "images through the vision tower",
    FORWARD: "decoder layers",
    LOSS: "logits and cross-entropy",
    BACKWARD: "gradients",
    OPTIMIZER: "update of the adapter",
    EVALUATION: "the loss of a batch between two steps",
    GENERATION: "new tokens between two steps",
    LOAD_BEST: "the best adapter at the end of the training",
}
