"""The parts of a recipe, each by number."""

import math
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator

from metala_vision.build import create_model
from metala_vision.config import ModelConfig, OptimConfig
from metala_vision.config_file import load_config
from metala_vision.engine import Training, train_epoch
from metala_vision.optim import create_optimizer, create_scheduler, peak_lr, run_length
from metala_vision.recipe import Teacher


def test_channels_last_reaches_weights_and_images():
    seen = []
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    model.register_forward_pre_hook(
        lambda _, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    run = Training(
        model, lambda logits, target: logits.mean(), torch.optim.SGD(model.parameters()),
        None, Accelerator(cpu=True), 1, memory_format=torch.channels_last,
    )  # fmt: skip
    run.loss(torch.randn(2, 3, 8, 8), torch.zeros(2).long())
    assert seen == [True]


def test_a_teachers_part_is_its_equation_on_its_own_images():
    class Known(torch.nn.Module):
        pretrained_cfg: ClassVar = {"input_size": (3, 4, 4), "mean": (0.1,) * 3, "std": (0.2,) * 3}

        def forward(self, x):
            return x.mean((2, 3))

    images, T = torch.rand(5, 3, 4, 4), 3.0
    student_mean, student_std = (0.4, 0.5, 0.6), (0.3, 0.2, 0.1)
    batch = (images - torch.tensor(student_mean).view(3, 1, 1)) / torch.tensor(student_std).view(
        3, 1, 1
    )
    logits, loss = torch.randn(5, 3), torch.tensor(2.0)
    p = ((images.mean((2, 3)) - 0.1) / 0.2 / T).softmax(1)
    q = (logits / T).softmax(1)
    soft = T**2 * (p * (p / q).log()).sum(1).mean()
    hard = -logits.log_softmax(1)[torch.arange(5), p.argmax(1)].mean()
    for kind, part in (("soft", soft), ("hard", hard)):
        config = OptimConfig(
            distill_teacher="known", distill_type=kind, distill_share=0.3, distill_temperature=T
        )
        teacher = Teacher(Known(), config, student_mean, student_std)
        expected = 0.7 * loss + 0.3 * part
        assert teacher(loss, logits, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_of_a_window_is_that_of_its_images():
    torch.manual_seed(0)
    data = [(torch.randn(3), i % 2) for i in range(10)]
    weights = []
    for batch_size, accum in ((10, 1), (5, 2), (5, 3)):  # a window cut short by the epoch's end
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
        config = OptimConfig(opt="sgd", lr=0.5, warmup_epochs=0, epochs=1)
        optimizer = create_optimizer(model, config, 0.5)
        run = Training(
            model, torch.nn.CrossEntropyLoss(), optimizer, create_scheduler(optimizer, config, 1),
            Accelerator(cpu=True), last_step=1, grad_accum_steps=accum,
        )  # fmt: skip
        train_epoch(run, torch.utils.data.DataLoader(data, batch_size=batch_size))
        assert run.step == 1
        weights.append(model.weight.detach().clone())
    assert torch.allclose(weights[0], weights[1]) and torch.allclose(weights[0], weights[2])
    assert not torch.allclose(weights[0], torch.full_like(weights[0], 0.1))


def test_layer_decay_scales_the_rates_by_depth():
    model = create_model(ModelConfig(model="metala_nano", model_kwargs={"depth": 2}), 5)
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5), 1e-3)
    scheduler = create_scheduler(optimizer, OptimConfig(warmup_epochs=0, epochs=2), 10)
    scheduler.step_update(0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    names = {n: rates[id(p)] for n, p in model.named_parameters()}
    for prefix, expected in (
        ("patch_embed", 1e-3 / 8), ("blocks.0", 1e-3 / 4), ("blocks.1", 1e-3 / 2),
        ("norm", 1e-3 / 2), ("head", 1e-3),
    ):  # fmt: skip
        found = [x for n, x in names.items() if n.startswith(prefix)]
        assert found == pytest.approx([expected] * len(found)) and found, prefix


def test_the_schedule_warms_up_and_ends_at_the_minimum():
    config = OptimConfig(epochs=10, warmup_epochs=2, lr=1.0, warmup_lr=0.1, min_lr=0.01)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = create_scheduler(optimizer, config, 5)
    lrs = []
    for step in range(50):
        scheduler.step_update(step)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs[0] == pytest.approx(0.1) and lrs[10] == pytest.approx(1.0)
    assert lrs[:11] == sorted(lrs[:11]) and lrs[10:] == sorted(lrs[10:], reverse=True)
    middle = 0.01 + 0.5 * 0.99 * (1 + math.cos(math.pi * 20 / 40))
    assert lrs[30] == pytest.approx(middle) and lrs[-1] == pytest.approx(0.01, abs=2e-3)


def test_length_and_learning_rate_rules():
    assert run_length(OptimConfig(epochs=3), 7) == 21
    assert run_length(OptimConfig(epochs=3, max_steps=5), 7) == 5
    assert peak_lr(OptimConfig(lr_base=6e-4, lr_base_size=512), 2048) == pytest.approx(2.4e-3)
    assert peak_lr(OptimConfig(lr=1e-3), 2048) == 1e-3


# Of every family: the matrices of a block that are decayed beside these, and those spared.
SHARED = {
    "patch_embed.proj.weight", "head.fc.weight", "blocks.0.mlp.fc1.weight",
    "blocks.0.mlp.fc2.weight", "blocks.0.mixer.out_proj.weight",
}  # fmt: skip
USUAL = {"conv.conv.weight", "in_proj.weight"}
OF_A_WAY = ("conv.conv.weight", "dt_weight", "x_proj.weight")
WAYS = {f"ways.{i}.{name}" for i in (0, 1) for name in OF_A_WAY}
DECAYED = {
    "metala": (USUAL, {"w_aug"}), "attention": (USUAL, set()),
    "eva_attention": (
        USUAL | {"query_proj.weight", "key_proj.weight"}, {"relative_bias"},
    ),
    "gla": (USUAL | {"decay_proj.weight"}, set()), "hgrn": (USUAL, {"theta"}),
    "hgrn2": (USUAL, set()), "regla": (USUAL, set()), "retnet": (USUAL, set()),
    "linear_attention": (USUAL, set()),
    "mamba": ({"in_proj.weight"} | WAYS, {"ways.0.A_log", "ways.1.A_log"}),
    "lru": ({"conv.conv.weight"}, {"in_proj.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("family", DECAYED)
def test_weight_decay_spares_vectors_and_what_the_model_excludes(family):
    model = create_model(ModelConfig(model=f"{family}_nano", model_kwargs={"depth": 1}), 5)
    optimizer = create_optimizer(model, OptimConfig(), 1e-3)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    own, spared = ({f"blocks.0.mixer.{name}" for name in part} for part in DECAYED[family])
    assert names == SHARED | own
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    bounds = {"lower_bounds.weight"} if family.startswith("hgrn") else set()
    assert matrices - names == spared | bounds


@pytest.mark.parametrize("family", DECAYED)
def test_layer_decay_knows_the_depth_of_every_parameter(family):
    model = create_model(ModelConfig(model=f"{family}_nano", model_kwargs={"depth": 3}), 5)
    optimizer = create_optimizer(model, OptimConfig(layer_decay=0.5), 1e-3)
    scales = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        depth = {"patch_embed": 4, "lower_bounds": 4, "norm": 1, "head": 0}.get(name.split(".")[0])
        if depth is None:
            assert name.startswith("blocks."), name
            depth = 3 - int(name.split(".")[1])
        assert scales[id(p)] == 0.5**depth, name


@pytest.mark.parametrize("name", ["imagenet1k/metala_tiny_paper", "imagenet1k/metala_small_paper"])
def test_the_papers_recipe(name):
    """arXiv 2411.10741, appendix A4."""
    optim = load_config(name).optim
    assert peak_lr(optim, load_config(name).data.batch_size) == pytest.approx(2.4e-3)
    assert (optim.opt, optim.betas, optim.weight_decay) == ("adamw", (0.9, 0.98), 0.05)
    assert optim.epochs == 300 and load_config(name).data.batch_size == 2048
