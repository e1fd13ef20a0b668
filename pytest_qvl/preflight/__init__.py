"""Judge a base model and an adapter from their files: in seconds, without weights in memory, without a GPU.

``pytest-qvl preflight BASE [ADAPTER]`` on the command line; :func:`preflight` in Python; ``-k preflight`` in the suite.

How it is made: :mod:`~pytest_qvl.preflight.files` reads what strangers have sent, bounded and inside one folder;
:mod:`~pytest_qvl.preflight.base` and :mod:`~pytest_qvl.preflight.adapter` make a :class:`Subject` of it (the real model
class on the meta device, the real PEFT on top); each question is one module of
:mod:`~pytest_qvl.preflight.questions`, and :mod:`~pytest_qvl.preflight.output` prints the :class:`Report`.

To add a question:

1. Write ``questions/NAME.py`` with one function, ``answer(subject: Subject) -> Iterator[Finding]``. It yields at least
   one finding: green with the figures that it judged, red with cause and fix, or not judged with the reason.
   To say that nothing of the question can be judged, raise :class:`pytest_qvl.evidence.CannotJudge`. A file that
   cannot be read, or says what means nothing, raises an error of :mod:`~pytest_qvl.preflight.refusals` and becomes a
   red finding, once.
2. Add a ``Question`` to :data:`pytest_qvl.preflight.questions.QUESTIONS`; numbers are those of the documentation.
3. Open files only through :class:`~pytest_qvl.preflight.files.folder.Folder` and
   :mod:`~pytest_qvl.preflight.files.headers`. Texts of a finding are made harmless when it is made; names in the middle
   of long sentences are cut by :func:`~pytest_qvl.preflight.findings.neutral` or listed by ``some``.
4. ``name`` of a finding is what tests and machines go by: a few words with hyphens that stay from release to release.
5. Broken and healthy folders for it go to ``tests/preflight/preflight_corpus`` (see its docstring).

Importing this package is cheap: torch comes with the first preflight.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.preflight.findings import Finding, Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.evidence import Evidence
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.preflight.subject import Runtime

__all__ = ["Finding", "Report", "preflight", "require_green"]


def preflight(
    base: str | Path,
    adapter: str | Path | None = None,
    *,
    merged: str | Path | None = None,
    runtime: Runtime = "transformers",
    skip: Sequence[str] | None = None,
    lora: str | Path | Mapping[str, Any] | None = None,
    processor: str | Path | None = None,
    card: str | None = None,
    policy: AdapterPolicy | None = None,
    layers: QuantizedLayers | None = None,
) -> Report:
    """Judge a base model and an adapter from their files; see :mod:`pytest_qvl.preflight`.

    Args:
        base: Released name (``"qwen2.5-vl-7b"``), folder, or hub id, of which only small files and headers
            are fetched; or the folder of an adapter alone, which names a hub id.
        adapter: Folder that ``PeftModel.save_pretrained`` wrote.
        merged: Folder of a checkpoint into which the adapter is said to be merged.
        runtime: What will load the adapter: ``"transformers"``, ``"unsloth"`` or ``"vllm"``.
        skip: ``llm_int8_skip_modules`` that the base will be quantized with; by default what a base saved in 4 bits
            has, else this package's own (``model.visual``, ``lm_head``).
        lora: Fields of ``peft.LoraConfig``, or a JSON file with them, of an adapter that is still to be made; with an
            adapter, what was asked for when it was made.
        processor: Folder of the processor that will be used, where it is not beside the adapter.
        card: GPU to judge the memory for, such as ``"t4"``.
        policy: Parts of the model that are adapted on purpose; ``None``: by what ``target_modules`` names.
        layers: Layers that are in 4 bits on purpose; ``None``: those of the language backbone that no entry of the skip
            list keeps.

    Returns:
        One finding per line of the answer. Files that are broken or dangerous are red findings, not exceptions.

    Raises:
        ValueError: Invalid input: an unknown name, card or runtime, a base of another family, a hub without answer.
    """
    from pytest_qvl.preflight.run import run_preflight
    from pytest_qvl.preflight.subject import Asked

    asked = Asked(
        str(base),
        _path(adapter),
        _path(merged),
        runtime,
        skip=None if skip is None else tuple(skip),
        lora=lora if isinstance(lora, Mapping) else _path(lora),
        processor=_path(processor),
        card=card,
        policy=policy,
        layers=layers,
    )
    return run_preflight(asked)


def _path(value: str | Path | None) -> Path | None:
    return None if value is None else Path(value)


def require_green(
    model: str,
    adapter: Path | None = None,
    lora_config: Any = None,
    quantization_config: Any = None,
    *,
    policy: AdapterPolicy | None = None,
    layers: QuantizedLayers | None = None,
) -> Evidence:
    """Prove by their files that base, skip list, adapter and processor belong together.

    Args:
        model: The base, as :func:`preflight` takes it.
        adapter: Folder of a saved adapter.
        lora_config: The ``peft.LoraConfig`` of an adapter that is still to be made; not looked at where one is given.
        quantization_config: The ``transformers.BitsAndBytesConfig`` that the base is loaded with.
        policy: Parts of the model that are adapted on purpose.
        layers: Layers that are in 4 bits on purpose.

    Raises:
        CheckFailed: Something is red; one problem each, with cause and fix.
        ValueError: Invalid input.
    """
    from pytest_qvl.preflight.evidence import judge_by_files

    return judge_by_files(model, adapter, lora_config, quantization_config, policy=policy, layers=layers)
