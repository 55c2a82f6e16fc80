"""timm's contract beyond what its own suite asks of every model, over all models registered here.

timm's suite itself runs by `python -m tests.timm_suite`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.models import get_model_input_config, save_for_hf
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

import metala_vision
from metala_vision.layers.retnet import retention_log_decay
from metala_vision.models import family
from tests._numerics import SAME, relative_rms

ROOT = Path(__file__).parents[2]
MODELS = metala_vision.list_models()
NANO = metala_vision.list_models("*_nano")
DEPTH = 3


def shallow(name="metala_nano", **kwargs):
    """A registered model in all but its depth."""
    return timm.create_model(name, depth=DEPTH, img_size=64, num_classes=5, **kwargs).eval()


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unused(model):
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_intermediates_are_what_the_blocks_give(name):
    model, x = shallow(name), images(2, 3, 64, 32)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    final, intermediates = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    for ours, block in zip(intermediates, seen[:DEPTH], strict=True):
        assert torch.equal(ours, block.permute(0, 3, 1, 2))
    by_getter = timm.create_model(
        name, depth=DEPTH, img_size=64, features_only=True, out_indices=(0, 2)
    ).eval()
    by_getter.model.load_state_dict(model.state_dict(), strict=False)
    for ours, i in zip(by_getter(x), (0, 2), strict=True):
        assert torch.equal(ours, intermediates[i])
    assert by_getter.feature_info.channels() == [model.num_features] * 2


@pytest.mark.parametrize("name", ["hgrn_nano", "hgrn2_nano"])
def test_every_layer_gets_its_own_lower_bound(name):
    model, x = shallow(name), images(2, 3, 64, 64)
    with torch.no_grad():
        model.lower_bounds.weight.normal_()
    seen = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(x).square().sum().backward()
    model.forward_intermediates(x)
    for i, bound in enumerate(seen):
        assert torch.equal(bound, model.lower_bounds()[i % DEPTH])
    assert len(seen) == 2 * DEPTH and model.lower_bounds.weight.grad.abs().max() > 0
    assert not torch.equal(seen[1], seen[2])


def test_every_layer_gets_its_own_transnormer_decay():
    model = shallow("retnet_nano", decay="transnormer")
    for i, block in enumerate(model.blocks):
        decays = retention_log_decay("transnormer", 2, i, DEPTH)
        assert block.mixer.log_decays == decays
    assert len({block.mixer.log_decays[0] for block in model.blocks}) == DEPTH


@torch.no_grad()
def test_intermediates_by_option():
    model, x = shallow(), images(1, 3, 64, 64)
    _, plain = model.forward_intermediates(x, output_fmt="NHWC")
    normed = model.forward_intermediates(
        x, indices=[0, -1], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    assert torch.equal(normed[0], model.norm(plain[0]))
    assert torch.equal(normed[1], model.forward_features(x))
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2  # the last
    model.blocks[2].forward = None  # stopping early does not come here
    final, early = model.forward_intermediates(x, indices=[1], stop_early=True, output_fmt="NHWC")
    assert torch.equal(early[0], plain[1])
    assert torch.equal(final, plain[1])  # no final norm either
    with pytest.raises(ValueError, match="output_fmt=NLC is unknown; accepted: NCHW, NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(AssertionError, match="3"):
        model.forward_intermediates(x, indices=[3])


@pytest.mark.parametrize("prune_norm", [False, True])
@pytest.mark.parametrize("i", range(DEPTH))
@pytest.mark.parametrize("name", NANO)
def test_a_pruned_model_gives_the_same_and_has_nothing_to_spare(name, i, prune_norm):
    model, x = shallow(name, global_pool="catavgmax"), images(2, 3, 64, 64)
    tap = model.forward_intermediates(x, indices=[i], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([i], prune_norm=prune_norm) == [i]
    assert len(model.blocks) == len(model.feature_info) == i + 1 and model.num_classes == 0
    assert model.head_hidden_size == model.num_features == 128
    features = model.forward_features(x)
    assert torch.equal(features if prune_norm else model.norm(tap.permute(0, 2, 3, 1)),
                       tap.permute(0, 2, 3, 1) if prune_norm else features)  # fmt: skip
    features.sum().backward()
    assert not unused(model)


def test_a_pruned_model_can_keep_its_head_and_get_another():
    model, x = shallow(), images(1, 3, 64, 64)
    expected = model(x)
    model.prune_intermediate_layers([DEPTH - 1], prune_head=False)
    assert torch.equal(model(x), expected)
    model.prune_intermediate_layers([0])
    model.reset_classifier(7, "avg")
    assert model(x).shape == (1, 7) and model.head_hidden_size == 128


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
@pytest.mark.parametrize("pos_embed", ["none", "sincos2d"])
@pytest.mark.parametrize("name", NANO)
def test_every_feature_class_gives_the_same_features(name, feature_cls, pos_embed):
    arguments = {"depth": 4, "pos_embed": pos_embed, "features_only": True}
    torch.manual_seed(0)
    getter = timm.create_model(name, **arguments).eval()
    torch.manual_seed(0)
    other = timm.create_model(name, feature_cls=feature_cls, **arguments).eval()
    x = images(1, 3, 64, 64)
    if name.startswith("hgrn") and feature_cls != "fx":
        with pytest.raises(ValueError, match="'list', 'dict' and 'hook' do not, 'getter'"):
            other(x)
        return
    found = other(x)
    found = list(found.values()) if isinstance(found, dict) else found
    for ours, theirs in zip(found, getter(x), strict=True):
        assert torch.equal(ours.permute(0, 3, 1, 2), theirs)


@pytest.mark.parametrize("name", NANO)
def test_features_with_checkpointing_give_the_same_gradients(name):
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = timm.create_model(name, depth=DEPTH, features_only=True, out_indices=(0, 2))
        model.model.set_grad_checkpointing(enable)
        sum(f.square().mean() for f in model(images(1, 3, 64, 64))).backward()
        assert not unused(model)
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", NANO)
def test_the_feature_model_scripts(name):
    model = timm.create_model(name, depth=DEPTH, features_only=True, out_indices=(0, 2))
    x = images(1, 3, 64, 64)
    for ours, eager in zip(torch.jit.script(model.eval())(x), model(x), strict=True):
        assert relative_rms(ours, eager) <= SAME


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_an_image_alone_is_the_image_in_a_batch(name):
    model, x = shallow(name), images(3, 3, 64, 64)
    # the libraries' products differ by the batch, some float32 roundings a block
    assert relative_rms(model(x[1:2]), model(x)[1:2]) <= 1e-5


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w}])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_a_checkpoint_is_unwrapped_and_otherwise_left_alone(wrap, prefix):
    model = timm.create_model("metala_nano", num_classes=0)
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    cleaned = family.checkpoint_filter_fn(wrap(weights), model)
    assert {n: v.data_ptr() for n, v in cleaned.items()} == {
        n: v.data_ptr() for n, v in model.state_dict().items()
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.reset_classifier(3),
        lambda m: m.reset_classifier(0, "max"),
        lambda m: None,
    ],
    ids=["reset", "headless", "as built"],
)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"in_chans": 1, "img_size": 96, "drop_path_rate": 0.2},
        {"scans": ("raster", "hilbert"), "pos_embed": "rope2d", "key": "projected"},
    ],
    ids=["plain", "channels-size", "options"],
)
def test_a_saved_model_comes_back_bit_by_bit(arguments, change, tmp_path):
    model = timm.create_model("metala_nano", depth=2, num_classes=5, **arguments).eval()
    change(model)
    save_for_hf(model, tmp_path, model_args={"depth": 2, **arguments}, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "metala_nano"
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(1, arguments.get("in_chans", 3), 64, 64)
    assert torch.equal(again(x), model(x))


def test_traits_tell_the_input():
    model = timm.create_model("metala_nano", depth=1, in_chans=1, img_size=96)
    assert get_model_input_config(model) == {
        "input_size": (1, 96, 96),
        "fixed_input_size": False,
        "first_conv": "patch_embed.proj",
    }


@pytest.mark.parametrize("name", NANO)
def test_layer_decay_falls_from_head_to_patches(name):
    model = timm.create_model(name, depth=DEPTH)
    scales = {}
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    for group in groups:
        for p in group["params"]:
            scales[names[id(p)]] = group["lr_scale"]
    assert len(scales) == len(list(model.parameters()))
    assert scales["head.fc.weight"] == 1.0
    order = [f"blocks.{i}.mlp.fc1.weight" for i in range(DEPTH)]
    ladder = [scales[name] for name in ("patch_embed.proj.weight", *order)]
    assert ladder == sorted(ladder) and len(set(ladder)) == DEPTH + 1
    assert ladder[-1] < 1.0


def test_features_train_a_segmentation_head():
    """Digits on a canvas, a class for every pixel: four levels through a pyramid, ten steps."""
    torch.manual_seed(0)
    digits = load_digits()
    small = torch.tensor(digits.images[:8], dtype=torch.float32) / 16
    picture = nn.functional.interpolate(small[:, None], size=96, mode="bilinear")
    target = torch.where(picture[:, 0] > 0.5, torch.tensor(digits.target[:8])[:, None, None] + 1, 0)
    x = (picture.expand(-1, 3, -1, -1) - 0.5) / 0.25

    backbone = timm.create_model("metala_tiny", features_only=True)
    channels = backbone.feature_info.channels()
    pyramid, classify = FeaturePyramidNetwork(channels, 32), nn.Conv2d(32 * len(channels), 11, 1)
    parameters = [*backbone.parameters(), *pyramid.parameters(), *classify.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    losses = []
    for _ in range(10):
        levels = dict(enumerate(backbone(x)))
        logits = classify(
            torch.cat(list(pyramid({str(k): v for k, v in levels.items()}).values()), 1)
        )
        logits = nn.functional.interpolate(logits, size=96, mode="bilinear")
        loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(levels) == 4 and not unused(backbone)
    for level in pyramid.inner_blocks:
        assert level[0].weight.grad.abs().max() > 0
    assert losses[-1] < 0.5 * losses[0]


def test_timm_knows_no_name_of_ours_without_us():
    names = metala_vision.list_models()
    code = f"import timm; print([n for n in {names} if timm.is_model(n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert metala_vision.create_model is timm.create_model


def test_no_model_module_shares_a_file_name_with_timms():
    theirs = {path.stem for path in Path(timm.__file__).parent.glob("models/*.py")}
    ours = {path.stem for path in (ROOT / "metala_vision/models").glob("*.py")} - {"__init__"}
    assert ours and not ours & theirs


@pytest.mark.parametrize("unpacked", [False, True])
def test_torch_hub_finds_the_models(unpacked, tmp_path):
    """From a checkout, and from an archive without links, as torch.hub unpacks it."""
    tree = ROOT
    if unpacked:
        tree = tmp_path / "unpacked"
        ignore = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "tests")
        shutil.copytree(ROOT, tree, symlinks=True, ignore=ignore)
        for name in ("kernels", "configs"):
            link = tree / "metala_vision" / name
            target = link.readlink()
            link.unlink()
            link.write_text(str(target))
    code = (
        f"import torch; print(torch.hub.load({str(tree)!r}, 'metala_nano', source='local', "
        f"num_classes=4, depth=1)(torch.zeros(1, 3, 64, 64)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout.strip() == "torch.Size([1, 4])", done.stderr[-2000:]
