"""Make docs/report.png: the report of a record, as a browser shows it.

Usage: ``python tools/report_screenshot.py RECORD.json``, with Chromium installed (Debian's package ``chromium``); the
record is of a run with ``--qvl-html``, so that probe images are in it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from check_page import SCHEMES, screenshot
from PIL import Image

from pytest_qvl.records.page import as_page
from pytest_qvl.records.stored import read_record

OUT = Path(__file__).resolve().parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 1100, 1600

if __name__ == "__main__":
    page = as_page(read_record(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "page.png"
        screenshot(page, raw, width=WIDTH, height=HEIGHT, scheme=SCHEMES["light"])
        with Image.open(raw) as image:
            image.convert("RGB").save(OUT, optimize=True)
    print(OUT, OUT.stat().st_size, "bytes")
