"""Make docs/report.png: the report of a record, as a browser shows it.

Usage: ``python tools/report_screenshot.py RECORD.json``, with Chromium installed (Debian's package ``chromium``); the
record is of a run with ``--qvl-html``, so that probe images are in it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pytest_qvl.records.page import as_page
from pytest_qvl.records.stored import read_record

OUT = Path(__file__).resolve().parents[1] / "docs" / "report.png"
WIDTH, HEIGHT = 1100, 1600


def screenshot(page: str, out: Path) -> None:
    """Save what Chromium shows of a page.

    Raises:
        subprocess.CalledProcessError: Chromium failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, raw = Path(folder) / "page.html", Path(folder) / "page.png"
        file.write_text(page, encoding="utf-8")
        size = f"--window-size={WIDTH},{HEIGHT}"
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, f"--screenshot={raw}")
        subprocess.run(["chromium", *flags, file.as_uri()], check=True, capture_output=True, timeout=120)
        with Image.open(raw) as image:
            image.convert("RGB").save(out, optimize=True)


if __name__ == "__main__":
    screenshot(as_page(read_record(Path(sys.argv[1]))), OUT)
    print(OUT, OUT.stat().st_size, "bytes")
