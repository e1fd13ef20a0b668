"""Builds what is uploaded, tries the wheel in an environment of its own, and writes its bill of materials.

``python tools/release.py [DIST]`` in an environment with build, twine, check-wheel-contents and cyclonedx-bom, or
``tox -e release``. DIST must be empty or absent. Uploads nothing: docs/release.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LARGEST = 15 * 2**20  # bytes of a wheel
SBOM = ROOT / "sbom.cdx.json"


def main(dist: Path) -> None:
    """Build, check, try; ends with one sentence at the first thing that is wrong."""
    if dist.exists() and any(dist.iterdir()):
        sys.exit(f"{dist} is not empty: what is uploaded is built now; remove it")
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (wheel,) = dist.glob("*.whl")
    if wheel.stat().st_size > LARGEST:
        sys.exit(f"{wheel.name} has {wheel.stat().st_size / 2**20:.1f} MiB, more than {LARGEST / 2**20:.0f}")
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
    run("check-wheel-contents", wheel)
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        python = environment / "bin" / "python"
        run(sys.executable, "-m", "venv", environment)
        run(python, "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
        run(python, "-m", "pytest", "-q", "--pyargs", "pytest_qvl.suite", cwd=folder)
        run("cyclonedx-py", "environment", "--output-file", SBOM, "--of", "JSON", python)
    for file in sorted(dist.iterdir()):
        sys.stdout.write(f"{file} {file.stat().st_size / 2**20:.1f} MiB\n")


def run(*command: str | Path, cwd: str | Path | None = None) -> None:
    """Run a command; one that fails has said why, and ends this one with its status."""
    sys.stdout.write(f"$ {' '.join(map(str, command))}\n")
    sys.stdout.flush()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["dist"]))
