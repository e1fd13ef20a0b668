"""What tests of the preflight share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for preflight_corpus, which a command of this repository uses too
