"""The real processor, loaded and saved, and the batches it makes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_qvl.models.sources import processors
from pytest_qvl.models.sources.embedded import embedded_model_dir
from pytest_qvl.models.sources.processors import MissingProcessorError, load_processor, save_processor
from pytest_qvl.samples import Sample, answer_ids, make_batch, prompt, scenes
from pytest_qvl.samples.batch import IGNORED, PaddingSide

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SIDES: tuple[PaddingSide, ...] = ("left", "right")


@pytest.fixture(scope="module")
def processor() -> Any:
    return load_processor(embedded_model_dir())


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Two of every skill: text-only rows beside rows with one, two and three pictures."""
    return scenes(11, 2)


def test_it_is_the_stock_processor(processor: Any) -> None:
    from transformers import Qwen2_5_VLProcessor

    assert isinstance(processor, Qwen2_5_VLProcessor)
    assert type(processor).__call__ is Qwen2_5_VLProcessor.__call__
    assert type(processor).apply_chat_template is Qwen2_5_VLProcessor.apply_chat_template


@pytest.mark.skipif(processors.has_torchvision(), reason="torchvision is installed: the stock path is taken")
def test_without_torchvision_only_the_video_half_is_missing(processor: Any) -> None:
    assert processor.video_processor is None
    assert type(processor.image_processor).__name__ in ("Qwen2VLImageProcessorPil", "Qwen2VLImageProcessor")


def test_with_torchvision_auto_processor_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``AutoProcessor`` returns is handed on untouched, and a folder is never looked up on the hub."""
    from transformers import AutoProcessor

    seen: dict[str, object] = {}

    def from_pretrained(source: str, **kwargs: object) -> str:
        seen.update(kwargs, source=source)
        return "stock"

    monkeypatch.setattr(processors, "has_torchvision", lambda: True)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    assert load_processor(embedded_model_dir()) == "stock"
    assert seen == {"source": str(embedded_model_dir()), "local_files_only": True}


def test_a_folder_with_everything_in_processor_config_is_read(processor: Any, tmp_path: Path) -> None:
    """Transformers 5 saves a whole processor that way, without a preprocessor_config.json.

    With torchvision it loads the video half too, and refuses a folder without its settings.
    """
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    name = settings.pop("processor_class")
    video = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": settings["patch_size"]}
    whole = {"processor_class": name, "image_processor": settings, "video_processor": video}
    (folder / "processor_config.json").write_text(json.dumps(whole))
    (folder / "preprocessor_config.json").unlink()
    (sample,) = scenes(0, 1, ["side"])
    again = make_batch(load_processor(folder), [sample])
    for name, tensor in make_batch(processor, [sample]).items():
        assert torch.equal(tensor, again[name]), name


def test_nothing_is_fetched_for_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a folder was given, yet the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_processor(embedded_model_dir())


@pytest.mark.parametrize("missing", ["preprocessor_config.json", "tokenizer.json"])
def test_a_folder_that_lacks_a_file_is_named(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns(missing, "vocab.json", "*.safetensors"))
    with pytest.raises(MissingProcessorError) as caught:
        load_processor(folder)
    assert missing in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no", "~/no/such", "a/b/c", "", "..", Path("no/such")])
def test_what_is_neither_a_folder_nor_a_hub_id_is_not_looked_up(path: str | Path) -> None:
    with pytest.raises((MissingProcessorError, ValueError)):
        load_processor(path, local_files_only=False)


def test_a_file_is_not_a_folder() -> None:
    with pytest.raises(MissingProcessorError, match="no such folder"):
        load_processor(embedded_model_dir() / "config.json")


def test_another_models_processor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "has_torchvision", lambda: False)
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("Qwen2_5_VLProcessor", "LlavaProcessor"))
    with pytest.raises(ValueError, match="LlavaProcessor"):
        load_processor(folder)


@pytest.mark.parametrize("name", ["Qwen2VLProcessor", "Qwen3VLProcessor"])
def test_siblings_of_other_families_work_too(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = folder / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("Qwen2_5_VLProcessor", name))
    processor = load_processor(folder)
    assert type(processor).__name__ == name
    batch = make_batch(processor, scenes(0, 1), answers=True)
    assert int((batch["labels"] != IGNORED).sum()) > 0


def test_saved_and_loaded_again_it_makes_the_same_batches(
    processor: Any, samples: list[Sample], tmp_path: Path
) -> None:
    save_processor(processor, tmp_path)
    again = make_batch(load_processor(tmp_path), samples, answers=True)
    for name, tensor in make_batch(processor, samples, answers=True).items():
        assert torch.equal(tensor, again[name]), name
    assert load_processor(tmp_path).tokenizer.padding_side == "left"


def test_the_chat_template_is_chatml_with_pictures_first(processor: Any, samples: list[Sample]) -> None:
    (sample,) = scenes(11, 1, ["nth_colour"])
    pictures = "<|vision_start|><|image_pad|><|vision_end|>" * len(sample.images)
    expected = f"<|im_start|>user\n{pictures}{sample.question}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt(processor, sample) == expected


@pytest.mark.parametrize("side", SIDES)
def test_only_the_answer_and_its_end_are_supervised(processor: Any, samples: list[Sample], side: PaddingSide) -> None:
    batch = make_batch(processor, samples, padding_side=side, answers=True)
    for row, sample in enumerate(samples):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        attended = batch["attention_mask"][row].bool()
        scored = labels != IGNORED
        assert labels[scored].tolist() == answer_ids(processor, sample) == ids[scored].tolist()
        assert processor.tokenizer.decode(labels[scored]) == sample.answer + "<|im_end|>"
        before = processor.tokenizer.decode(ids[attended & ~scored])
        assert before.endswith(f"{sample.question}<|im_end|>\n<|im_start|>assistant\n")
        assert not (scored & ~attended).any(), "padding is never supervised"
        assert attended[-1 if side == "left" else 0], f"padding is not on the {side}"


@pytest.mark.parametrize("side", SIDES)
def test_a_row_is_the_same_alone_and_among_others(processor: Any, samples: list[Sample], side: PaddingSide) -> None:
    batch = make_batch(processor, samples, padding_side=side, answers=True)
    pixels, picture = 0, 0
    for row, sample in enumerate(samples):
        alone = make_batch(processor, [sample], padding_side=side, answers=True)
        attended = batch["attention_mask"][row].bool()
        for name in ("input_ids", "labels", *(["mm_token_type_ids"] if "mm_token_type_ids" in batch else [])):
            assert torch.equal(batch[name][row][attended], alone[name][0]), (sample.id, name)
        if sample.images:
            grid = batch["image_grid_thw"][picture : picture + len(sample.images)]
            count = int(grid.prod(-1).sum())
            assert torch.equal(grid, alone["image_grid_thw"])
            assert torch.equal(batch["pixel_values"][pixels : pixels + count], alone["pixel_values"])
            sizes = [[1, image.height // 14, image.width // 14] for image in sample.images]
            assert grid.tolist() == sizes
            pixels, picture = pixels + count, picture + len(sample.images)
    assert pixels == len(batch["pixel_values"])
    assert picture == len(batch["image_grid_thw"])


def test_mm_token_type_ids_mark_the_placeholders_wherever_the_processor_makes_them(
    processor: Any, samples: list[Sample]
) -> None:
    batch = make_batch(processor, samples)
    if "mm_token_type_ids" not in batch:
        pytest.skip("this Transformers release has none")
    placeholders = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert torch.equal(batch["mm_token_type_ids"].bool(), placeholders)


def test_text_only_batches_have_no_pixels(processor: Any) -> None:
    batch = make_batch(processor, scenes(0, 2, ["text"]), pixel_dtype=torch.bfloat16)
    assert "pixel_values" not in batch
    assert "image_grid_thw" not in batch
    assert "labels" not in batch


def test_dtype_and_device(processor: Any, samples: list[Sample]) -> None:
    batch = make_batch(processor, samples, answers=True, device="meta", pixel_dtype=torch.float16)
    assert {tensor.device.type for tensor in batch.values()} == {"meta"}
    assert batch["pixel_values"].dtype == torch.float16
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}


def test_no_samples_are_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        make_batch(processor, [])


def test_an_answer_that_melts_into_the_prompt_is_refused(tmp_path: Path) -> None:
    """Released tokenizers have a token for two line breaks: a leading one changes the prompt's end."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_dir(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    line_break = "\u010a"
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    vocabulary[2 * line_break] = vocabulary.pop("".join(merges.pop()))
    merges.append([line_break, line_break])
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match=r"'x'.*start it with a letter"):
        make_batch(load_processor(folder), [Sample((), "Say red.", "\nred", "text", "x")], answers=True)


def test_importing_processors_stays_light() -> None:
    """Nothing heavy at import: the plugin's start-up passes through here."""
    import subprocess

    heavy = "{'torch', 'transformers', 'numpy'} & set(sys.modules)"
    code = f"import sys, pytest_qvl.models.sources.processors, pytest_qvl.models.sources.embedded; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_trainer_saves_it(processor: Any, tmp_path: Path, samples: list[Sample]) -> None:
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    before, after = make_batch(processor, samples[:2]), make_batch(again, samples[:2])
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", "{broken", r"cannot be read \(JSONDecodeError: .*\): save it again"),
        ("tokenizer.json", "{}", r"cannot be read \(.*\): save it again"),
        ("preprocessor_config.json", "{broken", r"cannot be read \(OSError: .*\): save it again"),
        ("chat_template.json", None, "has no chat template, so no prompt can be written: set processor.chat_template"),
    ],
)
def test_a_processor_that_cannot_be_used(tmp_path: Path, file: str, content: str | None, says: str) -> None:
    from pytest_qvl.models.sources.model_source import ModelSource, ModelSourceError
    from pytest_qvl.models.sources.synthetic_processor import processor_for

    folder = shutil.copytree(embedded_model_dir(), tmp_path / "checkpoint")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ModelSourceError, match=says):
        processor_for(ModelSource("local", str(folder)))
