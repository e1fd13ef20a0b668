"""A preflight as one verdict of the suite."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import CannotJudge, Evidence, Judge
from pytest_qvl.models.skip_rules import DEFAULT
from pytest_qvl.preflight.findings import NOT_TESTED, OWN_ERROR
from pytest_qvl.preflight.run import run_preflight
from pytest_qvl.preflight.subject import Asked

if TYPE_CHECKING:
    from pytest_qvl.models.policy import AdapterPolicy
    from pytest_qvl.models.quantized_layers import QuantizedLayers
    from pytest_qvl.preflight.findings import Report


def judge_by_files(
    model: str,
    adapter: Path | None,
    lora_config: Any,
    quantization_config: Any,
    *,
    policy: AdapterPolicy | None,
    layers: QuantizedLayers | None,
) -> Evidence:
    """See :func:`pytest_qvl.preflight.require_green`."""
    skip = getattr(quantization_config, "llm_int8_skip_modules", None)
    lora = None if adapter is not None or lora_config is None else lora_config.to_dict()
    return verdict(
        run_preflight(
            Asked(
                str(model),
                None if adapter is None else Path(adapter),
                skip=tuple(DEFAULT if skip is None else skip),
                skip_from="the quantization configuration",
                lora=lora,
                policy=policy,
                layers=layers,
            )
        )
    )


def verdict(report: Report) -> Evidence:
    """The evidence of a report: each red finding is a problem, what was not judged is a note.

    Raises:
        CheckFailed: There is a red finding.
        CannotJudge: What was given is of a kind that this package does not test.
    """
    if report.state == "not judged":
        why = [finding.line for finding in report.not_judged if finding.name in (NOT_TESTED, OWN_ERROR)]
        raise CannotJudge((why or [finding.line for finding in report.not_judged])[0])
    judge = Judge("preflight", "by their files, base, adapter and processor belong together")
    for state, count in report.counts().items():
        judge.report(f"{state} findings", count)
    for finding in report.red:
        judge.problem(f"{finding.line}; {finding.cause}; {finding.fix}")
    for finding in report:
        for sentence in (f"not judged: {finding.line}",) if finding.state == "not judged" else finding.notes:
            judge.note(sentence)
    return judge.verdict()
