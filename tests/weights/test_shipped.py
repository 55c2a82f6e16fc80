"""The weights in the package: there without a network, and as good as their card says."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch

from metala_vision.evaluate import evaluate_checkpoint
from metala_vision.weights.source import HERE, shipped
from tests._wheel import build_wheel

TAGS = list(shipped().weights)
# Any connection ends the process with a traceback.
NO_NETWORK = """
import socket
def refuse(*arguments, **named):
    raise AssertionError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def test_the_default_is_the_first_tag():
    assert TAGS[0] == "metala_nano.tiny_imagenet"
    assert timm.list_pretrained("metala*") == sorted(TAGS)
    cfg = timm.get_pretrained_cfg("metala_nano")
    assert cfg.tag == "tiny_imagenet" and cfg.num_classes == 200
    assert timm.create_model("metala_nano").num_classes == 200
    assert timm.create_model("metala_nano", pretrained=True).head.fc.weight.shape == (200, 128)


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_is_whole_and_knows_its_classes(tag):
    model = timm.create_model(tag, pretrained=True)
    entry = shipped().weights[tag]
    assert len(model.pretrained_cfg["label_names"]) == model.num_classes == entry.num_classes
    assert set(entry.label_descriptions or ()) == set(entry.label_names)
    assert entry.size < 5e6 and entry.metrics.images >= 5000
    assert all(x.isfinite().all() for x in model.state_dict().values())


@pytest.mark.parametrize("tag", TAGS)
def test_the_card_says_what_the_manifest_says(tag):
    entry, folder = shipped().weights[tag], HERE / tag
    card = (folder / "README.md").read_text()
    metrics = entry.metrics
    for fact in (entry.sha256, entry.dataset, entry.terms, f"{entry.size:,} bytes",
                 f"{metrics.top1:.2f} %, {metrics.top5:.2f} % on {metrics.images:,} held-out "
                 "images, of this file"):  # fmt: skip
        assert fact in card
    assert re.search(r"\| commit \| [0-9a-f]{40} \|", card)
    alone = json.loads((folder / "manifest.json").read_text())["weights"][tag]
    of_all = json.loads((HERE / "manifest.json").read_text())["weights"][tag]
    assert alone == {**of_all, "file": "model.safetensors"}
    evaluations = [
        line
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if line["event"] == "eval"
    ]
    # fp16 moves an image in a thousand across the boundary, not more.
    assert abs(evaluations[-1]["top1"] - metrics.top1) <= 0.3


def test_the_classes_left_out_are_not_those_trained_on():
    every, some = (shipped().weights[tag].label_names for tag in TAGS)
    assert some == every[:150]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.slow
def test_evaluation_reproduces_the_card(tag):
    data = os.environ.get("METALA_VISION_DATA")
    labels = shipped().weights[tag].label_names
    if data is None or not (Path(data) / "val" / labels[0]).is_dir():
        pytest.skip("METALA_VISION_DATA is not Tiny-ImageNet")
    report = evaluate_checkpoint(tag, Path(data), workers=0, known_classes=True)
    metrics = shipped().weights[tag].metrics
    assert report.images == metrics.images
    assert abs(report.top1 - metrics.top1) <= 0.1 and abs(report.top5 - metrics.top5) <= 0.1


@pytest.mark.launch
def test_a_fresh_installation_without_a_network_has_them(tmp_path):
    """From the wheel, in an empty home."""
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        wheel.extractall(tmp_path / "site")
    code = NO_NETWORK + (
        "import timm, torch, metala_vision\n"
        "assert metala_vision.__file__.startswith(SITE), metala_vision.__file__\n"
        f"for tag in {['metala_nano', *TAGS]}:\n"
        "    model = timm.create_model(tag, pretrained=True).eval()\n"
        "    torch.manual_seed(0)\n"
        "    print(model(torch.randn(1, 3, 64, 64)).sum().item())\n"
    ).replace("SITE", repr(str(tmp_path / "site")))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"),
                   "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    here = []
    for tag in ("metala_nano", *TAGS):
        model = timm.create_model(tag, pretrained=True).eval()
        torch.manual_seed(0)
        here.append(model(torch.randn(1, 3, 64, 64)).sum().item())
    assert [float(line) for line in done.stdout.split()] == pytest.approx(here, rel=1e-4)
    assert not (tmp_path / "home").exists()  # nothing was written either
