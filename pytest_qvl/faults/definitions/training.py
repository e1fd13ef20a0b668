"""Training steps that teach nothing, or the wrong thing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.faults.catalogue import fault
from pytest_qvl.faults.tools import attribute, values
from pytest_qvl.models.adapters import adapted_layers, adapter_parameters
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.samples.batch import IGNORED, prompt_of, turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from pytest_qvl.faults.case import Case

_LAYER = "model.language_model.layers.3.mlp.down_proj"


@fault(
    "one-adapter-detached",
    "One adapted layer is computed without its adapter: no gradient reaches it.",
    target="adapter",
    check="training_step",
    expected_words=("has no path to 1 of {language} adapter tensors", "layers.3.mlp.down_proj.lora_B"),
    source="huggingface/peft#2880, unslothai/unsloth#5039",
)
def _detached(case: Case) -> Iterator[None]:
    layer = adapted_layers(anatomy(case.model))[_LAYER]
    with attribute(layer, "forward", layer.base_layer.forward):
        yield


@fault(
    "trained-while-merged",
    "Training goes on after an evaluation that merged the adapter: its matrices take part in no forward.",
    target="adapter",
    check="training_step",
    expected_words=("the adapter is merged into the base weights", "call unmerge_adapter() before training"),
    silent=False,
)
def _merged(case: Case) -> Iterator[None]:
    # As merge_adapter() marks the layers; B is zero, so that it has nothing to add to their weights.
    for layer in adapted_layers(anatomy(case.model)).values():
        layer.merged_adapters = list(layer.active_adapters)
    yield


@fault(
    "one-adapter-scaled-by-zero",
    "The scaling of one layer was lost on the way: its adapter is multiplied by 0.",
    target="adapter",
    check="training_step",
    expected_words=("is exactly zero at 1 of {language} adapter tensors", "layers.3.mlp.down_proj.lora_B"),
    source="vllm-project/vllm#55193",
)
def _scaling_zero(case: Case) -> Iterator[None]:
    layer = adapted_layers(anatomy(case.model))[_LAYER]
    with attribute(layer, "scaling", {"default": 0.0}):
        yield


@fault(
    "float16-adapter",
    "The adapter is trained in float16: AdamW divides by an epsilon that is zero there.",
    target="adapter",
    check="training_step",
    expected_words=("{adapter} of {adapter} trained tensors are float16", "train them in float32"),
    source="2U1/Qwen-VL-Series-Finetune#184, huggingface/transformers#30559",
)
def _float16_adapter(case: Case) -> Iterator[None]:
    import torch

    before = [(p, p.data) for p in adapter_parameters(anatomy(case.model)).values()]
    for parameter, data in before:
        parameter.data = data.to(torch.float16)
    try:
        yield
    finally:
        for parameter, data in before:
            parameter.data = data


def _on_gradient(case: Case, change: Callable[[torch.Tensor], torch.Tensor], count: int | None) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    parameters: list[Any] = list(adapter_parameters(anatomy(case.model)).values())
    for parameter in parameters[:count]:
        stack.callback(parameter.register_hook(change).remove)
    return stack


@fault(
    "gradient-overflows",
    "The loss is finite, one gradient is not.",
    target="run",
    check="training_step",
    expected_words=("gradients are not finite, first", "lora_A"),
    source="unslothai/unsloth-zoo#866, LaVi-Lab/VG-LLM#21",
)
def _overflows(case: Case) -> Iterator[None]:
    with _on_gradient(case, lambda grad: grad + float("inf"), 1):
        yield


@fault(
    "training-goes-on-from-nan",
    "Training goes on from a checkpoint that had diverged: one A matrix holds NaN, and so does every loss.",
    target="adapter",
    check="training_step",
    expected_words=("the first loss is nan; this begins at", "lora_A", "whose own weight is not finite"),
)
def _goes_on_from_nan(case: Case) -> Iterator[None]:
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = float("nan")
        return weight

    matrices = [p for n, p in adapter_parameters(anatomy(case.model)).items() if ".lora_A." in n]
    with values(matrices[-1], spoil):
        yield


@fault(
    "gradient-sign-wrong",
    "The step goes uphill.",
    target="run",
    check="training_step",
    expected_words=("the loss did not halve in", "optimizer steps at learning rate", "it went"),
)
def _sign(case: Case) -> Iterator[None]:
    with _on_gradient(case, lambda grad: -grad, None):
        yield


@fault(
    "optimizer-ascends",
    "The optimizer was made with maximize=True, as for a reward: every step goes uphill.",
    target="run",
    check="training_step",
    expected_words=("your optimizer moves {adapter} of {adapter} tensors uphill", "maximize=True"),
)
def _ascends(case: Case) -> Iterator[None]:
    import torch

    case.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=2e-4, maximize=True, weight_decay=0.0)
    yield


@fault(
    "optimizer-rate-zero",
    "The learning rate is 0 (a warm-up over more steps than the run has): nothing is ever learned.",
    target="run",
    check="training_step",
    expected_words=("parameter groups of your optimizer have the learning rate 0", "warm-up schedule"),
)
def _rate_zero(case: Case) -> Iterator[None]:
    import torch

    case.make_optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
    yield


@fault(
    "optimizer-passes-one-tensor-over",
    "The optimizer holds every adapter matrix and leaves one where it is: a fused step of one's own that lost it.",
    target="run",
    check="training_step",
    expected_words=("your optimizer's step does not move 1 of {adapter} tensors that have a gradient",),
)
def _passes_over(case: Case) -> Iterator[None]:
    """At a rate at which float32 keeps AdamW's steps and not those of plain gradient descent."""
    import torch

    class Skipping(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            skipped = self.param_groups[0]["params"][0]
            kept = skipped.detach().clone()
            done = super().step(*args, **kwargs)
            skipped.data.copy_(kept)
            return done

    case.make_optimizer = lambda parameters: Skipping(parameters, lr=1e-6, weight_decay=0.0)
    yield


def _labels(case: Case, change: Callable[[dict[str, Any]], torch.Tensor]) -> None:
    case.collators.append(lambda b, _: {**b, "labels": change(b)} if "labels" in b else b)


@fault(
    "prompt-in-the-loss",
    "Labels are the ids with only padding masked, placeholders left out: the prompt is learned too.",
    target="batch",
    check="label_mask",
    expected_words=("supervised tokens belong to the prompt", "row 0, token"),
    source="unslothai/unsloth#3772, roboflow/maestro#129",
)
def _prompt(case: Case) -> Iterator[None]:
    import torch

    vision = anatomy(case.model).vision_token_ids

    def all_text(batch: dict[str, Any]) -> torch.Tensor:
        ids = batch["input_ids"]
        hidden = torch.isin(ids, torch.tensor(vision, device=ids.device)) | (batch["attention_mask"] == 0)
        masked: torch.Tensor = ids.masked_fill(hidden, IGNORED)
        return masked

    _labels(case, all_text)
    yield


@fault(
    "placeholders-in-the-loss",
    "Image placeholders are supervised.",
    target="batch",
    check="label_mask",
    expected_words=("supervised tokens are vision tokens", "<|image_pad|>"),
    source="NielsRogge/Transformers-Tutorials#511, om-ai-lab/VLM-R1#123",
)
def _placeholders(case: Case) -> Iterator[None]:
    image = anatomy(case.model).image_token_id
    _labels(case, lambda b: b["labels"].where(b["input_ids"] != image, b["input_ids"]))
    yield


@fault(
    "padding-in-the-loss",
    "Padding is supervised.",
    target="batch",
    check="label_mask",
    expected_words=("supervised tokens are padding",),
    source="NielsRogge/Transformers-Tutorials#511",
)
def _padding(case: Case) -> Iterator[None]:
    _labels(case, lambda b: b["labels"].where(b["attention_mask"] == 1, b["input_ids"]))
    yield


@fault(
    "labels-shifted",
    "Labels are shifted by the collator, and once more by the model.",
    target="batch",
    check="label_mask",
    expected_words=("are labelled with another token", "labels must not be shifted"),
)
def _shifted(case: Case) -> Iterator[None]:
    _labels(case, lambda b: b["labels"].roll(-1, dims=1))
    yield


@fault(
    "end-not-taught",
    "Truncation cuts <|im_end|> out of the targets: the model never learns to stop.",
    target="batch",
    check="label_mask",
    expected_words=("answers end without a supervised <|im_end|>",),
    source="shibing624/MedicalGPT#157, hiyouga/LlamaFactory#7943",
)
def _end(case: Case) -> Iterator[None]:
    end = case.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    _labels(case, lambda b: b["labels"].masked_fill(b["labels"] == end, IGNORED))
    yield


@fault(
    "row-teaches-nothing",
    "The answer of one row was cut off: all of its labels are -100.",
    target="batch",
    check="label_mask",
    expected_words=("rows have no supervised token", "row 0"),
    source="hiyouga/LlamaFactory#9313",
)
def _nothing(case: Case) -> Iterator[None]:
    def empty(batch: dict[str, Any]) -> torch.Tensor:
        labels: torch.Tensor = batch["labels"].clone()
        labels[0] = IGNORED
        return labels

    _labels(case, empty)
    yield


@fault(
    "first-end-not-taught",
    "Rows of two turns: the first answer is taught without its <|im_end|>, the last one whole.",
    target="batch",
    check="label_mask",
    expected_words=("answers end without a supervised <|im_end|>", "row 0, answer 0"),
)
def _first_end(case: Case) -> Iterator[None]:
    """Give every row a second turn with the same answer; labels ignore each ``<|im_end|>`` of the first turn."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokenizer = case.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    question = tokenizer("\n" + prompt_of(case.processor, turn([], "Again?")))["input_ids"]
    padding = {"input_ids": tokenizer.pad_token_id, "labels": IGNORED}

    def second_turn(name: str, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        asked, answer = tokens.new_tensor(question), labels[labels != IGNORED]
        if name == "input_ids":
            return torch.cat([tokens, asked, answer])
        if name == "labels":
            return torch.cat([tokens.masked_fill(tokens == end, IGNORED), asked.fill_(IGNORED), answer])
        more = len(asked) + len(answer)
        return torch.cat([tokens, tokens.new_full((more,), int(name == "attention_mask"))])

    def two_turns(batch: dict[str, Any], _samples: Any) -> dict[str, Any]:
        if "labels" not in batch:
            return batch
        mask = batch["attention_mask"].bool()
        names = [name for name, value in batch.items() if value.shape == mask.shape]
        made = {
            name: pad_sequence(
                [
                    second_turn(name, tokens[kept], labels[kept])
                    for tokens, labels, kept in zip(batch[name], batch["labels"], mask, strict=True)
                ],
                batch_first=True,
                padding_value=padding.get(name, 0),
            )
            for name in names
        }
        return {**batch, **made}

    case.collators.append(two_turns)
    yield
