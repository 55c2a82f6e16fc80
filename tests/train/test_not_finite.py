"""Steps whose loss or gradient is not finite."""

import pytest
import torch
from accelerate import Accelerator

from metala_vision.build import create_model
from metala_vision.config import ModelConfig, OptimConfig
from metala_vision.engine import Hooks, Training, train_epoch
from metala_vision.optim import create_optimizer, create_scheduler


def small_training(**given):
    model = create_model(
        ModelConfig(model="metala_nano", img_size=32, model_kwargs={"depth": 1}), 4
    )
    config = OptimConfig(opt="sgd", lr=0.1, warmup_epochs=0, epochs=1)
    optimizer = create_optimizer(model, config, 0.1)
    return Training(
        model, torch.nn.CrossEntropyLoss(), optimizer, create_scheduler(optimizer, config, 6),
        Accelerator(cpu=True), last_step=6, log_interval=2, **given,
    )  # fmt: skip


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_counts(value, clip_grad):
    data = [(torch.randn(3, 32, 32), torch.tensor(i % 4)) for i in range(6)]
    data[3][0][0, 0, 0] = value
    run = small_training(clip_grad=clip_grad)
    weights, skipped, losses = {}, [], []

    def remember():
        weights[run.step] = [p.detach().clone() for p in run.model.parameters()]

    hooks = Hooks(
        skipped=skipped.append, interval=lambda x: losses.append((x.step, x.loss)),
        asked=lambda: (0, True), save=remember,
    )  # fmt: skip
    train_epoch(run, torch.utils.data.DataLoader(data, batch_size=1), hooks)
    assert [(x.step, x.in_a_row, x.batches) for x in skipped] == [(4, 1, range(3, 4))]
    same = [
        all(a.equal(b) for a, b in zip(weights[step], weights[step + 1], strict=True))
        for step in range(1, 6)
    ]
    assert same == [False, False, True, False, False]
    assert [step for step, _ in losses] == [2, 4, 6] and all(0 < x < 100 for _, x in losses)
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_gradient_that_is_not_finite_is_noticed_without_clipping():
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            return grad * float("inf")

    run = small_training()
    loss = torch.nn.CrossEntropyLoss()
    run.criterion = lambda logits, target: loss(Steep.apply(logits), target)
    before = [p.detach().clone() for p in run.model.parameters()]
    skipped = []
    data = [(torch.randn(3, 32, 32), torch.tensor(1))] * 2
    hooks = Hooks(skipped=skipped.append)
    train_epoch(run, torch.utils.data.DataLoader(data, batch_size=1), hooks)
    assert [x.in_a_row for x in skipped] == [1, 2]
    assert all(a.equal(b) for a, b in zip(before, run.model.parameters(), strict=True))
