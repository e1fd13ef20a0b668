"""Mistakes in optimizer, schedule, checkpointing and callbacks."""

from __future__ import annotations

from .mistake import mistake


def adamw(parameters):
    import torch

    return torch.optim.AdamW(list(parameters), lr=1e-3)


@mistake(
    "optimizer-before-the-adapter",
    source="adapter-hub/adapters#260",
    check="adapter_census",
    words=("optimizer misses", "before the adapter was attached"),
)
def early(bench, folder, guard):
    base = bench.base(quantized=False)
    optimizer = adamw(base.parameters())
    with bench.model(quantized=False) as model:
        yield bench.trainer(model, folder, guard, optimizers=(optimizer, None))


@mistake(
    "optimizer-of-b-alone",
    source="gke-labs/open-rl#80",
    check="adapter_census",
    words=("optimizer misses", "lora_A"),
)
def half_of_it(bench, folder, guard):
    with bench.model() as model:
        optimizer = adamw(p for n, p in model.named_parameters() if "lora_B" in n)
        yield bench.trainer(model, folder, guard, optimizers=(optimizer, None))


@mistake(
    "optimizer-holds-tensors-twice",
    source="pytorch/pytorch#40967, volcengine/veGiantModel#6",
    check="adapter_census",
    words=("more than once",),
)
def twice(bench, folder, guard):
    with bench.model() as model:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = adamw(trained)
        optimizer.param_groups.append({**optimizer.param_groups[0], "params": trained[:4]})
        yield bench.trainer(model, folder, guard, optimizers=(optimizer, None))


@mistake(
    "learning-rate-of-zero",
    source="huggingface/transformers#34754",
    check="learning_rate",
    words=("learning rate of 0",),
)
def no_rate(bench, folder, guard):
    with bench.model() as model:
        yield bench.trainer(model, folder, guard, learning_rate=0.0)


@mistake(
    "schedule-made-for-no-steps",
    source="huggingface/transformers#26827",
    check="learning_rate",
    words=("learning rate of 0", "schedule"),
)
def no_steps(bench, folder, guard):
    from transformers import get_linear_schedule_with_warmup

    with bench.model() as model:
        optimizer = adamw(p for p in model.parameters() if p.requires_grad)
        schedule = get_linear_schedule_with_warmup(optimizer, 0, 0)
        yield bench.trainer(model, folder, guard, optimizers=(optimizer, schedule))


@mistake(
    "a-group-without-a-rate",
    source="huggingface/transformers#26827",
    check="learning_rate",
    words=("1 of 2 parameter groups",),
)
def one_group(bench, folder, guard):
    import torch

    with bench.model() as model:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for n, p in named if "lora_A" in n], "lr": 0.0},
            {"params": [p for n, p in named if "lora_B" in n], "lr": 1e-3},
        ]
        yield bench.trainer(model, folder, guard, optimizers=(torch.optim.AdamW(groups), None))


@mistake(
    "reentrant-checkpointing-without-input-gradients",
    source="huggingface/peft#137, huggingface/trl#3089, huggingface/transformers#42489",
    check="gradients",
    words=("no path", "use_reentrant"),
)
def reentrant(bench, folder, guard):
    from transformers import TrainerCallback

    class Unhooked(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            for module in model.modules():
                for key, hook in list(module._forward_hooks.items()):
                    if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                        del module._forward_hooks[key]

    with bench.model() as model:
        yield bench.trainer(
            model,
            folder,
            guard,
            Unhooked(),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


@mistake(
    "hidden-states-detached",
    source="unslothai/unsloth-zoo#43",
    check="gradients",
    words=("no path",),
)
def detached(bench, folder, guard):
    from pytest_qvl.models.anatomy import anatomy

    with bench.model() as model:
        norm = anatomy(model).language_backbone.norm
        norm.register_forward_hook(lambda module, args, output: output.detach())
        yield bench.trainer(model, folder, guard)


@mistake(
    "a-layer-cut-off",
    source="huggingface/peft#2880, unslothai/unsloth#5039",
    check="gradients",
    words=("gradient has no path to", "layers.0."),
)
def cut_off(bench, folder, guard):
    from pytest_qvl.models.anatomy import anatomy

    with bench.model() as model:
        second = anatomy(model).language_backbone.layers[1]

        def cut(module, args, kwargs):
            if args:
                return (args[0].detach(), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

        second.register_forward_pre_hook(cut, with_kwargs=True)
        yield bench.trainer(model, folder, guard)


@mistake(
    "gradients-zeroed-by-a-hook",
    source="unslothai/unsloth#5039",
    check="gradients",
    words=("exactly zero", "lora_B"),
)
def zeroed(bench, folder, guard):
    with bench.model() as model:
        for name, parameter in model.named_parameters():
            if "lora_B" in name and "layers.1." in name:
                parameter.register_hook(lambda grad: grad * 0)
        yield bench.trainer(model, folder, guard)


@mistake(
    "gradients-not-finite",
    source="unslothai/unsloth-zoo#866, LaVi-Lab/VG-LLM#21",
    check="gradients",
    words=("gradients are not finite",),
)
def wild(bench, folder, guard):
    with bench.model() as model:
        last = [p for n, p in model.named_parameters() if "lora_B" in n][-1]
        last.register_hook(lambda grad: grad / 0)
        yield bench.trainer(model, folder, guard, max_grad_norm=0)


@mistake(
    "loss-not-finite",
    source="huggingface/transformers#33294",
    check="loss",
    words=("losses are not finite",),
)
def nan(bench, folder, guard):
    import torch

    from pytest_qvl.models.anatomy import anatomy

    with bench.model() as model:
        merger = anatomy(model).merger
        merger.register_forward_hook(lambda module, args, output: torch.full_like(output, float("inf")))
        yield bench.trainer(model, folder, guard)


@mistake(
    "unfrozen-by-a-callback",
    source="modelscope/ms-swift#7318",
    check="gradients",
    words=("not the adapter's take gradients", "vision"),
)
def unfrozen(bench, folder, guard):
    from transformers import TrainerCallback

    from pytest_qvl.models.anatomy import anatomy

    class Unfreezes(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            anatomy(model).blocks[0].mlp.requires_grad_(True)

    with bench.model() as model:
        yield bench.trainer(model, folder, guard, Unfreezes())


@mistake(
    "vision-back-propagated",
    source="huggingface/transformers#41993, huggingface/peft#2880",
    check="vision_not_backpropagated",
    since_5=True,
    words=("back-propagated through", "make_inputs_require_grads"),
    vision_gradients="stop",
)
def vision(bench, folder, guard):
    with bench.model() as model:
        yield bench.trainer(
            model,
            folder,
            guard,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )


@mistake(
    "weights-put-back-after-the-step",
    source="PKU-YuanGroup/Open-Sora-Plan#186",
    check="adapter_moved",
    words=("did not move", "puts their values back"),
)
def put_back(bench, folder, guard):
    import torch
    from transformers import TrainerCallback

    class Average(TrainerCallback):
        """An average of the weights, with a decay of 1 by mistake."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.kept = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name in self.kept:
                        parameter.copy_(self.kept[name])

    with bench.model() as model:
        yield bench.trainer(model, folder, Average(), guard)


@mistake(
    "base-moved-by-a-callback",
    source="huggingface/peft#1355, Blaizzy/mlx-vlm#2181",
    check="base_unchanged",
    words=("base tensors are not bitwise", "after step 1", "lm_head"),
)
def moved(bench, folder, guard):
    import torch
    from transformers import TrainerCallback

    from pytest_qvl.models.anatomy import anatomy

    class Writes(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                anatomy(model).lm_head.weight.view(-1)[7] += 1e-3

    with bench.model() as model:
        yield bench.trainer(model, folder, guard, Writes())
