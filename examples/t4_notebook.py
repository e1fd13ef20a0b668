# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does QLoRA leave Qwen2.5-VL seeing? Two experiments on one T4
#
# 1. **Baseline**: Transformers + PEFT + bitsandbytes. The base in 4-bit NF4, LoRA on the language backbone, vision
#    encoder and projector frozen.
# 2. **Unsloth**: the same model, the same images, the same questions.
#
# Each ends with a verdict on twelve promises and a report. Choose a GPU runtime (Runtime → Change runtime type → T4).
# Without a GPU the notebook judges the small model that pytest-qvl carries, on the CPU, and says what it could not.

# %% [markdown]
# ## Install
#
# From a clone of the repository beside this notebook. From the first release on, by name: `pytest-qvl[unsloth]`.

# %% tags=["install"]
# %pip install -q "./pytest-qvl[unsloth]"

# %% [markdown]
# ## What is judged

# %%
import os
import subprocess
import sys
from html import escape
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
MODEL = os.environ.get("QVL_NOTEBOOK_MODEL") or ("Qwen/Qwen2.5-VL-3B-Instruct" if GPU else "embedded")
CARD = ["--qvl-card", "t4"] if GPU else []
RESULTS = Path("qvl-results").resolve()
RESULTS.mkdir(exist_ok=True)
print(f"{MODEL} on {torch.cuda.get_device_name() if GPU else 'the CPU'}")


def judge(name, *options):
    """Run the shipped suite in a process of its own, as a notebook cannot give GPU memory back; show what it says."""
    record, page = RESULTS / f"{name}.json", RESULTS / f"{name}.html"
    marks = ["-m", "gpu", "--qvl-require-gpu"] if GPU else []
    command = [sys.executable, "-m", "pytest", "-q", "--pyargs", "pytest_qvl.suite", "-p", "no:cacheprovider", *marks]
    command += ["--qvl-model", MODEL, *CARD, "--qvl-record", str(record), "--qvl-html", str(page), *options]
    print("$", *command[2:])
    with subprocess.Popen(command, cwd=RESULTS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout:
            print(line, end="")
    return run.returncode


# %% [markdown]
# ## Experiment 1: the baseline
#
# The first run downloads the model. "BROKEN" names the promise, the figure and its limit; `pytest-qvl explain CHECK`
# says what usually causes it.

# %%
baseline = judge("baseline", *os.environ.get("QVL_NOTEBOOK_OPTIONS", "").split())

# %% [markdown]
# ## Experiment 2: Unsloth
#
# Unsloth patches Transformers and PEFT for its whole process, so it has one of its own. It needs a GPU.

# %%
if GPU:
    unsloth = judge("unsloth", "--qvl-backend", "unsloth", "--qvl-compare", str(RESULTS / "baseline.json"))
else:
    unsloth = None
    print("not judged: Unsloth needs a GPU")

# %% [markdown]
# ## The verdicts

# %%
VERDICTS = {None: "not judged", 0: "kept", 1: "BROKEN"}
for name, status in (("baseline", baseline), ("Unsloth", unsloth)):
    print(f"{name}: {VERDICTS.get(status, f'ended with exit status {status}')}")

# %% [markdown]
# ## The report
#
# Verdict, weakest figures, the images with their visual tokens, and what the model answered in full precision, in NF4
# and with LoRA. The files in `qvl-results/` open in any browser.

# %%
from IPython.display import HTML, display

for page in sorted(RESULTS.glob("*.html")):
    frame = (
        f'<iframe srcdoc="{escape(page.read_text(encoding="utf-8"), quote=True)}" width="100%" height="700"></iframe>'
    )
    display(HTML(f"<h3>{page.stem}</h3>{frame}"))

# %% [markdown]
# ## Does your own training fit?
#
# The forecast runs the real training code on tensors without data: peak memory before a GPU is needed.

# %%
command = [
    "pytest-qvl",
    "forecast",
    "--model",
    "qwen2.5-vl-3b",
    "--card",
    "t4",
    "--image",
    "672x896",
    "--largest",
    "none",
]
print("$", *command)
print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
