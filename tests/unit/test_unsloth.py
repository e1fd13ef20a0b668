"""What the Unsloth backend asks of Unsloth, and what it says where Unsloth cannot be used; Unsloth stands aside.

Unsloth refuses vision models without a GPU, so its functions are stood in for here by those of Transformers and
PEFT on the embedded model, with the signatures of its source.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from pytest_qvl.gpu.nvml import Gpu
from pytest_qvl.gpu.visible import Visible
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.backends import BACKENDS, LoadRequest, ModelLoadError, Registration, unsloth_start
from pytest_qvl.models.backends.unsloth import UnslothBackend
from pytest_qvl.models.backends.unsloth_start import (
    UnslothStartError,
    import_first,
    let_compiled_code_be,
    problem,
    use_own_compile_folder,
)
from pytest_qvl.models.sources.model_source import parse_model

# ---- usable or not -----------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Make it look as if this Unsloth was installed."""

    def install(version="2026.10.9", *needs):
        for name in ("unsloth", "unsloth_zoo"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "__init__.py").write_text("raise SystemError('imported')")
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs)]))
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize(
    ("version", "needs", "says"),
    [
        ("2026.10.9", ["transformers<=99,!=98.0", "torch>=2.4", "xformers>=0.0.27", "trl; extra == 'more'"], ""),
        ("2026.9.1", [], "Unsloth 2026.9.1 is older than 2026.10.9"),
        ("2026.10.9", ["transformers<=4.1"], "Unsloth 2026.10.9 needs transformers<=4.1, and "),
        ("2026.10.9", ["peft!=0.11.0", "torchvision>99"], "Unsloth 2026.10.9 needs torchvision>99, and "),
    ],
    ids=["all is well", "too old", "transformers too new", "torchvision"],
)
def test_what_is_installed_is_judged_without_importing_it(installed, version, needs, says):
    installed(version, *needs)
    assert problem().startswith(says)
    assert bool(problem()) == bool(says)
    assert "unsloth" not in sys.modules


def test_a_missing_unsloth_is_named_with_the_mend(monkeypatch):
    monkeypatch.setattr(unsloth_start, "_version", lambda package: None)
    said = problem()
    assert said.startswith("backend 'unsloth' needs Unsloth, which is not installed; pip install '")
    assert f"'unsloth>={unsloth_start.OLDEST}'" in said


def test_compiled_code_of_another_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_COMPILE_LOCATION", str(tmp_path))
    use_own_compile_folder()
    assert os.environ["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path)
    (tmp_path / "unsloth_compiled_module_qwen2_5_vl.py").touch()
    with pytest.raises(UnslothStartError, match=r"holds compiled code of an earlier run.*empty that folder, or unset"):
        use_own_compile_folder()


@pytest.fixture
def one_gpu(tmp_path, monkeypatch):
    """A machine with a GPU, as far as the driver says, and nothing imported."""
    gpu = Gpu("GPU-00000000-0000-0000-0000-000000000001", 0, "NVIDIA T4", 15 * 2**30)
    monkeypatch.setattr("pytest_qvl.gpu.visible.visible_gpus", lambda: Visible((gpu,)))
    monkeypatch.setenv("QVL_GPU_LEASES", str(tmp_path / "leases"))
    monkeypatch.setattr(unsloth_start, "_kept", [])
    for name in ("UNSLOTH_COMPILE_LOCATION", "UNSLOTH_COMPILE_DISABLE", "UNSLOTH_DISABLE_STATISTICS"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    for name in unsloth_start.PATCHED:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield gpu
    for kept in unsloth_start._kept:
        getattr(kept, "release", getattr(kept, "cleanup", None))()


def test_what_it_patches_must_not_be_there_before(one_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", ModuleType("peft"))
    with pytest.raises(UnslothStartError, match="has to be imported before what it patches, and peft had been"):
        import_first(print)


def test_the_gpu_is_leased_before_the_import_and_an_import_that_fails_is_one_line(one_gpu, installed):
    installed()
    with pytest.raises(UnslothStartError, match="Unsloth could not be imported: SystemError: imported"):
        import_first(print)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == one_gpu.uuid
    assert os.environ["UNSLOTH_COMPILE_DISABLE"] == "1"
    assert not Path(os.environ["UNSLOTH_COMPILE_LOCATION"]).is_relative_to(Path.cwd())


def test_what_pytest_and_ci_change_is_put_back(monkeypatch):
    from torch._functorch import config

    name, trace = "error_on_custom_op_aliasing", logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace, "disabled", False)
    monkeypatch.setenv("TORCH_TRACE", "/asked/for")
    with config.patch({name: True} if hasattr(config, name) else {}):
        let_compiled_code_be()
        assert getattr(config, name, False) is False
        assert not trace.disabled  # somebody wants it
        monkeypatch.delenv("TORCH_TRACE")
        let_compiled_code_be()
        assert trace.disabled


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_pytest_and_ci_change_nothing_of_what_is_compiled(pytester, monkeypatch, told):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name in ("TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING", "TORCH_TRACE"):
        monkeypatch.delenv(name, raising=False)
    pytester.makeconftest(
        "from pytest_qvl.models.backends.unsloth_start import let_compiled_code_be\n"
        f"import torch\nif {told}: let_compiled_code_be()"
    )
    pytester.makepyfile(
        f"""
        def test_compiles(caplog):
            import torch
            from torch._functorch import config
            assert torch.compile(torch.relu, backend="eager")(torch.ones(1)) == 1
            traced = any(record.name == "torch.__trace" for record in caplog.records)
            assert traced is {not told}
            assert getattr(config, "error_on_custom_op_aliasing", {not told}) is {not told}
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider", "-W", "ignore").assert_outcomes(passed=1)


# ---- what it asks of Unsloth -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "flags"),
    [
        ({"target_modules": LANGUAGE_ONLY}, {"target_modules": None, "finetune_vision_layers": False, "r": 8}),
        ({"target_modules": r".*q_proj"}, {"target_modules": r".*q_proj"}),
        ({"target_modules": ["v_proj", "q_proj"]}, {"target_modules": ["q_proj", "v_proj"]}),
        (
            {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "bias": "all", "use_rslora": True, "modules_to_save": ["x"]},
            {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1, "bias": "all", "use_rslora": True, "modules_to_save": ["x"]},
        ),
        ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    ],
)
def test_a_lora_config_becomes_flags(config, flags):
    from peft import LoraConfig

    made = UnslothBackend().flags(LoraConfig(**config))
    assert {name: made[name] for name in flags} == flags


@pytest.mark.parametrize(
    ("config", "named"),
    [({"use_dora": True}, "use_dora=True"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}")],
)
def test_what_has_no_flag_is_refused_by_name(config, named):
    from peft import LoraConfig

    with pytest.raises(ValueError, match=r"no flag for .* of the LoraConfig; leave it out") as caught:
        UnslothBackend().flags(LoraConfig(**config))
    assert named in str(caught.value)


class FastVisionModel:
    """Stands in for Unsloth's, on the CPU."""

    calls: ClassVar[list] = []

    @classmethod
    def from_pretrained(cls, model_name, **options):
        import torch
        from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

        cls.calls.append(("from_pretrained", model_name, options))
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.visual", "lm_head"],
        )
        return AutoModelForImageTextToText.from_pretrained(model_name, quantization_config=quantization), None

    @classmethod
    def get_peft_model(cls, model, r, target_modules, finetune_vision_layers, random_state, **flags):
        from peft import LoraConfig, get_peft_model

        cls.calls.append(("get_peft_model", random_state, flags))
        everywhere = LANGUAGE_ONLY.replace(".*language_model", "") if finetune_vision_layers else LANGUAGE_ONLY
        wrapped = get_peft_model(model, LoraConfig(r=r, target_modules=target_modules or everywhere))
        model.enable_input_require_grads()  # as its preparation does; on Transformers 5 also the vision tower's
        return wrapped

    @classmethod
    def for_inference(cls, model):
        cls.calls.append(("for_inference", type(model).__name__))
        for module in model.modules():
            module.gradient_checkpointing = False
        return model.eval()

    @classmethod
    def for_training(cls, model, use_gradient_checkpointing=None):
        cls.calls.append(("for_training", use_gradient_checkpointing))
        return model.train()


def test_buffers_of_its_checkpointing_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    UnslothBackend().free_buffers()  # where it was never imported there is nothing
    zoo = ModuleType("unsloth_zoo.gradient_checkpointing")
    made = []
    zoo.initialize_unsloth_gradient_checkpointing = made.append
    zoo.GPU_BUFFER_DTYPE = "float16"
    monkeypatch.setitem(sys.modules, zoo.__name__, zoo)
    UnslothBackend().free_buffers()
    assert made == [], "before its first training it keeps none"
    zoo.GPU_BUFFERS = [None]
    UnslothBackend().free_buffers()
    assert made == ["float16"]


class OnCpu(UnslothBackend):
    """Registered under another name, for the CPU."""


class OnVisionToo(OnCpu):
    """The fault that Unsloth's own default is."""

    vision_layers = True


@pytest.fixture
def owner(monkeypatch):
    """An owner that loads by Unsloth's stand-in."""
    from pytest_qvl.models.owner import ModelOwner

    unsloth = ModuleType("unsloth")
    unsloth.FastVisionModel = FastVisionModel
    monkeypatch.setitem(sys.modules, "unsloth", unsloth)
    for made in (OnCpu, OnVisionToo):
        monkeypatch.setitem(BACKENDS, made.__name__, Registration(f"{__name__}:{made.__name__}"))
        monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or _this_module())
    FastVisionModel.calls = []
    owner = ModelOwner(lambda line: None)
    yield owner
    owner.release()


def _this_module():
    module = ModuleType(__name__)
    vars(module).update(globals())
    return module


@pytest.fixture
def request_4bit():
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    return LoadRequest(parse_model("embedded"), quantization, "cpu", "bfloat16")


@pytest.fixture
def lora_config():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=LANGUAGE_ONLY)


def test_the_owner_drives_it_as_any_backend(owner, request_4bit, lora_config):
    from pytest_qvl import checks
    from pytest_qvl.models.anatomy import anatomy

    base = owner.base(request_4bit, "OnCpu")
    ((_, source, options), rested) = FastVisionModel.calls
    assert source == request_4bit.source.location
    assert options["load_in_4bit"]
    assert "quantization_config" not in options  # what is asked for is what Unsloth chooses
    assert options["local_files_only"]
    assert options["use_exact_model_name"]
    assert rested == ("for_inference", type(base).__name__)
    lora = owner.adapted(base, "OnCpu", lora_config, None, 7)
    checks.adapter_census(lora, lora_config)
    assert ("get_peft_model", 7) in [call[:2] for call in FastVisionModel.calls]
    assert FastVisionModel.calls[-1] == ("for_inference", type(lora).__name__)
    assert not anatomy(lora).patch_embed._forward_hooks
    assert owner.show_base()
    assert owner.show_adapted(None)
    OnCpu().prepare_training(lora, gradient_checkpointing=True)
    assert FastVisionModel.calls[-1] == ("for_training", "unsloth")
    OnCpu().prepare_training(lora, gradient_checkpointing=False)
    assert FastVisionModel.calls[-1] == ("for_training", False)


def test_adapters_on_the_vision_tower_fail_the_census(owner, request_4bit, lora_config):
    from pytest_qvl import checks

    lora = owner.adapted(owner.base(request_4bit, "OnVisionToo"), "OnVisionToo", lora_config, None, 0)
    with pytest.raises(checks.CheckFailed, match="vision"):
        checks.adapter_census(lora, lora_config)


def test_another_quantization_is_passed_on(owner, request_4bit):
    request_4bit.quantization_config.bnb_4bit_quant_type = "fp4"
    owner.base(request_4bit, "OnCpu")
    assert FastVisionModel.calls[0][2]["quantization_config"] is request_4bit.quantization_config


def test_without_its_import_at_the_start_nothing_is_loaded(owner, request_4bit, monkeypatch):
    monkeypatch.delitem(sys.modules, "unsloth")
    with pytest.raises(ModelLoadError, match="was not imported when pytest started"):
        owner.base(request_4bit, "OnCpu")
