"""timm's surface on every model that this package registers."""

import re
from pathlib import Path

import pytest
import timm
import torch

from metala_vision import list_models
from metala_vision.models import FAMILIES, Backbone
from tests._numerics import SAME, relative_rms

MODELS = list_models()
SIZES = ("nano", "tiny", "small", "base")
# trainable parameters at 1000 classes; the two `_paper` counts reproduce the paper's 6.1M and
# 23.7M and are those of arXiv 2411.10741's equations with affine norms
PARAMETERS = {
    "metala_nano": 1_872_744,
    "metala_tiny": 6_125_224,
    "metala_small": 23_751_016,
    "metala_base": 93_507_304,
    "metala_tiny_paper": 6_113_704,
    "metala_small_paper": 23_727_976,
    "metala_nano_causal": 1_867_624,
    "metala_nano_cross": 1_872_744,
    "metala_nano_hilbert": 1_872_744,
    "metala_nano_snake": 1_872_744,
    "metala_tiny_causal": 6_113_704,
    "metala_tiny_cross": 6_125_224,
    "metala_tiny_hilbert": 6_125_224,
    "metala_tiny_snake": 6_125_224,
    "attention_nano": 1_871_208,
    "attention_tiny": 6_121_768,
    "attention_small": 23_744_104,
    "attention_base": 93_493_480,
    "eva_attention_nano": 1_877_112,
    "eva_attention_tiny": 6_136_300,
    "eva_attention_small": 23_767_024,
    "eva_attention_base": 93_547_000,
    "gla_nano": 1_897_320,
    "gla_tiny": 6_180_520,
    "gla_small": 23_861_608,
    "gla_base": 93_728_488,
    "hgrn_nano": 1_883_496,
    "hgrn_tiny": 6_149_416,
    "hgrn_small": 23_799_400,
    "hgrn_base": 93_604_072,
    "hgrn2_nano": 1_877_352,
    "hgrn2_tiny": 6_135_592,
    "hgrn2_small": 23_771_752,
    "hgrn2_base": 93_548_776,
    "linear_attention_nano": 1_871_208,
    "linear_attention_tiny": 6_121_768,
    "linear_attention_small": 23_744_104,
    "linear_attention_base": 93_493_480,
    "lru_nano": 1_876_328,
    "lru_tiny": 6_130_984,
    "lru_small": 23_762_536,
    "lru_base": 93_530_344,
    "mamba_nano": 1_910_120,
    "mamba_tiny": 6_211_624,
    "mamba_small": 23_923_816,
    "mamba_base": 93_852_904,
    "regla_nano": 1_874_280,
    "regla_tiny": 6_126_376,
    "regla_small": 23_753_320,
    "regla_base": 93_511_912,
    "retnet_nano": 1_870_184,
    "retnet_tiny": 6_121_768,
    "retnet_small": 23_744_104,
    "retnet_base": 93_493_480,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


NANO = list_models("*_nano")


def small(name="metala_nano", **kwargs):
    """A nano model, shrunk to run in milliseconds."""
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, **kwargs}
    return timm.create_model(name, **arguments)


def test_every_model_is_pinned():
    assert sorted(MODELS) == sorted(PARAMETERS)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta", num_classes=1000)
    assert count(model) == PARAMETERS[name]
    family, _, size = name.rpartition("_")
    if family in FAMILIES:
        assert size in SIZES and abs(count(model) / PARAMETERS[f"metala_{size}"] - 1) <= 0.03
    paper = {"metala_tiny": 6_113_704, "metala_small": 23_727_976}
    if name in paper:
        assert abs(count(model) / paper[name] - 1) <= 0.03


@pytest.mark.parametrize("options", [{"shared_decay": False}, {"key": "projected"}], ids=str)
def test_the_channel_mixer_pays_for_a_further_projection(options):
    model = timm.create_model("metala_tiny", device="meta", **options)
    assert (
        abs(count(model) - PARAMETERS["metala_tiny"]) < 12 * 192 * 3
    )  # the hidden width's rounding


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("pos_embed", ["none", "sincos2d", "rope2d"])
def test_position_information_is_for_any_grid_and_not_in_the_checkpoint(name, pos_embed):
    if name.startswith(("hgrn_", "lru_", "mamba_")) and pos_embed == "rope2d":
        with pytest.raises(ValueError, match=r"pos_embed='rope2d' turns queries; .* has none"):
            small(name, pos_embed=pos_embed)
        return
    model = small(name, pos_embed=pos_embed, conv="none").eval()
    assert set(model.state_dict()) == set(small(name, conv="none").state_dict())
    for size in ((64, 64), (32, 96)):
        assert torch.isfinite(model(torch.randn(1, 3, *size))).all()
    plain = small(name, conv="none", pos_embed="none").eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(plain(x), model(x)) == (pos_embed == "none")


def test_the_papers_count_term_by_term():
    """4 d^2 projections, 9 d^2 GLU, conv 4 d, gate bias d, w_aug d / 2, norms 4 d a block."""
    for name, d in (("metala_tiny_paper", 192), ("metala_small_paper", 384)):
        block = 13 * d * d + 4 * d + d + d // 2 + 4 * d
        stem, norm, head = 3 * 16 * 16 * d + d, 2 * d, 1000 * d + 1000
        assert 12 * block + stem + norm + head == PARAMETERS[name]


def test_the_readme_tells_every_count():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    told = {int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*,\d{3}", readme)}
    families = {f"{family}_{size}" for family in FAMILIES for size in SIZES}
    assert {PARAMETERS[name] for name in families} <= told
    for family in FAMILIES[1:]:
        row = " | ".join(f"{PARAMETERS[f'{family}_{size}']:,}" for size in SIZES)
        assert f"| `{family}` | {row} |" in readme


def test_every_family_has_every_size():
    assert {f"{family}_{size}" for family in FAMILIES for size in SIZES} <= set(MODELS)


BLIND = [
    (family, {"pos_embed": "none", "conv": "none"}) for family in ("attention", "linear_attention")
]
SEEING = [(name.rpartition("_")[0], {}) for name in list_models("*_nano")]


@torch.no_grad()
@pytest.mark.parametrize(("family", "options"), [*SEEING, *BLIND])
def test_which_models_see_the_order_of_the_patches(family, options):
    """The same patches shuffled: a model that is blind to order gives the same logits."""
    torch.manual_seed(0)
    model = timm.create_model(f"{family}_nano", depth=2, num_classes=5, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    patches = x.unflatten(2, (8, 8)).unflatten(4, (8, 8)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    shuffled = patches[:, torch.randperm(64)].unflatten(1, (8, 8)).permute(0, 3, 1, 4, 2, 5)
    change = relative_rms(model(shuffled.flatten(4, 5).flatten(2, 3)), model(x))
    assert (change <= 10 * SAME) == bool(options), change
    assert options or change > 1e-3, change


@pytest.mark.parametrize("name", [m for m in MODELS if "base" not in m])
def test_forward_backward_at_the_native_grid(name):
    cfg = timm.get_pretrained_cfg(name)
    size = min(cfg.input_size[1], 64)
    model = timm.create_model(name, num_classes=42)
    x = torch.randn(2, 3, size, size)
    features = model.forward_features(x)
    patch = model.patch_embed.patch_size[0]
    assert features.shape == (2, size // patch, size // patch, model.num_features)
    assert cfg.pool_size == (cfg.input_size[1] // patch,) * 2
    logits = model(x)
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert torch.isfinite(logits).all()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_head_surface():
    model = small().eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    assert model.forward_head(features, pre_logits=True).shape == (2, 32)
    assert torch.allclose(
        model.forward_head(features, pre_logits=True), features.mean((1, 2)), atol=1e-6
    )
    assert model.get_classifier().out_features == 5
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    model.reset_classifier(0)
    assert model(x).shape == (2, 32)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(3, "catavgmax")
    assert model(x).shape == (2, 3) and model.head_hidden_size == 64
    assert small(num_classes=0)(x).shape == (2, 32)
    assert small(num_classes=0, global_pool="")(x).shape == features.shape


def test_reset_classifier_keeps_device_and_dtype():
    model = small().to(torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(3)
    assert model.head.fc.weight.dtype == torch.float64


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (8, 8)], ids=str)
def test_any_multiple_of_the_patch(name, size):
    x = torch.randn(1, 3, *size)
    assert small(name).forward_features(x).shape == (1, size[0] // 8, size[1] // 8, 32)


def test_image_and_patch_size_and_channels():
    model = small(img_size=(48, 32), patch_size=4, in_chans=1)
    assert model.patch_embed.grid_size == (12, 8)
    assert model.forward_features(torch.randn(1, 1, 48, 32)).shape == (1, 12, 8, 32)
    assert model.feature_info[-1] == {"num_chs": 32, "reduction": 4, "module": "blocks.1"}


@pytest.mark.parametrize("name", NANO)
def test_device_and_dtype_reach_every_tensor(name):
    model = timm.create_model(name.replace("nano", "tiny"), device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} == {("meta", torch.bfloat16)}
    with torch.device("meta"):
        x = torch.randn(1, 3, 224, 224, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NANO)
def test_bfloat16_model_runs(name):
    model = small(name).to(torch.bfloat16)
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NANO)
def test_gradient_checkpointing_changes_memory_only(name):
    model = small(name)
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(0)  # EVA draws noise in training
    model(x).sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_grad_checkpointing()
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    model(x).sum().backward()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for p, expected in zip(model.parameters(), plain, strict=True):
        torch.testing.assert_close(p.grad, expected)


def test_drop_rates_act_in_training_only():
    model = small(drop_rate=0.5, proj_drop_rate=0.5, drop_path_rate=0.5)
    x = torch.randn(4, 3, 64, 64)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert [b.drop_path1.drop_prob for b in model.blocks if hasattr(b.drop_path1, "drop_prob")] == [
        0.5
    ]


@pytest.mark.parametrize("name", NANO)
def test_weight_decay_and_layer_groups_name_real_parameters(name):
    model = small(name)
    names = {name for name, _ in model.named_parameters()}
    of_a_mixer = {
        "metala": ("w_aug",), "hgrn": ("theta",), "eva_attention": ("relative_bias",),
        "lru": ("nu", "theta", "log_gain", "in_proj.weight"),
        "mamba": tuple(f"ways.{i}.{name}" for i in (0, 1) for name in ("A_log", "skip")),
    }.get(name.removesuffix("_nano"), ())  # fmt: skip
    own = {f"blocks.{i}.mixer.{parameter}" for i in range(2) for parameter in of_a_mixer}
    own |= {"lower_bounds.weight"} if name.startswith("hgrn") else set()
    assert model.no_weight_decay() == own
    assert model.no_weight_decay() <= names
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=False))
    assert {n for group in groups.values() for n in group} == names
    assert len(groups) == 4  # stem, two blocks, norm with head


@pytest.mark.parametrize("name", NANO)
def test_deferred_initialisation_fills_every_tensor(name):
    model = small(name, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weights_start_with_a_deviation_of_0_02():
    """Then the logits of the gate are near 0 and alpha near 0.5^(1/16) = 0.958."""
    model = small()
    for weight in (model.blocks[0].mixer.in_proj.weight, model.head.fc.weight):
        assert 0.015 < weight.std() < 0.025
    assert not model.head.fc.bias.any() and not model.blocks[1].mixer.w_aug.any()


def test_unknown_arguments_are_type_errors():
    with pytest.raises(TypeError, match="flavour"):
        timm.create_model("metala_nano", flavour="sweet")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"img_size": 4}, "img_size=4 must be a multiple of patch_size=8"),
        ({"img_size": 60}, "img_size=60 must be a multiple of patch_size=8"),
        ({"patch_size": 0}, "img_size=64 must be a multiple of patch_size=0"),
        ({"in_chans": 0}, "got in_chans=0"),
        ({"depth": 0}, "depth=0"),
        ({"global_pool": "median"}, "global_pool='median' is unknown; accepted: 'avg', 'max'"),
        ({"num_heads": 3}, r"dim=32 is not divisible by 2 \* num_heads=6"),
        ({"conv": "5x5"}, "conv='5x5' is unknown"),
        ({"direction": "sideways"}, "direction='sideways' is unknown"),
        (
            {"pos_embed": "learned"},
            "pos_embed='learned' is unknown; accepted: none, sincos2d, rope2d",
        ),
        ({"pos_embed": "sincos2d", "embed_dim": 36, "num_heads": 1}, None),
        ({"pos_embed": "sincos2d", "embed_dim": 34, "num_heads": 1}, "divisible by 4, got 34"),
    ],
)
def test_unfit_arguments_are_named(kwargs, message):
    if message is None:  # the neighbouring value that is accepted
        small(**kwargs)
        return
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("argument", ["num_heads", "embed_dim"])
def test_every_family_names_a_size_of_zero(name, argument):
    with pytest.raises(ValueError, match=f"{argument}(=| must be a whole number >= 1, got )0"):
        timm.create_model(name, **{argument: 0})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 64, 64), r"expected images \[B, 3, height, width\], got \[1, 1, 64, 64\]"),
        ((3, 64, 64), r"expected images \[B, 3, height, width\], got \[3, 64, 64\]"),
        ((1, 3, 4, 64), "images of 4x64 are smaller than a patch of 8x8"),
        ((1, 3, 64, 60), "multiples of the patch 8x8, got 64x60"),
    ],
)
def test_unfit_images_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.zeros(shape))


def test_reset_classifier_refuses_an_unknown_pool():
    model = small()
    with pytest.raises(ValueError, match="global_pool='median'"):
        model.reset_classifier(3, "median")
    with pytest.raises(ValueError, match="num_classes must be >= 0, got -1"):
        model.reset_classifier(-1)
    assert isinstance(model, Backbone) and model.num_classes == 5
