"""What the Unsloth backend asks of Unsloth, and what it says where Unsloth cannot be used; Unsloth stands aside.

Unsloth refuses vision models without a GPU, so its functions are stood in for here by those of Transformers and
PEFT on the embedded model, with the signatures of its source.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from pytest_qvl.gpu.nvml import Gpu
from pytest_qvl.gpu.visible import Visible
from pytest_qvl.models.adapters import LANGUAGE_ONLY
from pytest_qvl.models.backends import BACKENDS, LoadRequest, ModelLoadError, Registration, unsloth, unsloth_start
from pytest_qvl.models.backends.unsloth import UnslothBackend, draw_elsewhere, refuse_stale_class
from pytest_qvl.models.backends.unsloth_start import (
    UnslothStartError,
    import_first,
    let_compiled_code_be,
    problem,
    use_own_compile_folder,
)
from pytest_qvl.models.renamed import in_todays_layout
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

    stand_in = ModuleType("unsloth")
    stand_in.FastVisionModel = FastVisionModel
    monkeypatch.setitem(sys.modules, "unsloth", stand_in)
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


# ---- synthetic weights, and whose class runs ----------------------------------------------------------------


def small_request(*, quantized: bool) -> tuple[LoadRequest, object]:
    """A request for synthetic weights, and a configuration that is drawn in a second."""
    import torch

    from pytest_qvl.faults.matrix.random_models import random_config
    from pytest_qvl.models.quantized import usual_quantization

    quantization = usual_quantization(torch.bfloat16) if quantized else None
    request = LoadRequest(parse_model("synthetic:qwen2.5-vl-3b"), quantization, "cpu", "bfloat16")
    return request, random_config("qwen2_5_vl")


@pytest.mark.parametrize(
    "quantized", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["in 4 bits", "in 16 bits"]
)
def test_another_process_draws_the_same_bits(tmp_path, quantized):
    import torch
    from transformers import AutoModelForImageTextToText

    from pytest_qvl.models.sources.synthetic import build_synthetic

    request, config = small_request(quantized=quantized)
    folder = tmp_path / "model"
    draw_elsewhere(folder, request, config)
    assert (folder / "tokenizer.json").is_file()
    built = build_synthetic(config, request.quantization_config, "cpu", torch.bfloat16)
    built.save_pretrained(tmp_path / "here")
    assert tensors_of(folder) == tensors_of(tmp_path / "here")
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.generation_config.eos_token_id == built.generation_config.eos_token_id


def tensors_of(folder):
    """Every tensor of a checkpoint by name: dtype, shape and a digest of its bytes."""
    import torch
    from safetensors import safe_open

    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                tensor = opened.get_tensor(name)
                data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                found[in_todays_layout(name)] = tensor.dtype, tensor.shape, sha256(data).hexdigest()
    assert found
    return found


def test_a_process_that_fails_says_why(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "there").touch()
    request, config = small_request(quantized=False)
    said = (
        "the weights of synthetic:qwen2.5-vl-3b could not be drawn and saved for Unsloth: the process that does ended "
        f"with 1: ValueError: {tmp_path}/model exists and is not an empty folder"
    )
    with pytest.raises(ModelLoadError, match=said):
        draw_elsewhere(tmp_path / "model", request, config)


def fails(monkeypatch, code):
    """Make the process run this instead of drawing."""
    monkeypatch.setattr(unsloth, "_DRAW", instead_of_drawing(code))


def instead_of_drawing(code):
    written = f"def write_synthetic(*_): exec({code!r})"
    return unsloth._DRAW.replace("sys.exit(", f"exec({written!r}, draw_as_asked.__globals__)\nsys.exit(")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL: without a word"),
        ("raise SystemExit('no torch here')", "ended with 1: no torch here"),
    ],
)
def test_how_the_process_ended_is_told(tmp_path, monkeypatch, code, says):
    fails(monkeypatch, code)
    with pytest.raises(ModelLoadError, match=says):
        draw_elsewhere(tmp_path / "model", *small_request(quantized=True))


def test_out_of_memory_there_is_out_of_memory_here_and_leaves_no_folder(owner, tmp_path, monkeypatch):
    import torch

    fails(monkeypatch, "import torch; raise torch.OutOfMemoryError('CUDA out of memory.\\nTried 2 GiB')")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    request, _ = small_request(quantized=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried 2 GiB$"):
        owner.base(request, "OnCpu")
    assert not list(tmp_path.glob("qvl-*"))
    assert not FastVisionModel.calls


@pytest.mark.slow
def test_an_interrupt_ends_the_process_and_leaves_no_folder(owner, tmp_path, monkeypatch):
    started = tmp_path / "started"
    fails(monkeypatch, f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    request, _ = small_request(quantized=True)

    def interrupt():
        while not started.exists() or not started.read_text():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt, daemon=True)
    waiting.start()
    with pytest.raises(KeyboardInterrupt):
        owner.base(request, "OnCpu")
    waiting.join()
    assert not list(scratch.glob("qvl-*"))
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.slow
def test_the_process_ends_with_the_one_that_asked(tmp_path):
    started = tmp_path / "started"
    code = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = tmp_path / "parent.py"
    parent.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from pytest_qvl.models.backends import unsloth\n"
        f"unsloth._DRAW = {instead_of_drawing(code)!r}\n"
        "unsloth.draw_elsewhere(Path(sys.argv[1]), None, None)\n"
    )
    with subprocess.Popen([sys.executable, parent, tmp_path / "model"]) as process:
        while not started.exists() or not started.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    for _ in range(100):
        try:
            os.kill(int(started.read_text()), 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("it goes on without its parent")


def test_a_class_of_before_unsloth_rewrote_it_is_refused(monkeypatch):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    stock = modeling.Qwen2_5_VLForConditionalGeneration
    refuse_stale_class(stock)  # which Unsloth has left as it is
    rewritten = type(stock.__name__, (stock,), {"__module__": stock.__module__})
    monkeypatch.setattr(modeling, stock.__name__, rewritten)
    refuse_stale_class(rewritten)
    with pytest.raises(ModelLoadError, match="the model is Transformers' own Qwen2_5_VLFor"):
        refuse_stale_class(stock)


@pytest.mark.parametrize("asked", ["before", "meanwhile"])
def test_the_owner_loads_the_class_that_stands_in_the_module(owner, request_4bit, monkeypatch, asked):
    import transformers
    from transformers.models import qwen2_5_vl as package
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    load = FastVisionModel.from_pretrained.__func__
    stock = modeling.Qwen2_5_VLForConditionalGeneration
    name = stock.__name__
    rewritten = type(name, (stock,), {"__module__": stock.__module__})
    mapping = transformers.AutoModelForImageTextToText._model_mapping

    def rewrites_and_loads(cls, model_name, **options):
        assert asked == "before" or mapping[stock.config_class] is stock
        monkeypatch.setattr(modeling, name, rewritten)  # as its compiler does
        return load(cls, model_name, **options)

    monkeypatch.setattr(FastVisionModel, "from_pretrained", classmethod(rewrites_and_loads))
    assert mapping[stock.config_class] is getattr(transformers, name) is stock  # kept by both packages now
    try:
        if asked == "before":
            assert type(owner.base(request_4bit, "OnCpu")) is rewritten
        else:
            with pytest.raises(ModelLoadError, match=r"^the model is Transformers' own .* after that only, inside"):
                owner.base(request_4bit, "OnCpu")
    finally:
        for lazy in (package, transformers):
            setattr(lazy, name, stock)
