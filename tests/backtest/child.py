"""Run scenarios in the environment that this process has; one line of JSON for each.

Usage: ``python -m tests.backtest.child SCENARIO ...``, as the command does.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def main(names: list[str]) -> int:
    """Run each scenario and print what came of it."""
    warnings.simplefilter("ignore")
    import torch

    from tests.backtest.scenarios import SCENARIOS

    torch.set_num_threads(1)
    for name in names:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            outcome = _outcome(SCENARIOS[name])
        print(json.dumps({"scenario": name, **outcome}), flush=True)
    return 0


def _outcome(run: Callable[[], Any]) -> dict[str, str]:
    from pytest_qvl.evidence import CannotJudge, CheckFailed

    try:
        run()
    except CheckFailed as failed:
        return {"verdict": "flagged", "check": failed.evidence.check, "says": str(failed)}
    except CannotJudge as reason:
        return {"verdict": "not judged", "check": "", "says": str(reason)}
    except Exception as error:  # of the releases, which is no verdict of a check
        return {"verdict": "crashed", "check": "", "says": f"{type(error).__name__}: {error}"}
    return {"verdict": "green", "check": "", "says": ""}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
