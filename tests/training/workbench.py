"""Trainings on the embedded model, by the real ``transformers.Trainer``."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from pathlib import Path
from typing import Any


class Rows:
    """A dataset: samples by number."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return self.samples[number]


class Workbench:
    """Trainings on the embedded model.

    Attributes:
        processor: Of the model.
        samples: What is learned.
    """

    def __init__(self, processor: Any, samples: list[Any]) -> None:
        self.processor, self.samples = processor, samples
        self._bases: dict[tuple[str, bool, str], Any] = {}

    @classmethod
    def with_scenes(cls, per_skill: int) -> Workbench:
        """With the embedded model's processor, and so many drawn scenes of each skill."""
        from pytest_qvl.models.sources.embedded import embedded_model_dir
        from pytest_qvl.models.sources.processors import load_processor
        from pytest_qvl.samples import scenes

        return cls(load_processor(embedded_model_dir()), scenes(5, per_skill))

    def base(self, dtype: str = "float32", *, quantized: bool = True, device: str = "cpu") -> Any:
        """The base model, loaded once for each dtype; shared, so leave it as it was found."""
        import torch

        from pytest_qvl.models.quantized import usual_quantization

        if (dtype, quantized, device) not in self._bases:
            config = usual_quantization(getattr(torch, dtype)) if quantized else None
            self._bases[dtype, quantized, device] = self.load(dtype, config, device)
        return self._bases[dtype, quantized, device]

    @staticmethod
    def load(dtype: str = "float32", quantization_config: Any = None, device: str = "cpu") -> Any:
        """A base model of its own, frozen."""
        import torch
        from transformers import Qwen2_5_VLForConditionalGeneration

        from pytest_qvl.models.quantized import keep_quantized_weights_in_place
        from pytest_qvl.models.sources.embedded import embedded_model_dir

        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            embedded_model_dir(),
            quantization_config=quantization_config,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            **({} if device == "cpu" else {"device_map": {"": device}}),
        )
        keep_quantized_weights_in_place(model)
        return model.requires_grad_(False).eval()

    @contextlib.contextmanager
    def model(
        self,
        dtype: str = "float32",
        *,
        quantized: bool = True,
        seed: int = 0,
        base: Any = None,
        adapter_name: str = "default",
        device: str = "cpu",
        **lora: Any,
    ):
        """The base with a fresh adapter; what a training or its mistake did to the base is undone, hooks too."""
        import torch
        from peft import get_peft_model

        from pytest_qvl.models.adapters import remove_peft_layers

        base = base or self.base(dtype, quantized=quantized, device=device)
        state = {name: tensor.clone() for name, tensor in base.state_dict().items() if tensor.is_floating_point()}
        hooks = {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in base.modules()}
        config = copy.deepcopy(base.config)
        torch.manual_seed(seed)
        try:
            yield get_peft_model(base, self.lora(**lora), adapter_name=adapter_name)
        finally:
            remove_peft_layers(base)
            base.gradient_checkpointing_disable()
            for module in base.modules():
                if id(module) in hooks:
                    module._forward_hooks.clear()
                    module._forward_hooks.update(hooks[id(module)][0])
                    module._forward_pre_hooks.clear()
                    module._forward_pre_hooks.update(hooks[id(module)][1])
                if "forward" in vars(module) and not hasattr(vars(module)["forward"], "_keep"):
                    del module.forward  # Accelerate's autocast
            with torch.no_grad():
                for name, tensor in base.state_dict().items():
                    if name in state and not torch.equal(tensor, state[name]):
                        tensor.copy_(state[name])
            base.requires_grad_(False).eval()
            base.config = config
            base.zero_grad(set_to_none=True)

    @staticmethod
    def adapter_bits(model: Any) -> str:
        """A hash of every adapter tensor, in float32."""
        found = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                found.update(parameter.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()

    def lora(self, **changes: Any) -> Any:
        """The usual ``LoraConfig``, any field overridden."""
        from peft import LoraConfig

        from pytest_qvl.models.adapters import LANGUAGE_ONLY

        return LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE_ONLY, "task_type": "CAUSAL_LM", **changes}
        )

    def collate(self, samples: Any) -> dict[str, Any]:
        from pytest_qvl.samples import make_batch

        return make_batch(self.processor, samples, padding_side="right", answers=True)

    def trainer(
        self, model: Any, folder: Path, *callbacks: Any, collate: Any = None, samples: Any = None, **changes: Any
    ) -> Any:
        """A real ``transformers.Trainer``."""
        from transformers import Trainer, TrainingArguments

        keys = ("optimizers", "compute_loss_func")
        own = {key: changes.pop(key) for key in keys if key in changes}
        given = changes.pop("processing_class", self.processor)
        trainer_class = changes.pop("trainer_class", Trainer)
        arguments = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "use_cpu": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_strategy": "no",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "seed": 3,
            "dataloader_pin_memory": False,
            **changes,
        }
        return trainer_class(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=Rows(self.samples if samples is None else samples),
            data_collator=collate or self.collate,
            processing_class=given,
            callbacks=list(callbacks),
            **own,
        )
