"""Hold the report to axe-core in Chromium: light and dark, as wide as a desktop and as a phone; none may be serious.

Usage: ``python tools/check_page.py RECORD.json [--axe axe.min.js] [--screenshots FOLDER]``, with Chromium installed
(Debian's package ``chromium``). Without ``--axe``, npm fetches the version of :data:`AXE` into a temporary folder. The
pages are the record's, and the same with a broken check, a comparison, and a process that died.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

from pytest_qvl.records.compare import compare
from pytest_qvl.records.page import as_page
from pytest_qvl.records.stored import read_record

AXE = "4.14.1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SERIOUS = ("serious", "critical")
WIDTHS = {"desktop": 1100, "phone": 390}
SCHEMES = {"light": 1, "dark": 0}  # Blink's numbers
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files")
# The page stands in a frame, since a window of Chromium is no narrower than 500 pixels.
FRAME = """<!doctype html><html lang="en"><head><title>frame</title><style>
:root {{ color-scheme: light dark }} body {{ margin: 0 }} iframe {{ border: 0; width: {width}px; height: {height}px }}
</style></head><body><iframe title="page" src="page.html"></iframe><pre id="found"></pre>
<script>addEventListener("message", m => document.getElementById("found").textContent = m.data)</script></body></html>
"""
RUN = """<script>AXE</script><script>
const told = v => [v.impact, v.id, v.help, v.nodes.map(n => n.html.slice(0, 200))];
addEventListener("load", () => axe.run(document).then(r => parent.postMessage(JSON.stringify({
  violations: r.violations.map(told), incomplete: r.incomplete.map(told), passes: r.passes.length, width: innerWidth,
  wide: document.documentElement.scrollWidth, dark: matchMedia("(prefers-color-scheme: dark)").matches}), "*")));
</script></body>"""


def pages(record: dict[str, Any]) -> dict[str, str]:
    """The record's page, and one with everything that a red run shows."""
    broken = deepcopy(record)
    judged = [one for one in broken["checks"] if "figures" in one]
    judged[0].update(problems=["a broken promise, " + "with a long_unbroken_name" * 12], outcome="failed")
    broken.update(exit_status=1, problems=["the process of unsloth died with signal 9 (SIGKILL)"])
    broken["errors"].append({"target": None, "test": "test_mine", "when": "call", "check": None, "text": "OSError: x"})
    return {"as it is": as_page(record), "broken": as_page(broken, compare(record, broken))}


def judged(page: str, axe: str, *, width: int, scheme: int) -> dict[str, Any]:
    """What axe-core says of a page in Chromium.

    Raises:
        RuntimeError: Chromium showed nothing, or axe-core did not come to its end.
    """
    script = RUN.replace("AXE", axe)
    # The page's own policy forbids scripts, and every source but itself.
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(open_page.replace("</body>", script), encoding="utf-8")
        (Path(folder) / "frame.html").write_text(FRAME.format(width=width, height=1200), encoding="utf-8")
        dom = _chromium(Path(folder) / "frame.html", scheme, "--virtual-time-budget=60000", "--dump-dom")
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    if found is None or not found[1]:
        raise RuntimeError("axe-core did not come to its end in Chromium")
    data: dict[str, Any] = json.loads(html.unescape(found[1]))
    return data


def screenshot(page: str, out: Path, *, width: int, scheme: int, height: int = 2200) -> None:
    """Save what Chromium shows of a page."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page, encoding="utf-8")
        (Path(folder) / "frame.html").write_text(FRAME.format(width=width, height=height), encoding="utf-8")
        size = f"--window-size={max(width, 500)},{height}"
        _chromium(Path(folder) / "frame.html", scheme, size, f"--screenshot={out.resolve()}")


def printed(page: str, out: Path) -> None:
    """Save the page as Chromium prints it, to PDF."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        _chromium(file, SCHEMES["light"], "--no-pdf-header-footer", f"--print-to-pdf={out.resolve()}")


def _chromium(file: Path, scheme: int, *flags: str) -> str:
    browser = next(filter(None, map(shutil.which, BROWSERS)), BROWSERS[0])
    command = [browser, *FLAGS, f"--blink-settings=preferredColorScheme={scheme}", *flags, file.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout


def fetched_axe() -> str:
    """The script of axe-core, from npm."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["npm", "pack", "--silent", f"axe-core@{AXE}"], cwd=folder, check=True, capture_output=True)
        with tarfile.open(Path(folder) / f"axe-core-{AXE}.tgz") as archive:
            member = archive.extractfile("package/axe.min.js")
            assert member is not None
            return member.read().decode()


def wrong(found: dict[str, Any]) -> list[str]:
    """What no page may have: serious findings, and lines wider than the page."""
    serious = [one for one in found["violations"] if one[0] in SERIOUS]
    told = [f"{impact}: {rule}: {text}: {nodes}" for impact, rule, text, nodes in serious]
    return [*told, *([f"{found['wide']} pixels wide"] if found["wide"] > found["width"] else [])]


def main(record: Path, axe: str, screenshots: Path | None) -> bool:
    """Judge every page in every way; whether nothing serious was found."""
    good = True
    for name, page in pages(read_record(record)).items():
        for (size, width), (scheme, number) in product(WIDTHS.items(), SCHEMES.items()):
            found = judged(page, axe, width=width, scheme=number)
            assert found["dark"] == (scheme == "dark")
            told = wrong(found)
            lesser = [f"{impact}: {rule}" for impact, rule, *_ in found["violations"] if impact not in SERIOUS]
            print(f"{name}, {size}, {scheme}: {found['passes']} rules pass, {len(told)} wrong, {len(lesser)} lesser")
            # Of cells that are scrolled out of sight, which a wider page shows, axe-core does not see the contrast.
            undecided = [f"undecided: {rule} ({len(nodes)} places)" for _, rule, _, nodes in found["incomplete"]]
            print("".join(f"  {one}\n" for one in (*told, *lesser, *undecided)), end="")
            good &= not told
            if screenshots is not None:
                screenshot(page, screenshots / f"{name}-{size}-{scheme}.png", width=width, scheme=number)
        if screenshots is not None:
            printed(page, screenshots / f"{name}.pdf")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    parser.add_argument("--axe", type=Path, metavar="FILE", help="axe-core's axe.min.js, in the place of npm's")
    parser.add_argument("--screenshots", type=Path, metavar="FOLDER", help="save what was looked at, and a print")
    given = parser.parse_args()
    script = fetched_axe() if given.axe is None else given.axe.read_text(encoding="utf-8")
    sys.exit(not main(given.record, script, given.screenshots))
