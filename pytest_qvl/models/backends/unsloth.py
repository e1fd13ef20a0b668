"""Unsloth: ``FastVisionModel``, with the same sources, the same configurations and the same contract.

Written by its source (2026.10.9); the process has imported it before everything else
(:mod:`pytest_qvl.models.backends.unsloth_start`).
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.models.adapters import LANGUAGE_ONLY, AdapterSlot
from pytest_qvl.models.anatomy import anatomy
from pytest_qvl.models.backends import LoadRequest, ModelLoadError, one_line
from pytest_qvl.models.backends.transformers import remove_vision_grad_hooks
from pytest_qvl.models.backends.unsloth_start import quiet
from pytest_qvl.models.families import FAMILIES
from pytest_qvl.models.quantized import KEEP_16BIT, finish_saved_in_4bit
from pytest_qvl.models.sources.hub import hub_options, model_folder, saved_quantization
from pytest_qvl.models.sources.loading import compared_with, keep_report, why_not_loaded
from pytest_qvl.models.sources.model_source import ModelSourceError
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic import build_synthetic, keep_drawn
from pytest_qvl.models.sources.synthetic_checkpoint import GIB, write_checkpoint
from pytest_qvl.models.sources.synthetic_processor import write_processor

if TYPE_CHECKING:
    import torch

MAX_LENGTH = 4096
# What `get_peft_model` takes by the name that it has in `peft.LoraConfig`.
SAME_NAME = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "bias",
    "use_rslora",
    "modules_to_save",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
)
# Set by PEFT, or without influence on what is trained.
NOT_ASKED = {"peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"} | {
    "inference_mode",
    "runtime_config",
    "loftq_config",
    "target_modules",
}
# How the process that draws weights ends.
FAILED, OUT_OF_MEMORY = 1, 3
_DRAW = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from pytest_qvl.models.backends.unsloth import draw_as_asked
sys.exit(draw_as_asked())
"""


class UnslothBackend:
    """Loads by ``FastVisionModel.from_pretrained`` and adapts by ``FastVisionModel.get_peft_model``.

    Attributes:
        vision_layers: Whether Unsloth may put adapters on the vision tower where it chooses the modules itself.
        checkpointing: Its ``use_gradient_checkpointing``: its own kind, which keeps activations in host memory.
    """

    name = "unsloth"
    vision_layers = False
    checkpointing: bool | str = "unsloth"

    def load(self, request: LoadRequest) -> Any:
        """Load a frozen base model in eval mode; see :class:`pytest_qvl.models.backends.Backend`."""
        import torch

        fast = _fast_vision_model()
        try:
            model = _build(fast, request, getattr(torch, request.dtype), self.checkpointing)
        except (torch.OutOfMemoryError, ModelSourceError, ModelLoadError):
            raise
        except Exception as error:
            said = why_not_loaded(request.source, error)
            # `from None`, because the traceback's frames would keep the half-built model alive on the GPU.
            raise ModelLoadError(f"{request.source} could not be loaded by Unsloth: {said}") from None
        model.requires_grad_(False)
        self.reset(model)
        return model

    def attach(self, model: Any, lora_config: Any, adapter: str | None) -> AdapterSlot:
        """Wrap the base model in place with a fresh adapter, or with the one saved in the folder ``adapter``.

        Raises:
            ValueError: The configuration asks for something that Unsloth has no flag for.
        """
        import torch

        fast = _fast_vision_model()
        with quiet():
            if adapter is None:
                seed = torch.initial_seed() % 2**32
                wrapped = fast.get_peft_model(model, **self.flags(lora_config), random_state=seed)
            else:
                from peft import PeftModel

                wrapped = PeftModel.from_pretrained(model, adapter, config=lora_config, is_trainable=True)
                # As its own loader goes on with an adapter's folder.
                wrapped = fast.post_patch_model(wrapped, use_gradient_checkpointing=self.checkpointing)
        # Its preparation asks Transformers for inputs that require grad, which hooks the vision tower too.
        remove_vision_grad_hooks(anatomy(wrapped).patch_embed)
        return AdapterSlot.of(wrapped)

    def reset(self, model: Any) -> None:
        """Put the model into eval mode by ``for_inference``, which also turns checkpointing off and the cache on."""
        with quiet():
            _fast_vision_model().for_inference(model)
        model.eval()

    def prepare_training(self, model: Any, *, gradient_checkpointing: bool) -> None:
        """Put the model into train mode by ``for_training``, with Unsloth's own checkpointing if asked."""
        with quiet():
            mode = self.checkpointing if gradient_checkpointing else False
            _fast_vision_model().for_training(model, use_gradient_checkpointing=mode)
        remove_vision_grad_hooks(anatomy(model).patch_embed)

    def free_buffers(self) -> None:
        """Drop the GPU buffers of Unsloth's checkpointing, which it otherwise keeps for the life of the process.

        Its own ``reset_unsloth_gradient_checkpointing_buffers`` leaves them at their size.
        """
        zoo = sys.modules.get("unsloth_zoo.gradient_checkpointing")
        if zoo is not None and getattr(zoo, "GPU_BUFFERS", None):
            zoo.initialize_unsloth_gradient_checkpointing(zoo.GPU_BUFFER_DTYPE)

    def flags(self, lora_config: Any) -> dict[str, Any]:
        """A ``peft.LoraConfig`` as arguments of ``get_peft_model``.

        The default targets (every linear of the language backbone) become Unsloth's own choice of modules with
        vision off; any other regular expression goes through as it is, and a list is held to what
        :attr:`vision_layers` allows.

        Raises:
            ValueError: It asks for something else than Unsloth's defaults where Unsloth has no flag.
        """
        default = type(lora_config)()
        unknown = [
            f"{name}={value!r}"
            for name, value in vars(lora_config).items()
            if name not in {*SAME_NAME, *NOT_ASKED} and value != vars(default).get(name)
        ]
        if unknown:
            raise ValueError(
                f"Unsloth's get_peft_model has no flag for {', '.join(unknown)} of the LoraConfig; "
                "leave it out, or use --qvl-backend transformers"
            )
        targets = lora_config.target_modules
        if isinstance(targets, set):
            targets = sorted(targets)
        return {
            **{name: getattr(lora_config, name) for name in SAME_NAME},
            "target_modules": None if targets == LANGUAGE_ONLY else targets,
            "finetune_vision_layers": self.vision_layers,
            "finetune_language_layers": True,
            "finetune_attention_modules": True,
            "finetune_mlp_modules": True,
            "use_gradient_checkpointing": self.checkpointing,
        }


def _fast_vision_model() -> Any:
    # Importing it now would be too late: what it patches is imported.
    if "unsloth" not in sys.modules:
        raise ModelLoadError(
            "Unsloth was not imported when pytest started: no GPU was visible then, or it runs outside pytest; "
            "there, `import unsloth` before transformers and peft"
        )
    return sys.modules["unsloth"].FastVisionModel


def _build(fast: Any, request: LoadRequest, dtype: torch.dtype, checkpointing: bool | str) -> Any:
    """Load a model by ``FastVisionModel.from_pretrained`` and keep a report of tensors that did not fit.

    Synthetic weights are written to a temporary folder first, because Unsloth loads from folders only. Whatever Unsloth
    would do by default and the request does not ask for is switched off.

    Raises:
        ModelLoadError: The folder could not be written, or the model is not of the class that Unsloth has written.
    """
    source, quantization = request.source, request.quantization_config
    own = saved_quantization(source)
    options: dict[str, Any] = {"load_in_4bit": quantization is not None or own is not None}
    if quantization is not None and own is None and not _is_what_unsloth_chooses(quantization, dtype):
        options["quantization_config"] = quantization
    with tempfile.TemporaryDirectory(prefix="qvl-synthetic-") as scratch, quiet():
        drawn = Path(scratch, "model")
        if source.kind == "synthetic":
            draw_elsewhere(drawn, request, released_config(source.location))
        forget_classes()
        model, _processor = fast.from_pretrained(
            str(drawn) if source.kind == "synthetic" else source.pretrained,
            max_seq_length=MAX_LENGTH,
            dtype=dtype,
            attn_implementation="sdpa",
            use_gradient_checkpointing=checkpointing,
            offload_embedding=False,
            # By default it loads another repository than the one named: Unsloth's quantization of that model.
            use_exact_model_name=True,
            use_safetensors=True,
            **({"local_files_only": True} if source.kind == "synthetic" else hub_options(source)),
            **options,
        )
    refuse_stale_class(type(anatomy(model).base))
    read_from = model_folder(source)
    if read_from is not None:
        keep_report(model, compared_with(model, read_from, f"the checkpoint of {source}"))
    if source.kind == "synthetic":
        keep_drawn(model, released_config(source.location), request.device, dtype)
    if own is not None:
        finish_saved_in_4bit(model, dtype, full_precision=quantization is None)
    return model


def _is_what_unsloth_chooses(config: Any, dtype: torch.dtype) -> bool:
    """Whether ``load_in_4bit=True`` means the same: Unsloth then keeps vision, merger and head out by its own list."""
    skipped = set(config.llm_int8_skip_modules or ())
    return (
        config.bnb_4bit_quant_type == "nf4"
        and bool(config.bnb_4bit_use_double_quant)
        and config.bnb_4bit_compute_dtype == dtype
        and skipped == set(KEEP_16BIT)
    )


def forget_classes() -> None:
    """Let Transformers' lazy packages forget model classes, so that an ``AutoModel`` looks into the module again.

    Unsloth's compiler puts its classes into the module that Transformers' stand in. A lazy package keeps a class once
    it was asked for it, by an ``AutoModel`` or an import, and gives Transformers' own ever after.
    """
    for family in FAMILIES:
        package = sys.modules.get(f"transformers.models.{family}")
        module = f"transformers.models.{family}.modeling_{family}"
        for name, value in list(vars(package).items()) if package else ():
            if isinstance(value, type) and value.__module__ == module:
                for lazy in (package, sys.modules["transformers"]):
                    vars(lazy).pop(name, None)


def refuse_stale_class(model_class: type) -> None:
    """Refuse a model of the class that Transformers had before Unsloth rewrote it, with Transformers' forward and loss.

    Raises:
        ModelLoadError: Another class stands in its place.
    """
    name = model_class.__name__
    if getattr(sys.modules.get(model_class.__module__), name, model_class) is not model_class:
        raise ModelLoadError(
            f"the model is Transformers' own {name}, not the one that Unsloth has written in its place: something in "
            f"this process has kept the former from before Unsloth loaded its first model; import {name} and use an "
            "AutoModel after that only, inside of a fixture or test"
        )


def draw_elsewhere(folder: Path, request: LoadRequest, config: Any) -> None:
    """Save a synthetic model with its processor from another process, which no class is looked up for in this one.

    Args:
        folder: Where to; must not exist.
        request: Its source is ``synthetic:``; quantization, device and dtype are those of the weights.
        config: What to build.

    Raises:
        ModelLoadError: The process did not get to its end; says what it said.
        torch.OutOfMemoryError: The device is too small.
    """
    import torch

    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, "-c", _DRAW],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C reaches this process alone
        ) as process,
    ):
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError):  # how it ended says why
                for part in (sys.path, (folder, request, config)):
                    pickle.dump(part, process.stdin)
                process.stdin.flush()
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()  # `Popen` itself does not, after an interrupt
            raise
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:] or ["without a word"]
    if status == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(last[0])
    if status:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        raise ModelLoadError(
            f"the weights of {request.source} could not be drawn and saved for Unsloth: the process that does {how}: "
            f"{last[0]}"
        )


def draw_as_asked() -> int:
    """In that process: do what is asked for on its input, and return the exit status."""
    import torch

    asked = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        write_synthetic(*asked)
    except torch.OutOfMemoryError as error:
        status, said = OUT_OF_MEMORY, str(error)
    except Exception as error:
        status, said = FAILED, one_line(error)
    else:
        return 0
    print(" ".join(said.split()), file=sys.stderr)
    return status


def _end_with_parent() -> None:
    """Wait for the end of the input, which the one that asked keeps open for as long as it lives."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(FAILED)


def write_synthetic(folder: Path, request: LoadRequest, config: Any) -> None:
    """Save a synthetic model with its processor; see :func:`draw_elsewhere`."""
    import torch

    processor = partial(write_processor, name=request.source.location)
    dtype = getattr(torch, request.dtype)
    if request.quantization_config is None:
        _refuse_if_too_big(config, request.device, dtype)
        write_checkpoint(config, folder, processor, device=request.device, dtype=request.dtype)
        return
    build_synthetic(config, request.quantization_config, request.device, dtype).save_pretrained(folder)
    processor(folder)


def _refuse_if_too_big(config: Any, device: str, dtype: torch.dtype) -> None:
    """Refuse weights that the device has no room for, before they are written; Unsloth would spill them to the host.

    Raises:
        torch.OutOfMemoryError: Says how much is needed and free.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    if device != "cuda":
        return
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.tie_weights()
    needed, free = sum(p.numel() * p.element_size() for p in model.parameters()), torch.cuda.mem_get_info()[0]
    if needed > free:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory: the weights alone need {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"
        )
