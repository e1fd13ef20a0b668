"""The reference, written from the code before every build: command line, fixtures, marks, checks.

Nothing of it is committed, so that nothing of it can be out of date.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from docutils import nodes
from sphinx import addnodes

from pytest_qvl import cli, fixtures
from pytest_qvl.checks.declared import Declared, declared
from pytest_qvl.faults.catalogue import Fault
from pytest_qvl.options import SETTINGS, Setting
from pytest_qvl.promises import PROMISES
from pytest_qvl.records.explain import again, faults_of, links
from pytest_qvl.records.remedies import REMEDIES
from pytest_qvl.releases import DEFECTS
from pytest_qvl.session.limit_vram import LIMIT_VRAM_HELP

if TYPE_CHECKING:
    from docutils.parsers.rst.states import Inliner
    from sphinx.application import Sphinx

INI_TYPES = {"string": "string", "int": "int", "bool": "bool", "linelist": "list of strings"}
_REPOSITORY_PATH = re.compile(r"``docs/([\w-]+)\.md``|docs/([\w-]+)\.md(#[\w-]+)?")


def command_line() -> Iterator[str]:
    """Every option of pytest and every subcommand, as the parsers have them."""
    yield from (
        "# Command line",
        "",
        "## Options of pytest",
        "",
        "[Settings](../settings.md) says which place is heard first and what the values mean.",
        "",
    )
    for setting in SETTINGS:
        yield from _setting(setting)
    top = cli.parser()
    (commands,) = (each for each in top._actions if isinstance(each, argparse._SubParsersAction))
    yield from ("## pytest-qvl", "", "What needs no test run. Invalid input is one line on stderr and exit code 2.", "")
    for name, command in commands.choices.items():
        command.formatter_class = _wide
        yield from (f"### pytest-qvl {name}", "", "```text", command.format_help().rstrip(), "```", "")


def _wide(prog: str) -> argparse.HelpFormatter:
    """Help as it is on a terminal of 100 columns, wherever the site is built."""
    return argparse.HelpFormatter(prog, width=100, max_help_position=30)


def _setting(setting: Setting) -> Iterator[str]:
    flag = setting.flag if setting.switch else f"{setting.flag} {setting.metavar}"
    separated = ", separated by commas" if setting.many else ""
    yield f"### {setting.flag}"
    yield ""
    yield from ("```text", flag, "```", "")
    yield f"{_sentence(setting.help)}"
    yield ""
    yield "| ini | environment | default | may be repeated |"
    yield "| --- | --- | --- | --- |"
    default = f"`{setting.default}`" if setting.default is not None else "not set"
    yield (
        f"| `{setting.name}` ({INI_TYPES[setting.ini_type]}) | `{setting.env}`{separated} | {default} "
        f"| {'yes' if setting.many else 'no'} |"
    )
    yield ""


def _sentence(text: str) -> str:
    text = text.replace("%%", "%")
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def fixture_pages() -> Iterator[str]:
    """Every public fixture with its whole docstring and type."""
    yield from (
        "# Fixtures, one by one",
        "",
        "[Fixtures](../fixtures.md) has the overview and how to override them.",
        "",
    )
    flags = {setting.name: setting.flag for setting in SETTINGS}
    for node in ast.parse(Path(fixtures.__file__).read_text(encoding="utf-8")).body:
        decorators = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
        if not any(each.startswith("pytest.fixture") for each in decorators) or node.name.startswith("_"):
            continue
        scope = next((found[1] for each in decorators if (found := re.search(r"scope='(\w+)'", each))), "function")
        kind = ast.unparse(node.returns)
        if (generator := re.fullmatch(r"Iterator\[(.*)\]", kind)) and "yield" in ast.unparse(node):
            kind = generator[1]
        flag = f" Flag: `{flags[node.name]}`." if node.name in flags else ""
        yield from (f"## {node.name}", "", f"Scope `{scope}`, type `{kind}`.{flag}", "")
        yield from _rst(inspect.cleandoc(ast.get_docstring(node) or ""))


def _rst(text: str) -> Iterator[str]:
    """A docstring, for a page of Markdown."""
    yield from ("```{eval-rst}", *linked(text.splitlines()), "```", "")


def marks() -> Iterator[str]:
    """Every mark that the plugin registers."""
    yield from ("# Marks", "", "`pytest --markers` shows them too.", "")
    known = {"gpu": "gpu: the test executes on CUDA", "limit_vram": LIMIT_VRAM_HELP}
    for name, text in known.items():
        form, _, meaning = text.partition(": ")
        yield from (f"## {name}", "", "```text", f"@pytest.mark.{form}", "```", "", _sentence(meaning), "")
    yield "[VRAM](../vram.md#limits) has examples of `limit_vram`."


def check_pages() -> Iterator[str]:
    """Every check: promise, method and limit from its docstring, cause and fix, faults and threads."""
    yield from ("# Checks, one by one", "", "`pytest-qvl explain CHECK` prints the same in a terminal; ")
    yield from ("[checks](../checks.md) is the overview by promise, [limits](../limits.md) derives the limits.", "")
    for promise in PROMISES:
        yield from (f"## {promise.number}. {promise.title[0].upper()}{promise.title[1:]}", "")
        for check in declared().values():
            if check.promise == promise.number:
                yield from _check(check)


def _check(check: Declared) -> Iterator[str]:
    remedy = REMEDIES[check.name]
    yield from (f"### {check.name}", "", "```{eval-rst}")
    yield from (f".. autofunction:: pytest_qvl.checks.{check.name}", "```", "")
    yield from (f"**Usual cause.** {remedy.cause}", "", f"**What to do first.** {remedy.fix}", "")
    for defect in DEFECTS:
        if check.name in defect.checks:
            yield f"**Known defect.** {defect.package} {defect.versions}: {defect.summary} ([thread]({defect.thread}))."
            yield ""
    found = faults_of(check.name)
    if found:
        yield from ("| deliberate fault that it has to catch | what is wrong | thread |", "| --- | --- | --- |")
        yield from map(_fault, found)
        yield ""
    yield from ("Run it alone:", "", "```text", again(check.name), "```", "")


def _fault(fault: Fault) -> str:
    threads = [_thread(link) for link in links(fault.source)] if fault.source else []
    return f"| `{fault.name}` | {fault.summary.replace('|', chr(92) + '|')} | {', '.join(threads)} |"


def _thread(link: str) -> str:
    if not link.startswith("https://github.com/"):
        return link
    owner, name, _, number = link.removeprefix("https://github.com/").split("/")
    return f"[{owner}/{name}#{number}]({link})"


def linked(lines: list[str]) -> list[str]:
    """Docstrings name pages by their path in the repository; here they become links."""

    def link(found: re.Match[str]) -> str:
        return f":page:`{found[1] or found[2]}{found[3] or ''}`"

    return [_REPOSITORY_PATH.sub(link, line) for line in lines]


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:  # noqa: ARG001
    lines[:] = linked(lines)


PAGES = {"command-line": command_line, "fixtures": fixture_pages, "marks": marks, "checks": check_pages}


def write(app: Sphinx) -> None:
    """Write each page whose text is another one than before."""
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    for name, lines in PAGES.items():
        file, text = folder / f"{name}.md", "\n".join(lines()) + "\n"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def page(
    role: str,  # noqa: ARG001 - Sphinx hands over all of these
    rawtext: str,  # noqa: ARG001
    text: str,
    lineno: int,  # noqa: ARG001
    inliner: Inliner,
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """The role ``:page:`limits#exact```: a page of this folder or a section of it, checked as links of Markdown are."""
    name, _, anchor = text.partition("#")
    target = addnodes.pending_xref(
        refdomain="doc",
        reftype="myst",
        reftarget=name,
        reftargetid=anchor or None,
        refdoc=inliner.document.settings.env.docname,
        refexplicit=True,
    )
    target += nodes.inline(text, text, classes=["xref", "myst"])
    return [target], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    app.add_role("page", page)
    app.connect("builder-inited", write)
    app.connect("autodoc-process-docstring", _process)
    return {"parallel_read_safe": True}
