"""The script that measures what NF4 costs group by group: its groups, its arithmetic, and real NF4."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_qvl.models.sources.released import released_config
from pytest_qvl.samples import scenes

if TYPE_CHECKING:
    from collections.abc import Iterator

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
FAMILIES = ("qwen3-vl", "qwen3.5")

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="not in a checkout")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIXTURES)
        patch.delitem(sys.modules, "nf4_by_group", raising=False)
        import nf4_by_group

        yield nf4_by_group


def _folder(family: str) -> Path:
    if family == "qwen3.5" and not hasattr(transformers, "Qwen3_5ForConditionalGeneration"):
        pytest.skip(f"Transformers {transformers.__version__} has no Qwen3.5")
    return FIXTURES / f"embedded-{family}"


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request: pytest.FixtureRequest, script: Any) -> Any:
    return script.load(_folder(request.param), torch.float32, "cpu")


def test_every_linear_layer_is_in_one_group(subject: Any, script: Any) -> None:
    linears = [name for name, module in subject.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(linears) == sorted(subject.linears)
    assert tuple(subject.groups) == tuple(group for group in script.GROUPS if group in subject.groups)
    hybrid = "linear_attn" in str(linears)
    assert set(script.LINEAR_ATTENTION) <= set(subject.groups) if hybrid else "deepstack mergers" in subject.groups


def test_a_linear_layer_of_no_group_is_an_error(subject: Any, script: Any) -> None:
    parts = script.anatomy(subject.model)
    with pytest.raises(ValueError, match="language_model.layers.0.router.gate belongs to no group"):
        script.group_of(parts, "model.language_model.layers.0.router.gate")


def test_configurations_are_each_group_alone_and_each_left_out(script: Any) -> None:
    groups = [group for group in script.GROUPS if group != "deepstack mergers"]
    made = script.configurations(groups)
    language = set(script.LANGUAGE)
    for group in groups:
        assert made[f"only {group}"] == (group,)
        assert set(made[f"everything without {group}"]) == set(groups) - {group}
        assert (f"language without {group}" in made) == (group in language)
    assert set(made["language without in_proj_a and in_proj_b"]) == language - {"in_proj_a", "in_proj_b"}
    assert set(made["language without the rest of linear_attn"]) == language - set(script.REST)
    assert all({first, second} <= set(made) for first, second in script.PAIRS)
    assert all("in_proj" not in name for name in script.configurations(["attention", "mlp", "vision", "head"]))


@pytest.mark.parametrize("shape", [(4, 128), (32, 4096), (1152, 4304), (3, 7)])
def test_bytes_are_those_of_what_bitsandbytes_makes(shape: tuple[int, int], script: Any) -> None:
    """4304, a width of the released towers, is no multiple of the block size."""
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    tensors = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert script.nf4_bytes(weight.numel()) == sum(tensor.nbytes for tensor in tensors)
    assert (state.blocksize, state.state2.blocksize) == (script.BLOCK, script.OUTER_BLOCK)


def test_weights_are_those_that_a_model_loaded_in_4_bits_multiplies_by(subject: Any, script: Any) -> None:
    """Bitwise, of every layer, the head's among them."""
    import bitsandbytes as bnb

    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[],
    )
    folder = _folder("qwen3.5" if "in_proj_a" in subject.groups else "qwen3-vl")
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
    )
    packed = {name: m.weight for name, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert packed.keys() == subject.quantized.keys()
    for name, weight in packed.items():
        made = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert made.dtype == torch.bfloat16
        assert torch.equal(made.float(), subject.quantized[name]), name


def test_sizes_of_released_shapes(script: Any) -> None:
    _folder("qwen3.5")
    sizes = script.sizes(released_config("qwen3.5-9b"))
    mib = {group: size.extra / 2**20 for group, size in sizes.items()}
    assert round(mib["in_proj_a"] + mib["in_proj_b"], 1) == 8.9
    assert round(sum(mib[group] for group in script.LINEAR_ATTENTION)) == 2288
    assert sizes["in_proj_a"].layers == 24
    assert sizes["in_proj_a"].weights == 24 * 32 * 4096
    assert sizes["head"].weights == 248_320 * 4096
    # Its head is the table of embeddings, which NF4 does not touch.
    assert script.sizes(released_config("qwen3.5-4b"))["head"].extra == 0
    assert script.Size(1, 4, 3) + script.Size(2, 5, 1) == script.Size(3, 9, 4)


def test_divergence_by_hand(script: Any) -> None:
    half, skewed = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.5], [0.8, 0.2]))
    assert script.divergence(half, half).item() == 0
    assert script.divergence(half, skewed).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    )
    assert script.divergence(skewed, half).item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    assert script.divergence(torch.stack([half, half]), torch.stack([half, skewed])).shape == (2,)


def test_small_divergences_are_told_from_nothing(script: Any) -> None:
    """In float32 the sum would be lost in rounding: of logits that are 1e-4 apart KL is a billionth."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, 448, generator=generator) * 3
    moved = logits + 1e-4 * torch.randn(logits.shape, generator=generator)
    scored = script.Scored.of(torch.tensor([[-100, 5]]))
    first, second = scored.log_probabilities(logits), scored.log_probabilities(moved)
    probability = first.exp()
    shift = (moved - logits)[0, 0].double()
    variance = (probability * shift.square()).sum() - (probability * shift).sum().square()
    assert script.divergence(first, second).item() == pytest.approx(variance.item() / 2, rel=1e-3)


def test_answers_are_scored_scene_by_scene(script: Any) -> None:
    labels = torch.tensor([[-100, -100, 1, 2], [-100, 0, 1, -100]])
    scored = script.Scored.of(labels)
    assert scored.tokens.tolist() == [1, 2, 0, 1]
    sure = torch.full((2, 4, 3), -20.0)
    for row, place, token in ((0, 1, 1), (0, 2, 2), (1, 0, 0), (1, 1, 1)):
        sure[row, place, token] = 0
    other = sure.clone()
    other[1, 1] = torch.tensor([0.0, -20.0, -20.0])  # the second scene's last token is another one
    reference = scored.log_probabilities(sure)
    answers = script.Answers()
    answers.add(scored.log_probabilities(other), reference, scored)
    assert answers.right == [True, False]
    assert answers.agreeing == [2, 1]
    assert answers.divergence == pytest.approx([0, 20], abs=1e-6)
    assert answers.log_probability == pytest.approx([0, -20], abs=1e-6)


def test_mean_and_error_of_tokens_by_scene(script: Any) -> None:
    assert script.ratio([1.0, 2.0, 3.0, 2.0], [1, 1, 1, 1]) == (2.0, pytest.approx(math.sqrt(2 / 3) / 2))
    # Scenes of as much a token each: no uncertainty, however long they are.
    assert script.ratio([2.0, 4.0, 6.0], [1, 2, 3]) == (2.0, 0.0)
    assert script.ratio([2.0], [4]) == (0.5, 0.0)


def test_flips_and_pairs_are_counted_the_right_way_round(script: Any) -> None:
    reference = script.Answers([0, 0, 0, 0], [1, 1, 1, 1], [True, True, True, False], [0, 0, 0, -1])
    own = script.Answers([1, 2, 0, 1], [0, 0, 1, 0], [False, False, True, True], [-2, -2, 0, 0])
    entry = script.summary(own, reference, ["colour", "list", "list", "text"], [1, 1, 1, 1])
    assert (entry["kl"], entry["agreeing"], entry["lost"], entry["gained"]) == (1.0, 1, 2, 1)
    assert dict(zip(script.ALL_SKILLS, entry["right"], strict=True))["list"] == 1
    assert sum(entry["right"]) == 2
    pair = script.comparison(own, reference, [1, 1, 1, 1])
    assert (pair["kl_more"], pair["only_first_right"], pair["only_second_right"]) == (1.0, 1, 2)


def test_weights_are_put_back_even_after_an_error(script: Any) -> None:
    linear = torch.nn.Linear(2, 2)
    stock = linear.weight.data

    def use() -> None:
        with script.weights_replaced({"a": linear}, {"a": torch.zeros(2, 2)}):
            assert not linear.weight.any()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert linear.weight.data_ptr() == stock.data_ptr()


@torch.no_grad()
def test_what_is_shared_between_configurations_changes_no_logit(subject: Any, script: Any) -> None:
    """Positions and visual tokens are computed once: bitwise what a model with those weights says by itself."""
    folder = _folder("qwen3.5" if "in_proj_a" in subject.groups else "qwen3-vl")
    samples = scenes(3, 1, ["colour", "nth_shape", "text"], cell=32)
    batch = {name: torch.from_numpy(array) for name, array in script.rendered((folder, samples)).items()}
    assert batch.pop("noise").shape == batch["pixel_values"].shape
    outputs = subject.outputs(batch)
    configured = script.configurations(list(subject.groups))
    calls = []
    handle = subject.model.model.visual.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    names = ("language", "everything", "only merger", "everything without vision", "language without mlp")
    got = {name: outputs.logits(configured[name]) for name in names}
    handle.remove()
    # The tower ran for: nothing of it changed; all of it; the merger; all but the blocks, if there is more than both.
    assert len(calls) == (4 if "deepstack mergers" in subject.groups else 3)
    for name in names:
        weights = {n: subject.quantized[n] for group in configured[name] for n in subject.groups[group]}
        with script.weights_replaced(subject.linears, weights):
            assert torch.equal(got[name], script.logits(subject.model, batch)), name
    assert not torch.equal(got["language"], outputs.logits())
    zero = outputs.logits(["mlp"], zeroed=True)
    mlp = {name: torch.zeros_like(linear.weight) for name, linear in subject.groups["mlp"].items()}
    with script.weights_replaced(subject.linears, mlp):
        assert torch.equal(zero, script.logits(subject.model, batch))


def test_noise_belongs_to_the_scene_and_not_to_its_batch(script: Any) -> None:
    folder = _folder("qwen3-vl")
    samples = scenes(3, 2, ["nth_shape", "text"], cell=32)
    together = script.rendered((folder, samples))["noise"]
    one, other = (script.rendered((folder, part))["noise"] for part in (samples[:2], samples[2:]))
    assert (together == script.np.concatenate([one, other])).all()
    assert abs(together.std() - 1) < 0.01
    assert "noise" not in script.rendered((folder, scenes(3, 1, ["text"], cell=32)))


@pytest.mark.slow
def test_the_script_writes_its_record(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "record.json"
    folder = str(_folder("qwen3-vl"))
    arguments = ["--family", "qwen3-vl", "--models", folder, folder, "--per-skill", "1", "--batch", "6"]
    monkeypatch.setattr(sys, "argv", ["nf4_by_group.py", *arguments, "--workers", "1", "--out", str(out)])
    script.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    assert [model["scenes"] for model in record["models"]] == [10, 10]
    for model in record["models"]:
        assert model["clear"]["float32"]["nothing"]["kl"] == 0
        assert 0 < model["clear"]["float32"]["everything"]["kl"] < model["clear"]["float32"]["zeroed mlp"]["kl"]
        assert model["noisy"]["float32"].keys() == {n for n in model["clear"]["float32"] if "zeroed" not in n}
    # Another model's scenes are others, and each line holds a configuration.
    assert record["models"][0]["clear"] != record["models"][1]["clear"]
    assert any(line.strip().startswith('"only mlp": {') for line in out.read_text(encoding="utf-8").splitlines())
