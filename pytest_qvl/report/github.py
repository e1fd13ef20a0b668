"""GitHub Actions: the summary of the job's step in Markdown, and an annotation for every failure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import printable
from pytest_qvl.records.markdown import run_markdown
from pytest_qvl.report.record import Record
from pytest_qvl.report.states import checks_to_explain

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from pytest_qvl.report.run_results import PhaseResult

ANNOTATIONS = 10  # what GitHub shows of one step
# Who annotates failures already, under the name that it registers.
OTHERS = "pytest_github_actions_annotate_failures"


class StepSummary(Record):
    """Appends to the step's summary at the end of a run that judged something; register it as a plugin."""

    setting = "GITHUB_STEP_SUMMARY"
    required = False

    def write(self, session: pytest.Session) -> str:
        """Append, since other commands of the step write there too; nothing where no check was asked for."""
        if not self._run.builder.results().findings:  # before versions, commit and GPUs are looked up for nothing
            return ""
        record = self._run.data(session)
        if not (record["checks"] or record["promises"]):
            return ""
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(run_markdown(record, *self._run.compared) + "\n")
        except OSError as error:
            return f"{self.path} could not be written: {error.strerror or error}"
        return ""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """A workflow command for every failure of a test with a verdict or a model, where nobody else writes them."""
        if terminalreporter.config.pluginmanager.has_plugin(OTHERS):
            return
        found = [phase for phase, _ in self._run.builder.results().findings if phase.failed]
        for phase in found[:ANNOTATIONS]:
            terminalreporter.line(annotation(phase, terminalreporter.config.rootpath))


def annotation(phase: PhaseResult, rootpath: Path) -> str:
    """The workflow command of one failure, on the test's file where it is one of the repository."""
    file, _, test = phase.test.partition("::")
    finding = phase.data.finding
    checks = () if finding is None else checks_to_explain(finding)
    place = f"file={_escaped(file)}," if (rootpath / file).is_file() and not file.startswith("..") else ""
    text = printable(phase.error) + "".join(f" (pytest-qvl explain {check})" for check in checks)
    return f"::error {place}title={_escaped(test.rpartition('::')[2] or file)}::{_escaped(text, in_property=False)}"


def _escaped(text: str, *, in_property: bool = True) -> str:
    """Text in a workflow command: https://github.com/actions/toolkit, ``packages/core/src/command.ts``."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text
