"""Associative recall: causal models, a sweep from the command line, stopped and resumed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from metala_vision.cli import main
from metala_vision.compare.estimates import estimate
from metala_vision.models import FAMILIES
from metala_vision.probe.mqar_model import RecallModel, causal_mixers, conv_of, state_floats
from metala_vision.probe.mqar_picture import recall_picture
from metala_vision.probe.mqar_run import (
    RecallRun,
    accuracy,
    examples_of,
    learning_rate_of,
    train_run,
)
from metala_vision.probe.mqar_sweep import SETTINGS, Sweep
from metala_vision.probe.mqar_table import COLUMNS, Row, best_rate, cells_of, rows_of
from tests.train._runs import ROOT

BOTH_WAYS = ("eva_attention",)  # families that hear of all tokens at once
CAUSAL = [family for family in FAMILIES if family not in BOTH_WAYS]
CPU = torch.device("cpu")
RUN = RecallRun(
    "attention", 16, 2, 16, 1e-2, 0, vocab=8, train_examples=24, test_examples=8, batch_size=8,
    epochs=4, mlp_ratio=0.0,
)  # fmt: skip
TINY = (
    "--lengths", "16:2", "--dims", "16", "--vocab", "8", "--train-examples", "16",
    "--test-examples", "8", "--batch-size", "8", "--epochs", "2",
)  # fmt: skip


def probe(output, *flags):
    return main(["probe", "mqar", "--output", str(output), *TINY, *map(str, flags)])


def table(output):
    with (output / "mqar.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_family_has_a_causal_form_or_says_why_not():
    reasons = causal_mixers()
    assert set(reasons) == set(FAMILIES)
    for family, reason in reasons.items():
        if family in BOTH_WAYS:
            assert reason.startswith("no causal form: direction='forward'"), reason
        else:
            assert reason == ""


@pytest.mark.parametrize("conv", ["published", "causal1d"])
@pytest.mark.parametrize("family", CAUSAL)
def test_no_answer_hears_of_what_comes_behind_it(family, conv):
    """Bit for bit, but for the order of sums: 1e-6 is some ten roundings of a logit near 1."""
    torch.manual_seed(0)
    model = RecallModel(family, 32, 24, 16, conv=conv).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # logits that tell of everything
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        tokens = torch.randint(0, 32, (3, 24))
        everywhere = torch.arange(24).expand(3, 24)
        before = model(tokens, everywhere)
        for t in (0, 9, 22):
            changed = tokens.clone()
            changed[:, t + 1 :] = (tokens[:, t + 1 :] + 7) % 32
            difference = (model(changed, everywhere) - before).abs()
            assert difference[:, : t + 1].max() <= 1e-6 * before.abs().max()
            assert difference[:, t + 1 :].amax((1, 2)).min() > 1e-3  # the change itself is heard
        changed = tokens.clone()
        changed[:, 0] = (tokens[:, 0] + 7) % 32
        assert (model(changed, everywhere) - before)[:, 1:].abs().max() > 1e-3  # so is the past


def test_logits_stand_where_they_are_asked_for():
    model = RecallModel("metala", 32, 24, 16).eval()
    tokens, asked = torch.randint(0, 32, (2, 24)), torch.tensor([[5, 3], [23, 0]])
    every = model(tokens, torch.arange(24).expand(2, 24))
    assert torch.equal(model(tokens, asked), torch.stack([every[0, [5, 3]], every[1, [23, 0]]]))


def test_the_model_is_that_of_the_paper():
    """Positions for softmax attention alone, tied weights, convolutions as published."""
    for family in CAUSAL:
        model = RecallModel(family, 32, 24, 16, mlp_ratio=0)
        names = set(model.state_dict())
        assert ("positions" in names) == (family == "attention")
        assert not any("head" in name or "patch" in name or "mlp" in name for name in names)
        widths = {p.shape[2] for name, p in model.named_parameters() if "conv.weight" in name}
        assert widths == {"metala": {2}, "mamba": {4}}.get(family, set())
    assert [conv_of(f, "published") for f in ("metala", "mamba", "gla")] == [
        "causal1d(2)", "causal1d", "none",
    ]  # fmt: skip
    assert conv_of("metala", "none") == "none"
    assert any("mlp" in name for name in RecallModel("gla", 32, 24, 16).state_dict())


def test_a_convolution_that_hears_of_later_tokens_is_refused():
    with pytest.raises(ValueError, match="conv='depthwise2d' hears of later tokens"):
        RecallModel("gla", 32, 24, 16, conv="depthwise2d")


def test_states_are_counted():
    """C 32, H 2: K V a head, K 8 and V 16 of MetaLA and GLA, 16 and 16 of the others; a row sum
    more; 16 states a channel of 64; 2 a complex channel; all of 24 tokens' keys and values."""
    counts = {
        "metala": 2 * 8 * 16, "gla": 2 * 8 * 16, "hgrn2": 2 * 16 * 16, "retnet": 2 * 16 * 16,
        "regla": 2 * 16 * 16,
        "linear_attention": 2 * 16 * 17, "mamba": 64 * 16, "hgrn": 2 * 32, "lru": 2 * 32,
        "attention": 2 * 24 * 32,
    }  # fmt: skip
    assert set(counts) == set(CAUSAL)
    for family, count in counts.items():
        assert state_floats(RecallModel(family, 32, 24, 32, device="meta"), 24) == count, family


def test_the_sweep_is_the_published_one():
    sweep = Sweep(**SETTINGS["published"])
    sweep.check()
    assert sweep.lengths == [(64, 4), (128, 8), (256, 16), (512, 64)]
    assert [sweep.run("gla", n, 64, 1e-3, 0).batch_size for n in sweep.lengths] == [
        512, 512, 256, 128,
    ]  # fmt: skip
    assert sweep.rates(256) == pytest.approx([10 ** (-4 + 2 * i / 3) for i in range(4)], rel=3e-3)
    assert sweep.rates(512) == pytest.approx(
        sorted(10 ** (low + 2 * i / 3) for low in (-5, -4) for i in range(4)), rel=3e-3
    )
    rates = [learning_rate_of(replace(RUN, epochs=64), e) for e in (0, 32, 64)]
    assert rates == pytest.approx([1e-2, 5e-3, 0], abs=1e-12)


def test_a_run_that_is_stopped_goes_on_bit_by_bit(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    run = replace(RUN, stop_at=1.0)  # never: with dropout all four epochs
    random_numbers = torch.get_rng_state()
    expected = train_run(run, tmp_path / "whole", CPU)
    assert torch.equal(torch.get_rng_state(), random_numbers)

    def stop(progress):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_run(run, tmp_path / "cut", CPU, stop)
    assert [p.suffix for p in (tmp_path / "cut").iterdir()] == [".pt"]
    assert torch.equal(torch.get_rng_state(), random_numbers)
    torch.rand(7)  # of another part of the process
    random_numbers = torch.get_rng_state()
    told = []
    resumed = train_run(run, tmp_path / "cut", CPU, lambda p: told.append(len(p.losses)))
    assert told == [3, 4]
    assert resumed == expected and len(expected["losses"]) == 4
    assert expected["losses"][-1] < expected["losses"][0]
    assert [p.suffix for p in (tmp_path / "cut").iterdir()] == [".json"]
    assert json.loads((tmp_path / "cut" / f"{run.name}.json").read_text()) == expected
    other = train_run(replace(run, seed=1), tmp_path / "cut", CPU)
    assert other["losses"] != expected["losses"]
    assert torch.equal(torch.get_rng_state(), random_numbers)


def test_a_run_ends_when_it_is_good_enough_or_broken(tmp_path):
    run = replace(RUN, epochs=8)
    whole = train_run(replace(run, stop_at=1.0), tmp_path, CPU)["accuracies"]
    enough = max(whole) / 2
    assert enough > 0
    (tmp_path / "again").mkdir()
    good = train_run(replace(run, stop_at=enough), tmp_path / "again", CPU)["accuracies"]
    assert good == whole[: len(good)]
    assert good[-1] > enough and all(x <= enough for x in good[:-1])
    broken = train_run(replace(RUN, learning_rate=1e30, mixer="gla"), tmp_path, CPU)
    assert None in broken["losses"] and len(broken["losses"]) < 4
    assert broken["steps"] == 3 * len(broken["losses"])


def test_accuracy_is_the_share_of_right_answers():
    examples = examples_of(RUN, "test", CPU)
    model = RUN.model(CPU).eval()
    logits = model(examples.tokens, examples.asked)
    expected = (logits.argmax(2) == examples.answers).double().mean().item()
    assert accuracy(RUN, model, examples) == pytest.approx(expected)
    examples.answers = logits.argmax(2)
    assert accuracy(RUN, model, examples) == 1.0


def test_a_sweep_from_the_command_line(tmp_path, capsys):
    output = tmp_path / "sweep"
    flags = ("--learning-rates", "1e-3", "1e-2", "--seeds", 0, 1, "--sweep-seeds", 1)
    assert probe(output, "--mixers", "metala", "attention", *flags) == 0
    out = capsys.readouterr().out
    assert out.rstrip().endswith(str(output / "mqar.md"))
    assert (output / "mqar.md").read_text() in out
    assert {p.name for p in output.iterdir() if p.name != ".lock"} == {
        "mqar.md", "mqar.csv", "mqar.json", "mqar.png", "sweep.json", "runs",
    }  # fmt: skip
    with Image.open(output / "mqar.png") as image:
        assert image.width > 500
    rows = table(output)
    # Both rates with seed 0; seed 1 at the better of them alone
    assert len(rows) == 6 and [r["seed"] for r in rows].count("1") == 2
    assert {r["mixer"] for r in rows} == {"metala", "attention"}
    runs = json.loads((output / "mqar.json").read_text())
    assert [len(r["losses"]) for r in runs] == [2] * 6
    times = {p: p.stat().st_mtime_ns for p in (output / "runs").iterdir()}
    assert probe(output, "--mixers", "gla", "metala", *flags) == 0
    told = capsys.readouterr().out
    assert told.count(" after 2 epochs") == 3 and "gla-16x2" in told
    assert all(p.stat().st_mtime_ns == t for p, t in times.items())  # not trained again
    assert {r["mixer"] for r in table(output)} == {"gla", "metala"}

    assert probe(output, "--mixers", "gla", *flags, "--weight-decay", 0.2) == 2
    line = capsys.readouterr().err
    assert "holds a sweep with weight_decay 0.1, asked for is 0.2; take another --output" in line
    run_file = next(iter(times))
    whole = json.loads(run_file.read_text())
    for name in ("accuracy", "steps", "parameters", "state_floats", "device", "torch"):
        run_file.write_text(json.dumps({k: v for k, v in whole.items() if k != name}))
        assert probe(output, "--mixers", "gla", "metala", "attention", *flags) == 2
        assert f"{run_file} lacks {name}; delete it" in capsys.readouterr().err
    run_file.write_text("{}")
    assert probe(output, "--mixers", "gla", "metala", "attention", *flags) == 2
    assert f"{run_file} is of another run; delete it" in capsys.readouterr().err
    run_file.write_text("{")
    assert probe(output, "--mixers", "gla", "metala", "attention", *flags) == 2
    assert f"cannot read {run_file}: " in capsys.readouterr().err
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if p != run_file)


def test_bfloat16_and_random_fillers(tmp_path, capsys):
    flags = ("--mixers", "hgrn", "--learning-rates", "1e-3", "--seeds", "0", "--sweep-seeds", "1")
    losses = {}
    for name, more in {
        "bf16": ("--precision", "bf16", "--random-non-queries"),
        "float32": ("--random-non-queries",),
        "filler": (),
    }.items():
        assert probe(tmp_path / name, *flags, *more) == 0
        text = capsys.readouterr().out
        assert ("filler random tokens" in text, "bf16" in text) == (
            name != "filler",
            name == "bf16",
        )
        losses[name] = json.loads((tmp_path / name / "mqar.json").read_text())[0]["losses"]
    # a few roundings of 2^-8 in logits near 0
    assert losses["bf16"] != losses["float32"] != losses["filler"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=2**-6)


def one(rate, seed, accuracy, steps=5):
    return {
        "mixer": "metala", "length": 512, "pairs": 80, "dim": 64, "learning_rate": rate,
        "seed": seed, "accuracy": accuracy, "steps": steps, "state_floats": 3, "parameters": 4,
    }  # fmt: skip


def test_the_best_learning_rate_is_that_of_the_mean():
    found = [one(1, 0, 0.9), one(1, 1, 0.1), one(2, 0, 0.6), one(2, 1, 0.5)]
    assert best_rate(found, [0]) == 1 and best_rate(found, [0, 1]) == 2
    assert best_rate([one(1, 0, 1.0, 9), one(2, 0, 1.0, 5), one(3, 0, 1.0, 5)], [0]) == 2
    (row,) = rows_of(found, Sweep(seeds=[0, 1]))
    assert (row.rate, row.accuracies, row.published) == (2, [60, 50], "28.5")
    assert row.accuracy.mean == pytest.approx(55) and row.by_rate == {1: 50, 2: 55}
    cells = dict(zip(COLUMNS, cells_of(row), strict=True))
    assert (cells["seeds"], cells["% by rate"]) == ("60.0 / 50.0", "50.0 / 55.0")


@pytest.mark.parametrize("dims", [(64,), (64, 128)])
def test_the_picture_holds_every_mixer(dims, tmp_path):
    rows = [
        Row(mixer, 512, 80, dim, "none", 1e-3, estimate([20.0, 30.0]), [20.0, 30.0], 5, 3, 4, {})
        for dim in dims
        for mixer in ("metala", "mamba", "gla")
    ]
    recall_picture(rows, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)} <= colours


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mixers", "metla"], "--mixers: 'metla' is unknown; accepted: metala, attention"),
        (["--mixers", "metla"], "did you mean metala?"),
        (["--mixers", "eva_attention"], "--mixers: eva_attention has no causal form: direction="),
        (["--mixers", "gla", "gla"], "--mixers: gla is given twice"),
        (["--lengths", "64:17"], "17 pairs and their questions need a length of 68 or more, got"),
        (["--lengths", "64"], "'64' is no LENGTH:PAIRS such as 64:8"),
        (["--lengths", "16:2", "16:2"], "--lengths: 16:2 is given twice"),
        (["--vocab", "5"], "2 pairs need a vocabulary of 6 or more tokens, half of them keys"),
        (["--learning-rates", "0"], "--learning-rates needs numbers above 0, got 0"),
        (["--learning-rates", "-0.001"], "--learning-rates needs numbers above 0, got -0.001"),
        (["--learning-rates", "nan"], "--learning-rates needs numbers above 0, got nan"),
        (["--dims", "6"], "metala, 16:2, width 6: dim=6 is not divisible by 2 * num_heads=4"),
        (["--dims", "0"], "--dims needs 1 or more, got 0"),
        (["--seeds", "-1"], "--seeds needs 0 or more, got -1"),
        (["--sweep-seeds", "4"], "--sweep-seeds 4: --seeds are 3"),
        (["--epochs", "0"], "--epochs needs 1 or more, got 0"),
        (["--dropout", "1"], "--dropout needs a number of 0 or more and below 1, got 1"),
        (["--weight-decay", "-1"], "--weight-decay needs a number of 0 or more, got -1"),
        (["--power", "0"], "power must be a number above 0, got 0.0"),
        (["--conv", "causal1d(0)"], "--conv causal1d(0): accepted are published, causal1d"),
        (["--conv", "depthwise2d"], "--conv depthwise2d: accepted are published, causal1d"),
        (["--setting", "big"], "invalid choice: 'big'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(flags, message, tmp_path, capsys):
    assert probe(tmp_path / "out", *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())  # nothing is left behind


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert probe(tmp_path / "file", "--mixers", "gla") == 2
    assert capsys.readouterr().err.startswith("metala-vision: error: cannot write ")


def test_a_state_that_is_not_whole_is_named(tmp_path, capsys):
    flags = ("--mixers", "gla", "--learning-rates", "0.001", "--seeds", "0", "--sweep-seeds", "1")
    state = tmp_path / "runs" / "gla-16x2-d16-lr0.001-seed0.pt"
    state.parent.mkdir()
    state.write_bytes(b"torn")
    assert probe(tmp_path, *flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and f"cannot go on from {state}: " in lines[0]


@pytest.mark.launch
@pytest.mark.slow
def test_a_killed_sweep_ends_as_one_that_was_not(tmp_path):
    """Killed in its first run and in its third, with as many threads as here."""
    flags = ["--mixers", "metala", "mamba", *TINY, "--train-examples", "256", "--epochs", "5",
             "--learning-rates", "1e-2", "--seeds", "0", "1", "--sweep-seeds", "2"]  # fmt: skip
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["probe", "mqar", *flags, "--output"]
    for ended in (0, 2):
        process = subprocess.Popen(
            [sys.executable, "-m", "metala_vision", *command, str(cut)], cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < end, "it ended before the kill"
            done, states = (list((cut / "runs").glob(f"m*{e}")) for e in (".json", ".pt"))
            if len(done) >= ended and states:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL
    (cut / "runs" / ".metala-torn.123.pt").write_bytes(b"half")
    for output in (cut, whole):
        assert main([*command, str(output)]) == 0
    for name in ("mqar.json", "mqar.md", "mqar.csv"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert {p.suffix for p in (cut / "runs").iterdir()} == {".json"}


@pytest.mark.launch
@pytest.mark.slow
def test_softmax_attention_solves_the_small_setting(tmp_path):
    """875 of 2,000 steps when this was written."""
    flags = ["--mixers", "attention", "--learning-rates", "2.15e-3", "--seeds", "0"]
    assert main(["probe", "mqar", "--output", str(tmp_path), *flags, "--sweep-seeds", "1"]) == 0
    (row,) = table(tmp_path)
    assert float(row["accuracy"]) > 0.99 and int(row["steps"]) < 2000
