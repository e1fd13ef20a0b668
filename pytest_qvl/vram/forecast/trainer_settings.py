"""What a ``TrainingArguments`` and a ``LoraConfig`` of a user's say about memory, as fields of a request.

They come from JSON, or from a name in a module that is imported. A ``training_args.bin`` is never read: it is a pickle,
and reading one runs whatever code is in it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.user_code import imported
from pytest_qvl.vram.forecast.known_settings import (
    LORA_NEUTRAL,
    LORA_REFUSED,
    LORA_TAKEN,
    NEUTRAL,
    REFUSED,
    TAKEN,
    refuse_unknown,
)
from pytest_qvl.vram.forecast.request import lora_options
from pytest_qvl.vram.forecast.setting_values import refuse_mistyped

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

TO_JSON = "Path('training_args.json').write_text(args.to_json_string())"
# First bytes of a pickle (protocol 2 and above) and of the zip archive that torch.save writes.
_PICKLES = (b"\x80", b"PK\x03\x04")
_KINDS = {"TrainingArguments": "hf", "SFTConfig": "trl", "UnslothTrainingArguments": "unsloth"}


def from_trainer(where: str) -> dict[str, Any]:
    """Fields of a request that training arguments decide.

    ``precision`` is ``"pure"`` where they ask for no autocast: the dtype is the model's.

    Args:
        where: A JSON file, or ``module:name`` or ``script.py:name`` of an object in a module that is imported.

    Raises:
        ValueError: A pickle; neither; no training arguments; something they ask for is not forecast.
    """
    settings, kind = _settings(where, "training arguments", "per_device_train_batch_size", known=_KINDS)
    if "num_generations" in settings or "ref_model_init_kwargs" in settings:
        raise ValueError(f"{where} is of a trainer with a reference or generations, which the forecast does not follow")
    refuse_unknown(where, settings, REFUSED, TAKEN | NEUTRAL)
    refuse_mistyped(where, settings)
    if settings.get("bf16") and settings.get("fp16"):
        raise ValueError(f"{where} has bf16 and fp16: TrainingArguments takes one of them")
    checkpoints, _ = _checkpointing(settings, "")
    recomputation, name = _checkpointing(settings, "_kwargs")
    if recomputation is not None and set(recomputation) != {"use_reentrant"}:
        raise ValueError(
            f"{where} has {name}={recomputation!r}, which is not forecast: of its settings only use_reentrant is "
            "followed, and is to be named"
        )
    refuse_mistyped(f"{name} of {where}", recomputation or {})
    found = {
        "trainer": kind or ("trl" if "dataset_text_field" in settings else "hf"),
        "batch": settings["per_device_train_batch_size"],
        "accumulation": settings.get("gradient_accumulation_steps", 1),
        "optimizer": _plain(settings.get("optim", "adamw_torch_fused")),
        "gradient_checkpointing": bool(checkpoints),
        "precision": "bf16" if settings.get("bf16") else "fp16" if settings.get("fp16") else "pure",
    }
    if "dataset_text_field" in settings:
        found |= {
            "max_length": settings.get("max_length"),
            "pad_to_multiple_of": settings.get("pad_to_multiple_of") or 1,
        }
    if _plain(settings.get("eval_strategy") or settings.get("evaluation_strategy") or "no") != "no":
        found["evaluation"] = settings.get("per_device_eval_batch_size", 8)
        found["eval_accumulation_steps"] = settings.get("eval_accumulation_steps") or 0
        found["eval_do_concat_batches"] = settings.get("eval_do_concat_batches", True)
        found["batch_eval_metrics"] = bool(settings.get("batch_eval_metrics"))
        found["prediction_loss_only"] = bool(settings.get("prediction_loss_only"))
    for setting, name in (("resume_from_checkpoint", "resume"), ("load_best_model_at_end", "load_best")):
        if settings.get(setting):
            found[name] = True
    if recomputation is not None:
        found["reentrant"] = bool(recomputation["use_reentrant"])
    if settings.get("ddp_bucket_cap_mb"):
        found["ddp_bucket_cap_mb"] = settings["ddp_bucket_cap_mb"]
    if settings.get("use_liger_kernel"):
        _refuse_part_of_liger(where, settings.get("liger_kernel_config") or {}, found["trainer"])
        found["liger"] = True
    return found


def _refuse_part_of_liger(where: str, asked: Mapping[str, Any], trainer: str) -> None:
    """Only what each trainer has Liger patch by default is followed; ``SFTTrainer`` writes down its own default."""
    usual = {"fused_linear_cross_entropy": trainer == "hf"}
    if others := {name: value for name, value in asked.items() if usual.get(name) is not value}:
        raise ValueError(
            f"{where} has liger_kernel_config={others!r}, which is not forecast: of Liger what it patches by default "
            "is followed; leave it out"
        )


def _checkpointing(settings: Mapping[str, Any], of: str) -> tuple[Any, str]:
    """A setting of checkpointing, and its name: the new one of Transformers 5.23 is asked first, as there."""
    names = (f"activation_checkpointing{of}", f"gradient_checkpointing{of}")
    return next(((settings[name], name) for name in names if settings.get(name) is not None), (None, names[1]))


def from_lora(where: str) -> dict[str, Any]:
    """Fields of a request that a LoRA configuration decides.

    Args:
        where: As for :func:`from_trainer`; also the folder of an ``adapter_config.json``.

    Raises:
        ValueError: As there.
    """
    if Path(where).is_dir():
        where = str(Path(where) / "adapter_config.json")
    settings, _ = _settings(where, "a LoRA configuration", "r")
    kind = _plain(settings.get("peft_type") or "LORA")
    if kind != "LORA":
        raise ValueError(f"{where} has peft_type={kind!r}, which is not forecast: only LoRA's layers are followed")
    refuse_unknown(where, settings, LORA_REFUSED, LORA_TAKEN | LORA_NEUTRAL)
    refuse_mistyped(where, settings)
    if settings["r"] == 0:
        raise ValueError(f"{where} has r=0: a LoRA has a rank of at least 1; inference alone is --lora-r 0")
    targets = settings.get("target_modules")
    found = {
        "lora_r": settings["r"],
        "lora_dropout": settings.get("lora_dropout") or 0.0,
        "use_dora": bool(settings.get("use_dora")),
        "modules_to_save": tuple(settings.get("modules_to_save") or ()),
        "trainable_tokens": _count(where, settings.get("trainable_token_indices")),
        "lora_options": lora_options(settings),
    }
    if initialisation := _initialisation(where, settings):
        found["init_lora_weights"] = initialisation
    found["lora_targets"] = targets if isinstance(targets, str) else tuple(sorted(targets or ()))
    return found


def _initialisation(where: str, settings: Mapping[str, Any]) -> str:
    """How first values are found, if they are not drawn.

    Raises:
        ValueError: EVA, and what it made of the ranks is not said.
    """
    name = settings.get("init_lora_weights")
    if not isinstance(name, str) or name.lower() == "gaussian":
        return ""
    name = "olora" if name.lower() == "olora" else name  # PEFT knows the others as they are written
    if name == "eva" and not settings.get("rank_pattern"):
        config = settings.get("eva_config") or {}
        rho = config.get("rho", 2.0) if isinstance(config, dict) else config.rho
        refuse_mistyped(f"eva_config of {where}", {"rho": rho})
        if rho != 1:
            raise ValueError(
                f"{where} has init_lora_weights='eva' with rho={rho}, which is not forecast: EVA gives layers other "
                "ranks, which the data decides; use rho=1, or the adapter_config.json that PEFT saved, which has them"
            )
    return name


def _count(where: str, indices: Any) -> int:
    """Trained rows of the input embeddings: a list of them, or by module."""
    if not isinstance(indices, dict):
        return len(indices or ())
    others = [name for name in indices if name.rpartition(".")[2] != "embed_tokens"]
    if others:
        raise ValueError(
            f"{where} has trainable_token_indices of {', '.join(others)}, which is not forecast: only rows of "
            "embed_tokens are followed"
        )
    return sum(map(len, indices.values()))


def _plain(value: Any) -> str:
    """An option of an enumeration by its value."""
    return str(getattr(value, "value", value))


def _settings(where: str, what: str, needs: str, *, known: Collection[str] = ()) -> tuple[dict[str, Any], str]:
    """All settings by name, and the trainer that their class belongs to (empty where none says).

    Args:
        where: As for :func:`from_trainer`.
        what: What is looked for, for messages.
        needs: A setting without which it is something else.
        known: The classes that an object may be of; none for any.
    """
    file, colon, name = where.rpartition(":")
    if Path(where).is_file():
        found: Any = _read(Path(where))
    elif colon and re.fullmatch(r"[A-Za-z_][\w.]*", name) and file:
        found = imported(file, name)
    else:
        raise ValueError(f"{where!r} is neither a file nor MODULE:NAME")
    kind = ""
    if not isinstance(found, dict):
        names = [cls.__name__ for cls in type(found).__mro__]
        kind = next((_KINDS[cls] for cls in names if cls in _KINDS), "")
        if known and names[0] not in known:
            raise ValueError(f"{where} is a {names[0]}; the forecast follows {', '.join(known)}")
        found = vars(found)
    if needs not in found:
        raise ValueError(f"{where} holds no {what}: it has no {needs}")
    return found, kind


def _read(file: Path) -> dict[str, Any]:
    start = file.read_bytes()[:4]
    if file.suffix in {".bin", ".pkl", ".pt", ".pth"} or start.startswith(_PICKLES):
        raise ValueError(
            f"{file} is a pickle, and reading it would run whatever code is in it: save the arguments as JSON instead, "
            f"{TO_JSON}"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__} and no settings by name")
    return found
