"""Make docs/verdict.svg: the verdict of a run as a terminal shows it.

Usage::

    COLUMNS=112 pytest --color=yes --pyargs pytest_qvl.suite --qvl-device cpu > run.txt
    python tools/verdict_picture.py run.txt
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.sax.saxutils import escape

OUT = Path(__file__).resolve().parents[1] / "docs" / "verdict.svg"
FIRST, LAST = "does QLoRA leave the model seeing?", "verdict: "
ESCAPE = re.compile(r"\x1b\[([\d;]*)m")
CLASSES = {"1": "bold", "31": "red", "32": "green", "33": "yellow"}
COLUMN, LINE, MARGIN, BAR = 7.85, 19, 16, 30  # pixels; the bar is the window's
PROMPT = "$ pytest --pyargs pytest_qvl.suite --qvl-device cpu"
STYLE = """
.window { fill: #1b1f24; }
text { font: 13px 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #d5dae1; white-space: pre; }
.green { fill: #6bc46d; } .red { fill: #ff7b72; } .yellow { fill: #d9b44a; } .bold { font-weight: bold; }
"""


def verdict_lines(run: str) -> list[str]:
    """The lines from the title to the verdict, with their colours as escapes.

    Raises:
        ValueError: The run shows no verdict.
    """
    lines = run.splitlines()
    plain = [ESCAPE.sub("", line) for line in lines]
    first = next((at for at, line in enumerate(plain) if FIRST in line), None)
    last = next((at for at, line in enumerate(plain) if line.strip().startswith(LAST)), None)
    if first is None or last is None:
        raise ValueError("the file shows no verdict: it is no output of the shipped suite")
    return lines[first : last + 1]


def spans(line: str) -> list[tuple[str, str]]:
    """Pieces of one line, each with its classes."""
    found, classes = [], set()
    for number, part in enumerate(ESCAPE.split(line)):
        if number % 2 == 0:
            found += [(part, " ".join(sorted(classes)))] * bool(part)
        else:
            codes = {CLASSES[code] for code in part.split(";") if code in CLASSES}
            classes = classes | codes if codes else set()
    return found


def picture(lines: list[str]) -> str:
    """The SVG."""
    width = 2 * MARGIN + COLUMN * max(len(ESCAPE.sub("", line)) for line in lines)
    height = BAR + MARGIN * 2 + LINE * len(lines)
    texts = []
    for number, line in enumerate(lines):
        parts = "".join(
            f'<tspan class="{classes}">{escape(text)}</tspan>' if classes else f"<tspan>{escape(text)}</tspan>"
            for text, classes in spans(line)
        )
        texts.append(f'<text x="{MARGIN}" y="{BAR + MARGIN + 13 + LINE * number}" xml:space="preserve">{parts}</text>')
    dots = "".join(f'<circle cx="{20 + 18 * at}" cy="15" r="5.5" fill="#545d68"/>' for at in range(3))
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
            f'role="img"><title>{FIRST}</title><style>{STYLE}</style>',
            f'<rect class="window" width="100%" height="100%" rx="8"/>{dots}',
            *texts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    run = Path(sys.argv[1]).read_text(encoding="utf-8")
    OUT.write_text(picture([PROMPT, *verdict_lines(run)]), encoding="utf-8")
