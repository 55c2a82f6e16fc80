"""Whole runs on real digits: what they learn and what they leave behind."""

import json
import math
import re
from datetime import datetime

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from metala_vision.build import create_model
from metala_vision.cli import main
from metala_vision.config import SECTIONS, Config, ModelConfig, OptimConfig
from metala_vision.config_file import load_config
from metala_vision.engine import Hooks, Training, evaluate, train_epoch
from metala_vision.optim import create_optimizer, create_scheduler, peak_lr
from metala_vision.train import train
from tests.conftest import SMALL_MODEL


def arguments(tree, run_dir, *extra):
    return [
        "train", "--data-dir", str(tree), "--run-dir", str(run_dir), *SMALL_MODEL,
        "--batch-size", "12", "--workers", "0", "--epochs", "2", "--warmup-epochs", "1",
        "--log-interval", "2", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(digit_tree, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run") / "first"
    assert main(arguments(digit_tree, run_dir)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)  # the test behind wants its own
    return run_dir


def test_a_run_leaves_everything_that_the_folder_promises(finished_run):
    config = load_config(str(finished_run / "config.yaml"))
    assert config.optim.epochs == 2 and config.model.model == "metala_nano"
    facts = json.loads((finished_run / "environment.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {"commit", "command", "python", "cpu_cores"} <= set(facts)
    with Image.open(finished_run / "curve.png") as picture:
        assert picture.size == (1170, 468)
    lines = [json.loads(x) for x in (finished_run / "metrics.jsonl").read_text().splitlines()]
    evals = [x for x in lines if x["event"] == "eval"]
    trains = [x for x in lines if x["event"] == "train"]
    assert [x["epoch"] for x in evals] == [1, 2] and all(x["images"] == 12 for x in evals)
    assert [x["step"] for x in trains] == [2, 3, 5, 6]
    assert all(math.isfinite(x["loss"]) and x["img_per_s"] > 0 for x in trains)
    assert all(0 <= x["waited"] <= 1 and 50 < x["memory_mib"] < 1e5 for x in trains)
    left = {p.name for p in finished_run.iterdir()} - {"changes.patch"}
    assert left == {
        "config.yaml", "environment.json", "metrics.jsonl", "curve.png", "README.md", "checkpoints",
        "best", "last", ".lock", "result.json",
    }  # fmt: skip
    assert {p.name for p in (finished_run / "checkpoints").iterdir()} == {
        "step-00000003", "step-00000006",
    }  # fmt: skip


def test_the_model_card_tells_the_figures_of_the_run(finished_run):
    card = (finished_run / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-classification" and front["library_name"] == "timm"
    last = metrics(finished_run)[-1]
    assert f"{last['top1']:.2f} %, {last['top5']:.2f} % on 12 held-out images" in card
    model = timm.create_model(f"local-dir:{finished_run / 'last'}", pretrained=True)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card


def test_tensorboard_holds_the_metrics(finished_run, digit_tree, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_dir = tmp_path / "run"
    assert main(arguments(digit_tree, run_dir, "--trackers", "tensorboard")) == 0
    assert metrics(run_dir) == metrics(finished_run)
    events = accumulator.EventAccumulator(str(next(run_dir.rglob("events.out*")).parent)).Reload()
    found = [(x.step, x.value) for x in events.Scalars("train/loss")]
    told = [(x["step"], x["loss"]) for x in metrics(run_dir) if x["event"] == "train"]
    assert [step for step, _ in found] == [step for step, _ in told]
    assert [x for _, x in found] == pytest.approx([x for _, x in told], rel=1e-6)
    assert len(events.Scalars("eval/top1")) == 2


@pytest.mark.parametrize("which", ["best", "last"])
def test_timm_loads_a_checkpoint_with_its_head_and_preprocessing(finished_run, which):
    model = timm.create_model(f"local-dir:{finished_run / which}", pretrained=True).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["label_names"] == ["digit0", "digit1", "digit2"]
    state = torch.load(finished_run / which / "training_state.pt", weights_only=True)
    assert state["step"] in (3, 6) and state["processes"][0]["rng"]["torch"].numel() > 100


def metrics(folder):
    """A run's metrics without the times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    of_the_machine = ("seconds", "img_per_s", "waited", "memory_mib")
    return [{k: v for k, v in x.items() if k not in of_the_machine} for x in lines]


def test_the_resolved_configuration_starts_the_same_run_again(finished_run, digit_tree, tmp_path):
    resolved = load_config(str(finished_run / "config.yaml"))
    assert resolved.data.data_dir == digit_tree.resolve()
    assert resolved.optim.lr == 6e-4 * 12 / 512 and resolved.model.img_size == 32
    config = str(finished_run / "config.yaml")
    assert main(["train", "--config", config, "--run-dir", str(tmp_path / "again")]) == 0
    assert metrics(tmp_path / "again") == metrics(finished_run)


def test_the_last_line_is_the_top1(digit_tree, tmp_path, capsys):
    assert main(arguments(digit_tree, tmp_path / "run", "--epochs", "1")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    evaluation = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last.startswith(f"top-1 {evaluation['top1']:.2f} % on 12 held-out images")


def test_fresh_run_folders_do_not_collide(digit_tree, tmp_path, monkeypatch):
    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("metala_vision.run_folder.datetime", Stopped)
    flags = arguments(digit_tree, "x", "--max-steps", "1", "--output", str(tmp_path))
    at = flags.index("--run-dir")
    del flags[at : at + 2]
    assert main(flags) == 0 and main(flags) == 0
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["train-20260102-030405", "train-20260102-030405-2"]


def test_best_is_the_best_and_last_the_last(digit_tree, tmp_path):
    config = Config()
    config.model = ModelConfig(
        model="metala_nano", img_size=32,
        model_kwargs={"embed_dim": 32, "depth": 1, "num_heads": 1},
    )  # fmt: skip
    config.data.data_dir, config.data.workers, config.data.batch_size = digit_tree, 0, 12
    config.optim = OptimConfig(epochs=6, warmup_epochs=1, lr=3e-3)
    config.run.run_dir = tmp_path / "run"
    result = train(config)
    lines = map(json.loads, (result.run_dir / "metrics.jsonl").read_text().splitlines())
    top1 = [line["top1"] for line in lines if line["event"] == "eval"]
    assert result.last.top1 == top1[-1] and result.best.top1 == max(top1)
    states = {
        name: torch.load(result.run_dir / name / "training_state.pt", weights_only=True)
        for name in ("best", "last")
    }
    assert states["last"]["epoch"] == 6 and states["last"]["step"] == 18
    assert states["best"]["epoch"] == result.best_epoch == top1.index(max(top1)) + 1


def test_it_overfits_one_batch():
    torch.manual_seed(0)
    model = create_model(
        ModelConfig(model="metala_nano", img_size=32, model_kwargs={"depth": 2}), 4
    )
    batch, target = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    accelerator = Accelerator(cpu=True)
    config = OptimConfig(epochs=40, warmup_epochs=4, lr=2e-3)
    loader = torch.utils.data.DataLoader([(batch[i], target[i]) for i in range(16)], batch_size=16)
    optimizer = create_optimizer(model, config, peak_lr(config, 16))
    scheduler = create_scheduler(optimizer, config, 1)
    losses = []
    run = Training(
        model, torch.nn.CrossEntropyLoss(), optimizer, scheduler, accelerator, last_step=40
    )
    for _ in range(40):
        train_epoch(run, loader, Hooks(interval=lambda interval: losses.append(interval.loss)))
    assert run.step == 40 and losses[0] > 1.0 and losses[-1] < 0.02
    assert evaluate(model, loader, accelerator).top1 == 100.0


SETTINGS = [
    ["--clip-grad", "0.001"], ["--smoothing", "0.3"], ["--drop-path-rate", "0.5"],
    ["--mixed-precision", "bf16"], ["--seed", "1"], ["--hflip", "0"], ["--color-jitter", "0.9"],
    ["--reprob", "1"], ["--interpolation", "bilinear"], ["--scale", "0.9", "1"],
    ["--ratio", "0.5", "0.6"], ["--auto-augment", "rand-m5"], ["--weight-decay", "100"],
    ["--betas", "0.5", "0.6"], ["--opt", "sgd"], ["--min-lr", "1e-5"], ["--warmup-lr", "1e-5"],
    ["--warmup-epochs", "0"], ["--lr", "2e-3"], ["--lr-base", "1e-2"], ["--lr-base-size", "32"],
    ["--crop-pct", "0.5"], ["--mean", "0.1"], ["--std", "0.1"], ["--batch-size", "6"],
    ["--img-size", "40"], ["--patch-size", "4"], ["--model-kwargs", "embed_dim=16", "num_heads=1"],
    ["--max-steps", "4"], ["--epochs", "3"], ["--num-classes", "7"], ["--in-chans", "1"],
    ["--eval-interval", "2"], ["--log-interval", "3"], ["--mixup", "0.8"], ["--cutmix", "1"],
    ["--cutmix-minmax", "0.3", "0.6"], ["--aug-repeats", "3"], ["--grad-accum-steps", "2"],
    ["--bce-loss"], ["--layer-decay", "0.5"], ["--model-ema"], ["--sched", "tanh"],
    ["--opt-kwargs", "eps=0.1"],
    ["--distill-teacher", "metala_nano", "--distill-kwargs", "pretrained=false", "num_classes=3"],
]  # fmt: skip
TAUGHT = [
    "--distill-teacher", "metala_nano", "--distill-kwargs", "pretrained=false", "num_classes=3",
]  # fmt: skip
# Settings of something that another flag turns on.
DEPENDENT = [
    (["--auto-augment", "3a"], ["--color-jitter", "0.9"]),
    (["--color-jitter", "0.9"], ["--auto-augment", "3a"]),
    (["--mixup", "0.8"], ["--mixup-prob", "0.1"]), (["--mixup", "0.8"], ["--mixup-mode", "elem"]),
    (["--mixup", "0.8", "--cutmix", "1"], ["--mixup-switch-prob", "1"]),
    (["--mixup", "0.8"], ["--mixup-off-epoch", "1"]), (["--mixup", "0.8"], ["--smoothing", "0.3"]),
    (["--bce-loss", "--mixup", "0.8"], ["--bce-target-thresh", "0.2"]),
    (["--bce-loss"], ["--smoothing", "0.3"]),
    (["--bce-loss"], ["--mixup", "0.8"]),
    (["--model-ema"], ["--model-ema-decay", "0.1"]),
    (["--model-ema"], ["--model-ema-warmup", "false"]),
    (["--sched", "step"], ["--decay-epochs", "0.5"]),
    (["--sched", "step", "--decay-epochs", "0.5"], ["--decay-rate", "0.5"]),
    (TAUGHT, ["--distill-type", "hard"]), (TAUGHT, ["--distill-share", "0.9"]),
    (TAUGHT, ["--distill-temperature", "3"]),
]  # fmt: skip


@pytest.mark.launch
@pytest.mark.parametrize("flags", SETTINGS, ids=lambda flags: flags[0].removeprefix("--"))
def test_every_setting_reaches_the_run(flags, finished_run, digit_tree, tmp_path):
    """Runs repeat bit by bit, so a setting that changes nothing in the metrics is not applied."""
    assert main(arguments(digit_tree, tmp_path / "run", *flags)) == 0
    assert metrics(tmp_path / "run") != metrics(finished_run)


@pytest.mark.launch
@pytest.mark.parametrize(("base", "flags"), DEPENDENT, ids=str)
def test_every_setting_of_a_setting_reaches_the_run(base, flags, digit_tree, tmp_path):
    assert main(arguments(digit_tree, tmp_path / "base", *base)) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(arguments(digit_tree, tmp_path / "run", *base, *flags)) == 0
    assert metrics(tmp_path / "run") != metrics(tmp_path / "base")


def near(ours, before, relative):
    """Whether two runs' metrics are the same but for rounding."""
    pairs = zip(metrics(ours), metrics(before), strict=True)
    return all(a == (b if "image" in b else pytest.approx(b, rel=relative)) for a, b in (
        ({k: v for k, v in x.items() if k != "event"}, {k: v for k, v in y.items() if k != "event"})
        for x, y in pairs
    ))  # fmt: skip


@pytest.mark.parametrize("flag", ["--grad-checkpointing", "--channels-last"])
def test_settings_that_only_change_the_execution(flag, finished_run, digit_tree, tmp_path):
    assert main(arguments(digit_tree, tmp_path / "run", flag)) == 0
    assert near(tmp_path / "run", finished_run, 1e-4)  # another layout, another rounding
    config = ModelConfig(model="metala_nano", grad_checkpointing=True)
    assert create_model(config, 3).grad_checkpointing


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::UserWarning")
@pytest.mark.parametrize("what", ["model", "blocks"])
def test_a_compiled_run_is_the_same_run(what, finished_run, digit_tree, tmp_path):
    assert main(arguments(digit_tree, tmp_path / "run", "--torchcompile", what)) == 0
    assert near(tmp_path / "run", finished_run, 1e-3)
    names = load_file(tmp_path / "run" / "last" / "model.safetensors").keys()
    assert names == load_file(finished_run / "last" / "model.safetensors").keys()


def test_the_average_of_the_weights_is_evaluated_and_saved(digit_tree, tmp_path):
    run_dir = tmp_path / "run"
    assert main(arguments(digit_tree, run_dir, "--model-ema", "--lr", "1e-2")) == 0
    average = load_file(run_dir / "last" / "model.safetensors")
    state = torch.load(run_dir / "last" / "training_state.pt", weights_only=True)
    last = state["model"]
    assert average.keys() == last.keys()
    assert any(not torch.equal(average[name], last[name]) for name in average)
    model = timm.create_model(f"local-dir:{run_dir / 'last'}", pretrained=True)
    assert all(torch.equal(model.state_dict()[name], x) for name, x in average.items())


def test_every_key_is_tried_by_these_tests():
    tried = {flag for flags in SETTINGS for flag in flags if flag.startswith("--")}
    tried |= {flags[0] for _, flags in DEPENDENT}
    tried |= {"--grad-checkpointing", "--channels-last", "--torchcompile", "--max-unreadable"}
    tried |= {"--trackers"}
    tried |= {flag for flag in arguments("x", "y") if flag.startswith("--")}
    # Here, in test_data.py, test_archives.py and test_val_file.py:
    tried |= {"--output", "--val-fraction", "--split-seed", "--dataset", "--train-split"}
    tried |= {"--val-split", "--input-key", "--target-key", "--class-range", "--val-file"}
    # In test_resume.py and test_faults.py:
    tried |= {"--resume", "--checkpoint-minutes", "--checkpoint-hist", "--max-skipped"}
    # In test_on_device.py:
    tried |= {"--on-device", "--on-device-size"}
    # In test_transfer.py:
    tried |= {"--pretrained", "--pretrained-path", "--freeze-layers", "--linear-probe"}
    tried |= {"--lora-rank", "--lora-alpha", "--lora-target", "--class-weights", "--patience"}
    keys = {key for section in SECTIONS.values() for key in section.model_fields}
    assert tried == {f"--{key.replace('_', '-')}" for key in keys}


def test_a_shorter_run_without_a_terminal_still_speaks(digit_tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("metala_vision.train.LINE_INTERVAL", 0)
    assert main(arguments(digit_tree, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^step 2/6  loss \d\.\d+  \d+ img/s  0 min left$", out, re.M)


def test_a_model_of_timm_trains_too(digit_tree, tmp_path):
    flags = arguments(digit_tree, tmp_path / "run", "--max-steps", "1")
    at = flags.index("--model")
    flags[at : at + len(SMALL_MODEL)] = ["--model", "resnet10t", "--img-size", "64"]
    assert main(flags) == 0


def test_evaluation_counts_each_image_once():
    class Constant(torch.nn.Module):
        def forward(self, x):
            return torch.arange(6.0).expand(len(x), 6)

    data = [(torch.zeros(1), label) for label in (5, 5, 4, 0, 0)]
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    result = evaluate(Constant(), loader, Accelerator(cpu=True))
    assert (result.top1, result.top5, result.images) == (40.0, 60.0, 5)
    scores = torch.arange(6.0).log_softmax(0)
    assert result.loss == pytest.approx(-(2 * scores[5] + scores[4] + 2 * scores[0]).item() / 5)
