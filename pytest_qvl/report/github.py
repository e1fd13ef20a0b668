"""GitHub Actions: the summary of the job's step in Markdown, and an annotation for every failure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import printable
from pytest_qvl.records.markdown import run_markdown
from pytest_qvl.records.stored import as_newest
from pytest_qvl.report.record import Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_qvl.report.base_comparison import BaseComparison
    from pytest_qvl.report.run_results import PhaseResult, ResultsBuilder

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
ANNOTATIONS = 10  # what GitHub shows of one step
# Who annotates failures already, under the name that it registers.
OTHERS = "pytest_github_actions_annotate_failures"


class StepSummary(Record):
    """Appends to the step's summary at the end of a run that judged something; register it as a plugin.

    Attributes:
        comparison: With a base; ``None`` where none was asked for.
    """

    setting = SUMMARY_VARIABLE
    required = False
    comparison: BaseComparison | None = None

    @classmethod
    def of_environment(
        cls, settings: list[str], builder: ResultsBuilder, configuration: Sequence[dict[str, Any]]
    ) -> StepSummary | None:
        """Where GitHub says that there is a summary to write; ``None`` elsewhere."""
        file = os.environ.get(SUMMARY_VARIABLE)
        return cls(Path(file), settings, builder, configuration) if file else None

    def write(self, data: dict[str, Any]) -> str:
        """Append, since other commands of the step write there too; nothing where no check was asked for."""
        record, against = as_newest(data, "this run"), self.comparison
        if not (record["checks"] or record["promises"]):
            return ""
        parts = () if against is None else (against.found, against.refused)
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(run_markdown(record, *parts) + "\n")
        except OSError as error:
            return f"{self.path} could not be written: {error.strerror or error}"
        return ""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """A workflow command for every failure of a test with a verdict or a model, where nobody else writes them."""
        if terminalreporter.config.pluginmanager.has_plugin(OTHERS):
            return
        found = [phase for phase, _ in self._builder.results().findings if phase.failed]
        for phase in found[:ANNOTATIONS]:
            terminalreporter.line(annotation(phase, terminalreporter.config.rootpath))


def annotation(phase: PhaseResult, rootpath: Path) -> str:
    """The workflow command of one failure, on the test's file where it is one of the repository."""
    file, _, test = phase.test.partition("::")
    finding = phase.data.finding
    check = None if finding is None else next((e.check for e in finding.evidence if not e.ok), finding.check)
    place = f"file={_escaped(file)}," if (rootpath / file).is_file() and not file.startswith("..") else ""
    explain = f" (pytest-qvl explain {check})" if finding is not None and finding.check and check else ""
    text = printable(phase.error) + explain
    return f"::error {place}title={_escaped(test.rpartition('::')[2] or file)}::{_escaped(text, in_property=False)}"


def _escaped(text: str, *, in_property: bool = True) -> str:
    """Text in a workflow command: https://github.com/actions/toolkit, ``packages/core/src/command.ts``."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text
