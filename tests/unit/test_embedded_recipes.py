"""What the embedded models of every family are made from, and the script that trains them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.models.sources.processors import load_processor
from pytest_qvl.samples import make_batch, scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
FAMILIES = ("qwen2.5-vl", "qwen3-vl", "qwen3.5")
CLASSES = {
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "qwen3.5": "Qwen3_5ForConditionalGeneration",
}
NF4_BLOCK = 64
every_family = pytest.mark.parametrize("family", FAMILIES)

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="not in a checkout")


def _needs_class(family: str) -> None:
    if not hasattr(transformers, CLASSES[family]):
        pytest.skip(f"Transformers {transformers.__version__} has no {CLASSES[family]}")


@pytest.fixture(scope="module")
def files() -> Iterator[Any]:
    """The module of the recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIXTURES)
        import embedded_files

        yield embedded_files


@pytest.fixture(scope="module")
def training(files: Any) -> Any:
    """The training script as a module."""
    import train_embedded

    return train_embedded


@pytest.fixture(scope="module")
def folder(files: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with everything but weights, by family."""
    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        _needs_class(family)
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            recipe = files.RECIPES[family]
            files.write_files(made[family], recipe, 10.0, recipe.layers)
        return made[family]

    return write


@pytest.fixture(scope="module")
def skeleton(folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """A model without values, by family."""

    def build(family: str) -> Any:
        config = transformers.AutoConfig.from_pretrained(folder(family))
        with torch.device("meta"):
            return getattr(transformers, config.architectures[0])(config)

    return build


def test_every_family_has_a_recipe(files: Any) -> None:
    assert tuple(files.RECIPES) == FAMILIES


@every_family
def test_a_folder_that_is_shipped_is_what_its_recipe_writes(
    family: str, files: Any, folder: Callable[[str], Path]
) -> None:
    shipped = FIXTURES / files.RECIPES[family].folder
    if not (shipped / "config.json").is_file():
        pytest.skip(f"no trained model of {family} yet")
    for file in folder(family).iterdir():
        assert file.read_bytes() == (shipped / file.name).read_bytes(), file.name


@every_family
def test_the_model_is_small_and_divides_into_blocks(family: str, skeleton: Callable[[str], Any]) -> None:
    model = skeleton(family)
    assert type(model).__name__ == CLASSES[family]
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % NF4_BLOCK == 0, name
            # One output a value head, as in every release: a whole block has to span rows.
            if name.rpartition(".")[2] not in ("in_proj_a", "in_proj_b"):
                assert module.out_features % NF4_BLOCK == 0, name
            assert module.weight.numel() % NF4_BLOCK == 0, name


def test_deepstack_lies_within_the_depth_of_both(skeleton: Callable[[str], Any]) -> None:
    """An index beyond the tower is never computed, one beyond the backbone never added (huggingface/trl#5779)."""
    config = skeleton("qwen3-vl").config
    indexes = config.vision_config.deepstack_visual_indexes
    assert len(indexes) == 3
    assert max(indexes) < config.vision_config.depth - 1
    assert len(indexes) < config.text_config.num_hidden_layers


def test_linear_attention_is_three_layers_of_four(skeleton: Callable[[str], Any]) -> None:
    kinds = skeleton("qwen3.5").config.text_config.layer_types
    assert kinds == (["linear_attention"] * 3 + ["full_attention"]) * (len(kinds) // 4)
    assert kinds


@every_family
def test_special_tokens_agree_with_the_configuration(family: str, folder: Callable[[str], Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(folder(family))
    tokenizer = load_processor(folder(family)).tokenizer
    token = tokenizer.convert_tokens_to_ids
    assert token("<|image_pad|>") == config.image_token_id
    assert token("<|video_pad|>") == config.video_token_id
    assert token("<|vision_start|>") == config.vision_start_token_id
    assert token("<|vision_end|>") == config.vision_end_token_id
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) <= config.get_text_config().vocab_size
    generation = json.loads((folder(family) / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [token("<|im_end|>"), token("<|endoftext|>")]


def test_thoughts_are_no_special_tokens(folder: Callable[[str], Path]) -> None:
    tokenizer = load_processor(folder("qwen3.5")).tokenizer
    ids = tokenizer("<think>\n\n</think>\n\nred<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n\n</think>\n\nred"
    assert tokenizer.convert_ids_to_tokens(ids) == ["<think>", "ĊĊ", "</think>", "ĊĊ", "red", "<|im_end|>"]


@every_family
def test_every_answer_word_is_one_token(family: str, folder: Callable[[str], Path]) -> None:
    tokenizer = load_processor(folder(family)).tokenizer
    for sample in scenes(0, 20):
        ids = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(sample.answer.replace(",", " ,").split()), sample.answer


@every_family
def test_a_scene_is_one_visual_token_per_cell(family: str, files: Any, folder: Callable[[str], Path]) -> None:
    cell = files.RECIPES[family].cell
    assert transformers.AutoConfig.from_pretrained(folder(family)).qvl_scene_cell == cell
    samples = scenes(1, 2, ["colour", "nth_shape"], cell=cell)
    batch = make_batch(load_processor(folder(family)), samples, answers=True)
    cells = [scene.rows * scene.columns for sample in samples for scene in sample.scenes]
    assert (batch["image_grid_thw"].prod(-1) // 4).tolist() == cells


QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is it? "}]}
ASKED = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What shape is it?<|im_end|>\n"
# As the template of Qwen3.5-0.8B writes them.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "to answer": ([QUESTION], {}, ASKED + "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "not to think": (
        [QUESTION],
        {"enable_thinking": False},
        ASKED + "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "to think": ([QUESTION], {"enable_thinking": True}, ASKED + "<|im_start|>assistant\n<think>\n"),
    "answered": (
        [QUESTION, {"role": "assistant", "content": "star"}],
        {"add_generation_prompt": False},
        ASKED + "<|im_start|>assistant\n<think>\n\n</think>\n\nstar<|im_end|>\n",
    ),
    "thought": (
        [QUESTION, {"role": "assistant", "content": "star", "reasoning_content": "five tips\n"}],
        {"add_generation_prompt": False},
        ASKED + "<|im_start|>assistant\n<think>\nfive tips\n</think>\n\nstar<|im_end|>\n",
    ),
    "thought in the text": (
        [QUESTION, {"role": "assistant", "content": "<think>\nfive tips\n</think>\n\nstar"}],
        {"add_generation_prompt": False},
        ASKED + "<|im_start|>assistant\n<think>\nfive tips\n</think>\n\nstar<|im_end|>\n",
    ),
    "thoughts before the last question are left out": (
        [QUESTION, {"role": "assistant", "content": "<think>\nfive tips\n</think>\n\nstar"}, QUESTION],
        {"enable_thinking": True},
        ASKED + "<|im_start|>assistant\nstar<|im_end|>\n" + ASKED + "<|im_start|>assistant\n<think>\n",
    ),
    "system": (
        [{"role": "system", "content": " Be brief. "}, QUESTION],
        {"enable_thinking": True},
        "<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED + "<|im_start|>assistant\n<think>\n",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_thinking_template_writes_what_the_released_one_does(name: str, folder: Callable[[str], Path]) -> None:
    conversation, options, expected = CONVERSATIONS[name]
    processor = load_processor(folder("qwen3.5"))
    said = processor.apply_chat_template(
        conversation, tokenize=False, **{"add_generation_prompt": True, "enable_thinking": False} | options
    )
    assert said == expected


def test_the_thinking_template_does_not_think_unless_asked(folder: Callable[[str], Path]) -> None:
    conversation, _, expected = CONVERSATIONS["to answer"]
    processor = load_processor(folder("qwen3.5"))
    assert processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == expected


def test_samples_are_asked_without_a_thought_where_the_template_thinks_by_itself(
    folder: Callable[[str], Path], files: Any
) -> None:
    """As that of Qwen3.5-4B and above does; labels are the answer's alone."""
    processor = load_processor(folder("qwen3.5"))
    own = "enable_thinking is defined and enable_thinking is true"
    processor.chat_template = processor.chat_template.replace(own, "enable_thinking is not defined or enable_thinking")
    (sample,) = scenes(1, 1, ["shape"], cell=files.RECIPES["qwen3.5"].cell)
    asked = processor.apply_chat_template([QUESTION], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("assistant\n<think>\n")
    batch = make_batch(processor, [sample], answers=True)
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.endswith(f"<|im_start|>assistant\n<think>\n\n</think>\n\n{sample.answer}<|im_end|>")
    assert processor.tokenizer.decode(batch["labels"][batch["labels"] >= 0]) == f"{sample.answer}<|im_end|>"


@pytest.mark.parametrize("side", [5, 12, 48])
def test_learned_places_are_those_of_transformers(training: Any, side: int) -> None:
    vision_utils = pytest.importorskip("transformers.vision_utils")
    for rows, columns in ((1, 1), (3, 4), (4, 3)):
        grid = torch.tensor([[1, 2 * rows, 2 * columns]])
        table, shares = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=side, align_corners=True, spatial_merge_size=2
        )
        ours, parts = training.learned_places(rows, columns, side)
        # Where a patch lies on a place of the table exactly, the other neighbours count nothing, whichever they are.
        dense, stock = (torch.zeros(len(table), side * side) for _ in range(2))
        dense.scatter_add_(1, ours, parts)
        stock.scatter_add_(1, table, shares)
        torch.testing.assert_close(dense, stock, rtol=0, atol=1e-5)


def test_a_shuffled_scan_carries_positions_along(training: Any) -> None:
    pad = 9
    plain = training.mrope_positions([1, *[pad] * 6, 2], [(2, 3)], [[0, 1, 2, 3, 4, 5]], pad)
    assert plain == [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    scan = [4, 0, 5, 1, 3, 2]
    shuffled = training.mrope_positions([1, *[pad] * 6, 2], [(2, 3)], [scan], pad)
    assert [axis[1:7] for axis in shuffled] == [[axis[1 + cell] for cell in scan] for axis in plain]


@pytest.mark.slow
@every_family
def test_the_training_script_writes_a_complete_checkpoint(family: str, tmp_path: Path) -> None:
    """Also runs its own comparison of the training short cuts with the stock model."""
    _needs_class(family)
    command = [sys.executable, str(FIXTURES / "train_embedded.py"), "--family", family, "--out", str(tmp_path)]
    sizes = ["--steps", "2", "--tower-steps", "1", "--batch", "4", "--workers", "0", "--held-out", "1"]
    done = subprocess.run([*command, *sizes, "--device", "cpu"], check=True, capture_output=True, text=True)
    assert "held out: colour 0.000" in done.stdout
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    model = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (tmp_path / "model.safetensors").stat().st_size <= 6 * 2**20
    samples = scenes(0, 1, cell=config.qvl_scene_cell)
    assert model(**make_batch(load_processor(tmp_path), samples, answers=True)).loss.isfinite()


@pytest.mark.slow
@every_family
def test_the_evaluation_script_prints_its_tables(family: str, tmp_path: Path, files: Any) -> None:
    """On random weights: every variant and every ablation runs on this family."""
    _needs_class(family)
    script = [sys.executable, str(FIXTURES / "train_embedded.py"), "--family", family, "--out", str(tmp_path)]
    subprocess.run(
        [*script, "--steps", "0", "--workers", "0", "--held-out", "0", "--device", "cpu"],
        check=True,
        capture_output=True,
    )
    command = [sys.executable, str(FIXTURES / "evaluate_embedded.py"), "--model", str(tmp_path), "--per-skill", "2"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    ablations = 10 + (3 if family == "qwen3-vl" else 0)
    assert len(rows) == 1 + 4 + ablations, done.stdout  # a heading, four variants
