"""What a trainer saves: files that PEFT would not load stop at the checkpoint that has them."""

from __future__ import annotations

import pytest

from pytest_qvl.training import Guard, GuardError


def renames(path, names):
    from safetensors.torch import load_file, save_file

    save_file({key.replace(*names): tensor for key, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("adapter_model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:5000]), "cannot be loaded"),
        ("adapter_model.safetensors", lambda path: path.write_bytes(b""), "cannot be loaded"),
        ("adapter_config.json", lambda path: path.write_text("{"), "cannot be loaded.*adapter_config.json"),
        ("adapter_model.safetensors", lambda path: renames(path, ("language_model", "model")), "56 of 56.*names by"),
        ("adapter_model.safetensors", lambda path: renames(path, ("model.language_model", "nothing")), "56 of 56"),
    ],
    ids=["truncated", "empty", "configuration", "renamed", "misnamed"],
)
def test_a_checkpoint_that_cannot_be_loaded_stops(bench, tmp_path, file, damage, words):
    from transformers import TrainerCallback

    class Damages(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            damage(tmp_path / "checkpoint-1" / file)

    with bench.model() as model:
        saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "per_device_train_batch_size": 1}
        with pytest.raises(GuardError, match=words) as stopped:
            bench.trainer(model, tmp_path, Damages(), Guard(), **saves).train()
    assert stopped.value.check == "adapter_roundtrip"


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("default", {"modules_to_save": ["lm_head"], "use_dora": True, "bias": "lora_only"}),
        ("vlm", {"trainable_token_indices": {"embed_tokens": [7, 9]}}),
    ],
    ids=["copy-dora-bias", "rows-named"],
)
def test_what_peft_saves_beside_the_matrices_has_its_name(bench, tmp_path, name, lora):
    with bench.model(quantized=False, adapter_name=name, **lora) as model:
        from pytest_qvl.models.anatomy import anatomy
        from pytest_qvl.training.saved import adapter_folder, judge_names

        model.save_pretrained(tmp_path)
        parts = anatomy(model)
        judge_names(parts, adapter_folder(parts, tmp_path))
