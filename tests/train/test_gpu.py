"""Training on a GPU: `make test-gpu`.

METALA_VISION_GPU_TESTS=cpu runs them on a CPU, to try the tests themselves.
"""

import json
import os

import pytest
import timm
import torch

from metala_vision.build import create_model
from metala_vision.cli import main
from metala_vision.config import DataConfig, ModelConfig
from metala_vision.config_file import load_config
from metala_vision.data import create_loaders
from metala_vision.models import FAMILIES
from metala_vision.splits import find_split
from tests._numerics import relative_rms
from tests.conftest import SMALL_MODEL
from tests.train._comparison import comparison
from tests.train._runs import finish, kill_at, launch, metrics

GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # of torch.compile, and of devices not yet seen
    pytest.mark.skipif(
        not GPU and os.environ.get("METALA_VISION_GPU_TESTS") != "cpu", reason="needs a CUDA device"
    ),
]
DEVICE = torch.device("cuda" if GPU else "cpu")
DIGITS = ("--config", "quickstart", "--on-device", "--batch-size", "120", "--workers", "0")
FULL = (*DIGITS, "--model-ema", "--mixup", "0.8", "--cutmix", "1", "--drop-path-rate", "0.1",
        "--color-jitter", "0.3", "--reprob", "0.25")  # fmt: skip


@pytest.fixture
def no_tf32():
    """cuDNN's convolutions take it unless told otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def pair(name, **kwargs):
    """A model in float64 on the CPU, and the same in float32 on the device."""
    torch.manual_seed(0)
    exact = timm.create_model(name, num_classes=10, **kwargs)
    ours = timm.create_model(name, num_classes=10, **kwargs)
    ours.load_state_dict(exact.state_dict())
    return exact.double(), ours.to(DEVICE)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [f"{family}_nano" for family in FAMILIES])
def test_every_family_agrees_with_float64(name, compiled, no_tf32):
    """Logits and the gradient of every parameter, float32, on an oblong map."""
    exact, ours = pair(name, img_size=(64, 96), **({"depth": 2} if compiled else {}))
    if compiled:
        ours.compile()
    x = torch.randn(2, 3, 64, 96)
    for model, images in ((exact, x.double()), (ours, x.to(DEVICE))):
        model.eval()  # EVA samples in training
        logits = model(images)
        logits.square().mean().backward()
        model.logits = logits.detach().cpu()
    # float32's 1e-5 of one operator, through eight blocks of a dozen layers each.
    assert relative_rms(ours.logits, exact.logits) <= 1e-4
    truth = dict(exact.named_parameters())
    for key, parameter in ours.named_parameters():
        error = relative_rms(parameter.grad.cpu(), truth[key].grad, least=1e-12)
        assert error <= 1e-3, (key, error)


@pytest.mark.parametrize("name", [f"{family}_nano" for family in FAMILIES])
def test_every_family_trains_under_autocast(name):
    """Eight images are learned by heart."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=8, img_size=32, patch_size=8).to(DEVICE)
    x = torch.randn(8, 3, 32, 32, device=DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(60):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x), torch.arange(8, device=DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # at first ln 8 = 2.08


def loaders(tree, device, **more):
    config = DataConfig(
        data_dir=tree, on_device=True, batch_size=12, workers=0, color_jitter=0.4, reprob=0.5,
        interpolation="random", **more,
    )  # fmt: skip
    model = ModelConfig(model="metala_nano", img_size=32)
    split = find_split(config)
    made = create_model(model, split.num_classes)
    return create_loaders(config, model, made, split, seed=0, device=device)


def test_batches_made_on_the_device_are_those_of_the_cpu(digit_tree):
    here, there = (loaders(digit_tree, torch.device(kind)) for kind in ("cpu", DEVICE.type))
    for part in ("train", "val"):
        for own, other in zip(getattr(here, part), getattr(there, part), strict=True):
            assert own[0].device.type == "cpu" and other[0].device.type == DEVICE.type
            assert torch.equal(own[1], other[1].cpu())
            # The same bytes; a GPU divides them by 255 as a product, a rounding of numbers up to 3.
            assert (own[0] - other[0].cpu()).abs().max() <= 1e-6


@pytest.mark.skipif(not GPU, reason="a CPU has nothing to wait for")
def test_no_batch_waits_for_the_device(digit_tree):
    made = loaders(digit_tree, DEVICE)
    next(iter(made.train))  # pinned memory is allocated
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in made.train:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "more",
    [(), ("--mixed-precision", "bf16"), ("--mixed-precision", "bf16", "--torchcompile", "model"),
     ("--mixed-precision", "bf16", "--torchcompile", "blocks", "--channels-last"),
     ("--mixed-precision", "bf16", "--grad-checkpointing", "--grad-accum-steps", "2")],
    ids=["float32", "bf16", "compiled", "blocks", "checkpointing"],
)  # fmt: skip
def test_a_run_learns_and_its_weights_are_read_on_a_cpu(more, tmp_path):
    run = tmp_path / "run"
    flags = [*FULL, *more, "--max-steps", "36", "--warmup-epochs", "1", "--run-dir", str(run)]
    assert main(["train", *flags]) == 0
    losses = [line["loss"] for line in metrics(run) if line["event"] == "train"]
    assert losses[-1] < losses[0]
    told = [line for line in metrics(run) if line["event"] == "eval"][-1]
    model = timm.create_model(f"local-dir:{run / 'last'}", pretrained=True).eval()
    config = load_config(str(run / "config.yaml"))
    val = create_loaders(config.data, config.model, model, find_split(config.data), seed=0).val
    with torch.no_grad():
        hits = sum((model(x).argmax(1) == target).sum().item() for x, target in val)
    found = 100 * hits / len(val.dataset)
    assert abs(found - told["top1"]) <= 1.0  # four of 360 images: bf16, another device


def test_a_run_that_is_killed_goes_on(tmp_path):
    """To rounding: cuDNN adds the gradient of a convolution in no fixed order."""
    flags = [*FULL, "--max-steps", "24", "--checkpoint-minutes", "0.0001", "--log-interval", "1",
             "--resume", "auto"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(launch([*flags, "--run-dir", whole], gpu=GPU))
    assert kill_at(launch([*flags, "--run-dir", broken], gpu=GPU), broken, 9)
    finish(launch([*flags, "--run-dir", broken], gpu=GPU))
    for own, other in zip(metrics(whole), metrics(broken), strict=True):
        assert own["step"] == other["step"]
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-2)


def test_bench_and_two_runs_at_a_time_on_one_device(digit_tree, tmp_path, capsys):
    out = tmp_path / "speed.json"
    assert main(["bench", *DIGITS, "--seconds", "1", "--json", str(out)]) == 0
    speed = json.loads(out.read_text())
    assert speed["device"].startswith(DEVICE.type) and speed["memory_mib"] > 0
    assert speed["gpu_busy"] is None or 0 <= speed["gpu_busy"] <= 100
    where = ["--gpus", "0"] if GPU else []
    file = comparison(tmp_path, digit_tree)
    assert main(["compare", str(file), "--output", str(tmp_path / "two"), "--jobs", "2", *where,
                 "--seconds", "0.2"]) == 0  # fmt: skip
    assert (tmp_path / "two" / "report.html").stat().st_size > 0


def test_out_of_memory_is_one_line(digit_tree, tmp_path, capsys):
    if not GPU:
        pytest.skip("a CPU swaps")
    flags = ["--data-dir", str(digit_tree), *SMALL_MODEL, "--run-dir", str(tmp_path / "run")]
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        assert main(["train", *flags, "--img-size", "2048", "--patch-size", "4"]) == 2
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    error = capsys.readouterr().err
    assert "out of memory with data.batch_size=" in error and error.count("\n") == 1
