"""The page of a run: one HTML file that needs no network, no script and nothing beside it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pytest_qvl.evidence import printable, show
from pytest_qvl.outputs import check_replaceable
from pytest_qvl.records.compare import KINDS, REGRESSIONS
from pytest_qvl.records.page_data import page_data, symbol, tone

if TYPE_CHECKING:
    from pathlib import Path

    from jinja2 import Template

    from pytest_qvl.records.compare import Comparison

# By which a file is known that may be written over.
GENERATOR = b'<meta name="generator" content="pytest-qvl">'


def as_page(record: dict[str, Any], comparison: Comparison | None = None, refused: str = "") -> str:
    """The page of a record, as :func:`pytest_qvl.records.stored.as_newest` makes it.

    Every word that a model, a path or a sample said is escaped, control characters too.

    Args:
        record: The run's.
        comparison: With a base; ``None`` for none.
        refused: Why it could not be compared.
    """
    return _template().render(
        page=page_data(record),
        record=record,
        comparison=comparison,
        refused=refused,
        kinds=KINDS,
        regressions=REGRESSIONS,
    )


def check_page(path: Path) -> None:
    """Refuse a file that the page of a run would replace, and that is none.

    Raises:
        ValueError: A folder, a device, a pipe, or a file that this package did not write.
    """
    check_replaceable(path, GENERATOR, "report")


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pytest_qvl.records"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters.update(show=show, symbol=symbol, tone=tone)
    return environment.get_template("page.html.j2")
