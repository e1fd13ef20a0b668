"""Lines that show a red cell, with the framework's own calls. Standard library only.

They are run where the cell was judged, and the record keeps them with what they raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from collating.frameworks import RELEASES

LIMIT = "a limit of length cuts no image"
SEVERAL = "several images in a row"
CELLS = {"qwen2_vl": 84, "qwen2_5_vl": 84, "qwen3_vl": 96}

_HEAD = """\
from pytest_qvl import checks
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic_processor import synthetic_processor
from pytest_qvl.samples import scenes

name = "RELEASE"
processor, config = synthetic_processor(name), released_config(name)
rows = scenes(0, 1, SKILLS, cell=CELL)
"""
_JUDGE = "checks.batch(batch, processor, config, rows)\n"
_ONE, _MANY = '["colour", "count"]', '["nth_colour"]'
_MESSAGES = """\
examples = []
for s in rows:
    user = [*(IMAGE for EACH in s.images), {"type": "text", "text": s.question}]
    answer = [{"type": "text", "text": s.answer}]
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    examples.append({"messages": messagesCOLUMN})
"""
_BARE = _MESSAGES.replace("IMAGE for EACH", '{"type": "image"} for _').replace("COLUMN", ', "images": [*s.images]')
_INSIDE = _MESSAGES.replace("IMAGE for EACH", '{"type": "image", "image": i} for i').replace("COLUMN", "")
_TRL = "from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling\n"
_META = """\
with torch.device("meta"):
    model = AutoModelForImageTextToText.from_config(config)
"""
_SNIPPETS: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("trl", "prompt and completion"): _TRL
        + _HEAD
        + "collate = DataCollatorForVisionLanguageModeling(processor, max_length=72, completion_only_loss=True)\n"
        + _BARE.replace('"messages": messages', '"prompt": messages[:1], "completion": messages[1:]')
        + "batch = collate(examples)\n"
        + _JUDGE,
        ("trl", "messages"): _TRL
        + _HEAD
        + _BARE
        + "batch = DataCollatorForVisionLanguageModeling(processor)(examples)\n"
        + _JUDGE,
        ("unsloth", "as in its notebooks"): "import torch\n"
        "from transformers import AutoModelForImageTextToText\n"
        "from unsloth_zoo.vision_utils import UnslothVisionDataCollator\n"
        + _HEAD
        + _META
        + _INSIDE
        + "batch = UnslothVisionDataCollator(model, processor)(examples)\n"
        + _JUDGE,
        ("maestro", "train_collate_fn"): "from maestro.trainer.models.qwen_2_5_vl.loaders import train_collate_fn\n"
        + _HEAD
        + "# the names by which its training step hands them to the model\n"
        'names = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels")\n'
        'pairs = [(s.images[0], {"prefix": s.question, "suffix": s.answer}) for s in rows]\n'
        "batch = dict(zip(names, train_collate_fn(pairs, processor), strict=True))\n" + _JUDGE,
        ("axolotl", "column of images"): "from axolotl.processing_strategies import get_processing_strategy\n"
        "from axolotl.utils.chat_templates.base import get_chat_template\n"
        "from axolotl.utils.collators.mm_chat import MultiModalChatDataCollator\n"
        + _HEAD
        + 'template = get_chat_template("qwen2_vl", tokenizer=processor.tokenizer)\n'
        'strategy = get_processing_strategy(processor, template, "qwen2_vl")\n'
        + _BARE
        + "batch = MultiModalChatDataCollator(processor.tokenizer, strategy)(examples)\n"
        + _JUDGE,
        ("llamafactory", "stage: sft"): """\
import torch
from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from pytest_qvl.models.sources.released import released_config
from pytest_qvl.models.sources.synthetic_processor import synthetic_processor
from pytest_qvl.samples import scenes
from transformers import AutoModelForImageTextToText

processor, s = synthetic_processor("RELEASE"), scenes(0, 1, ["colour"], cell=CELL)[0]
with torch.device("meta"):
    model = AutoModelForImageTextToText.from_config(released_config("RELEASE"))
data = DataArguments(template="TEMPLATE", cutoff_len=72)
template = get_template_and_fix_tokenizer(processor.tokenizer, data)
parts = {"template": template, "tokenizer": processor.tokenizer, "processor": processor}
turns = [{"role": "user", "content": "<image>" + s.question}, {"role": "assistant", "content": s.answer}]
encode = SupervisedDatasetProcessor(data_args=data, **parts)._encode_data_example
ids, labels = encode(turns[:1], turns[1:], None, None, [*s.images], [], [])
row = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "images": [*s.images]}
SFTDataCollatorWith4DAttentionMask(model=model, **parts)([row])
""",
    }
)
_ANY = """\
# with tools/ of this repository on PYTHONPATH
import tempfile
from pathlib import Path

from collating.adapters import {framework}
from collating.parts import Asked, write_parts
from collating.properties import CASES
from pytest_qvl import checks

parts, case = write_parts("{family}", Path(tempfile.mkdtemp())), CASES["{case}"]
rows = case.rows(parts.cell)
batch = {framework}.collator(Asked("{set_up}", **case.asked), parts)(rows)
checks.batch(batch, parts.judge, parts.config, [row.compared() for row in rows])
"""


def reproducer(framework: str, set_up: str, name: str, case: str, family: str) -> str:
    """At most twenty lines that show a red cell.

    Args:
        framework: Its name.
        set_up: One of its adapter's.
        name: Of the property.
        case: Of the property.
        family: ``model_type``.
    """
    snippet = _SNIPPETS.get((framework, set_up))
    if snippet is None or case not in {LIMIT: ("cut",), SEVERAL: ("several",)}.get(name, ("plain",)):
        return _ANY.format(framework=framework, family=family, case=case, set_up=set_up)
    filled = {
        "RELEASE": RELEASES[family],
        "CELL": str(CELLS[family]),
        "SKILLS": _MANY if name == SEVERAL else _ONE,
        "TEMPLATE": "qwen3_vl_nothink" if family == "qwen3_vl" else "qwen2_vl",
    }
    for word, value in filled.items():
        snippet = snippet.replace(word, value)
    return snippet
