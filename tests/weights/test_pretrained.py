"""timm.create_model(pretrained=True): from a folder, a file server and the Hub; what fits."""

import json

import pytest
import timm
import torch
from safetensors.torch import load, save
from torch import nn

from metala_vision.errors import WeightsError
from metala_vision.models import pretrained
from metala_vision.weights import source

from ._base import CLASSES, FILE, FILES, NAME, files_of, tensors, written
from ._server import Fault, Server, serving


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[k], state[k].float()) for k in own)


def refused(name=NAME, **kwargs):
    with pytest.raises(WeightsError) as caught:
        timm.create_model(name, pretrained=True, **kwargs)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("where", ["base", "server", "hub"])
def test_the_weights_and_what_they_say_of_themselves(where, request):
    request.getfixturevalue(where)
    model = timm.create_model(NAME, pretrained=True)
    assert same(model, load(FILES[FILE])) and model.num_classes == 3
    cfg = model.pretrained_cfg
    assert cfg["label_names"] == CLASSES and cfg["tag"] == "own" and cfg["license"] == "apache-2.0"
    inputs = timm.data.resolve_data_config(model=model)
    assert inputs["crop_pct"] == 0.8 and inputs["std"] == (0.4, 0.5, 0.6)
    assert inputs["interpolation"] == "bilinear"


@pytest.mark.parametrize("where", ["base", "server"])
def test_the_only_tag_needs_no_name(where, request):
    request.getfixturevalue(where)
    assert same(timm.create_model("hgrn_nano", pretrained=True), load(FILES[FILE]))


def test_of_several_one_must_be_named(base):
    written(files_of(NAME, "hgrn_nano.other"), base)
    assert refused("hgrn_nano").endswith("name one: hgrn_nano.own, hgrn_nano.other")
    assert timm.create_model("hgrn_nano.other", pretrained=True).pretrained_cfg["tag"] == "other"


def test_a_name_without_weights_says_where_to_get_some(base):
    line = refused("lru_tiny")
    assert line.startswith(f"no weights for lru_tiny in this package, {base}; ")
    assert "`python train_imagenet.py --model lru_tiny --data-dir DIR` trains some" in line
    assert "--config imagenet1k/metala_tiny --data-dir" in refused("metala_tiny.in1k")
    assert issubclass(WeightsError, RuntimeError)  # as timm's own is


def test_without_pretrained_nothing_is_looked_for(monkeypatch):
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, "/nowhere")
    assert timm.create_model("hgrn_nano").num_classes == 1000
    assert "METALA_VISION_WEIGHTS=/nowhere is no folder" in refused()


@pytest.mark.parametrize(
    ("value", "line"),
    [("ftp://x/y", "a folder, http:// or https:// is accepted"),
     ("http://", "a folder, http:// or https:// is accepted"),
     ("http://[::1/w", "Invalid IPv6 URL"), ("~nobody-of-this-name/w", "is no folder"),
     ("http://x:y/w", "Port could not be cast to integer value as 'y'"),
     ("http://x/y?token=1", "the address of a folder has no ? or #")],
)  # fmt: skip
def test_a_place_that_is_none(value, line, monkeypatch):
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, value)
    assert refused().startswith(f"METALA_VISION_WEIGHTS={value}") and refused().endswith(line)


def test_a_password_is_not_repeated(monkeypatch):
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, "https://me:secret@x/y")
    assert "of x holds a user or a password" in refused() and "secret" not in refused()


@pytest.mark.parametrize("form", ["{}/b\N{LATIN SMALL LETTER O WITH DIAERESIS}x/", "HTTP{}/b/"])
def test_addresses_as_people_write_them(form, monkeypatch):
    with serving(Server({})) as running:
        address = form.format(running.url if form[0] == "{" else running.url[4:])
        monkeypatch.setenv(source.WEIGHTS_VARIABLE, address)
        folder = "/b%C3%B6x" if "x" in form else "/b"
        running.files |= {f"{folder}{name}": content for name, content in FILES.items()}
        assert same(timm.create_model(NAME, pretrained=True), load(FILES[FILE]))


def test_a_namespace_that_is_none(monkeypatch):
    monkeypatch.setenv(source.HUB_VARIABLE, "../x")
    assert refused() == "METALA_VISION_HUB='../x' is no namespace of the Hub"


def test_a_folder_without_a_manifest(base):
    (base / "manifest.json").unlink()
    assert refused() == f"cannot read {base}/manifest.json: No such file or directory"


# What fits


def test_another_head_is_a_new_one(base):
    model = timm.create_model(NAME, pretrained=True, num_classes=7)
    state = load(FILES[FILE])
    own = model.state_dict()
    assert own["head.fc.weight"].shape[0] == 7 and "label_names" not in model.pretrained_cfg
    assert all(torch.equal(own[k], state[k].float()) for k in own if not k.startswith("head.fc"))
    headless = timm.create_model(NAME, pretrained=True, num_classes=0)
    assert torch.equal(headless.norm.weight, state["norm.weight"].float())


def test_grey_images_take_the_sum_of_the_colours(base):
    model = timm.create_model(NAME, pretrained=True, in_chans=1)
    colours = load(FILES[FILE])["patch_embed.proj.weight"].float()
    assert torch.allclose(model.patch_embed.proj.weight, colours.sum(1, keepdim=True))


def test_other_sizes_of_image_and_features(base):
    model = timm.create_model(NAME, pretrained=True, img_size=96).eval()
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    assert [x.shape[1] for x in features(torch.zeros(1, 3, 64, 64))] == [128] * 4


def test_larger_patches_see_what_the_patches_saw(base):
    """The pseudo-inverse resize of FlexiViT, arXiv 2212.08013: an enlarged patch has its token."""
    small = timm.create_model(NAME, pretrained=True).eval()
    large = timm.create_model(NAME, pretrained=True, patch_size=16).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8)
    enlarged = nn.functional.interpolate(patches, size=16, mode="bicubic", antialias=True)
    enlarged = enlarged.reshape(2, 64, 3 * 256).transpose(1, 2)
    enlarged = nn.functional.fold(enlarged, (128, 128), 16, stride=16)
    tokens, expected = large.patch_embed(enlarged), small.patch_embed(images)
    # Two fp32 contractions of 768 terms, and the inverse of a matrix of condition number below 10.
    assert (tokens - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_users_own_weights_are_left_to_timm(base, tmp_path):
    other = tensors(seed=9)
    path = tmp_path / "mine.safetensors"
    path.write_bytes(save(other))
    overlay = {"file": str(path), "num_classes": 3}
    model = timm.create_model("hgrn_nano", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.norm.weight, other["norm.weight"].float())
    path.unlink()
    with pytest.raises(FileNotFoundError):  # timm's
        timm.create_model("hgrn_nano", pretrained=True, pretrained_cfg_overlay=overlay)


def test_a_source_of_the_users_is_not_overruled_by_what_ships(monkeypatch, tmp_path):
    """timm takes a file before an address, and the default tag has one."""
    from timm.models import _builder

    asked = []
    monkeypatch.setattr(
        _builder, "load_state_dict_from_hf", lambda name, **_: asked.append(name) or shipped
    )
    monkeypatch.setattr(
        _builder, "load_state_dict_from_url", lambda url, **_: asked.append(url) or shipped
    )
    shipped = timm.create_model("metala_nano", pretrained=True).state_dict()
    for source_ in ({"hf_hub_id": "me/mine"}, {"url": "https://mine/x.pth"}):
        model = timm.create_model("metala_nano", pretrained=True, pretrained_cfg_overlay=source_)
        assert "file" not in model.pretrained_cfg and "tag" not in model.pretrained_cfg
    assert asked == ["me/mine", "https://mine/x.pth"]


def test_the_configuration_of_a_tag_is_checked_as_the_tag_is(monkeypatch, tmp_path):
    cfg = timm.get_pretrained_cfg("metala_nano.tiny_imagenet_150")
    for given in (cfg, cfg.to_dict()):
        model = timm.create_model("metala_nano", pretrained=True, pretrained_cfg=given)
        assert model.pretrained_cfg["tag"] == "tiny_imagenet_150" and model.num_classes == 150
    (tmp_path / "nothing").mkdir()
    monkeypatch.setattr(source, "HERE", tmp_path / "nothing")
    with pytest.raises(WeightsError, match=r"no weights for metala_nano\.tiny_imagenet_150"):
        timm.create_model("metala_nano", pretrained=True, pretrained_cfg=cfg)


def test_a_model_from_scratch_is_not_of_the_weights(tmp_path):
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("metala_nano", num_classes=5), tmp_path, safe_serialization=True)
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert cfg["license"] == "apache-2.0" and "tag" not in cfg


def test_patches_are_resampled_from_every_source(base, tmp_path):
    from timm.models import save_for_hf

    expected = timm.create_model(NAME, pretrained=True, patch_size=16).patch_embed.proj.weight
    path = base / FILE[1:]
    save_for_hf(timm.create_model(NAME, pretrained=True), tmp_path / "s", safe_serialization=True)
    for name, more in (
        (f"local-dir:{tmp_path / 's'}", {}),
        ("hgrn_nano", {"pretrained_cfg_overlay": {"file": str(path), "num_classes": 3}}),
        ("hgrn_nano", {"pretrained_cfg_overlay": {"file": str(path)}, "num_classes": 3}),
    ):
        model = timm.create_model(name, pretrained=True, patch_size=16, **more)
        assert torch.allclose(model.patch_embed.proj.weight, expected, atol=1e-6)


def test_not_strict_takes_what_there_is():
    plain = timm.create_model("metala_nano", pretrained=True).state_dict()
    model = timm.create_model("metala_nano", pretrained=True, pretrained_strict=False, depth=10)
    state = model.state_dict()
    assert all(torch.equal(state[name], x) for name, x in plain.items())
    assert "do not fit" in refused("metala_nano", pretrained_strict=False, embed_dim=64)


def test_what_is_saved_afterwards_names_no_place(base, tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model(NAME, pretrained=True)
    save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    assert str(base) not in (tmp_path / "saved" / "config.json").read_text()
    again = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True)
    assert same(again, load(FILES[FILE]))


# What does not fit


def changed(state, base):
    """The base with other tensors, their manifest right."""
    written(files_of(NAME, content=save(state, {"format": "pt"})), base)


@pytest.mark.parametrize("classes", [None, 5], ids=["same head", "another head"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s.pop("norm.weight"), "lack norm.weight of this model"),
        (lambda s: s.update(more=torch.zeros(1)), "hold more, which this model lacks"),
        (lambda s: s.update({"norm.weight": s["norm.weight"][:64]}),
         r"do not fit: norm.weight is (64,), not (128,)"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}),
         "do not fit: patch_embed.proj.weight is (64, 3, 8, 8)"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(128, 4, 8, 8)}),
         "has 4 channels, the manifest says 3"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.zeros(128, 192)}),
         "has 192 channels, the manifest says 3"),
        (lambda s: s.update({"norm.weight": torch.zeros(128, dtype=torch.int64)}),
         "norm.weight is of type I64; F16, BF16, F32, F64 are accepted"),
    ],
    ids=["missing", "unknown", "shape", "width", "channels", "flat", "integers"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(change, line, classes, base):
    state = tensors()
    change(state)
    changed(state, base)
    kwargs = {} if classes is None else {"num_classes": classes}
    assert line in refused(**kwargs)


def test_a_head_of_another_width_than_told(base):
    state = tensors()
    state["head.fc.weight"], state["head.fc.bias"] = torch.zeros(4, 128), torch.zeros(4)
    changed(state, base)
    assert "has 4 classes, the manifest says 3" in refused()
    state["head.fc.weight"] = torch.zeros(3, 128)
    changed(state, base)
    assert "do not fit: head.fc.bias is (4,), not (3,)" in refused()


@pytest.mark.parametrize("argument", [{"depth": 2}, {"conv": "none"}, {"embed_dim": 64}], ids=str)
def test_another_architecture_is_refused_with_any_head(argument, base):
    for classes in ({}, {"num_classes": 5}):
        assert f"the weights {NAME} " in refused(**argument, **classes)


# What is not what it says


def test_another_file_is_refused_from_a_folder(base):
    path = base / FILE[1:]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "the manifest says" in refused() and path.exists()  # it is the user's


def test_a_link_out_of_the_folder_is_refused(base, tmp_path):
    path = base / FILE[1:]
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    assert refused() == f"{path} leads out of {base}"


def test_a_mirror_cannot_change_what_this_package_knows(server, monkeypatch):
    known = source.parse_manifest(FILES["/manifest.json"], "here")
    monkeypatch.setattr(source, "shipped", lambda: known)
    assert same(timm.create_model(NAME, pretrained=True), load(FILES[FILE]))
    others = files_of(NAME, seed=5)
    server.files |= {f"/below{name}": content for name, content in others.items()}
    source.cached_file(NAME, known.weights[NAME]).unlink()
    assert "was removed" in refused()


def test_what_ships_needs_no_server(monkeypatch, tmp_path):
    known = source.parse_manifest(FILES["/manifest.json"], "here")
    monkeypatch.setattr(source, "shipped", lambda: known)
    monkeypatch.setattr(source, "HERE", written(FILES, tmp_path / "package"))
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, "http://127.0.0.1:1/nobody")
    assert same(timm.create_model(NAME, pretrained=True), load(FILES[FILE]))
    (tmp_path / "package" / FILE[1:]).write_bytes(b"damaged")
    assert "has 7 bytes, the manifest says" in refused()


# Without a connection


def test_what_was_downloaded_is_there_without_a_connection(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"HF_HUB_OFFLINE is set, and {server.url}/below/manifest.json was never" in refused()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
    assert len(list((tmp_path / "mine").glob("*.safetensors"))) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(server.requests)
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
    assert len(server.requests) == count
    next((tmp_path / "mine").glob("*.safetensors")).unlink()
    line = refused(cache_dir=tmp_path / "mine")
    assert f"{server.url}/below{FILE} is not in {tmp_path / 'mine'}" in line
    monkeypatch.delenv("HF_HUB_OFFLINE")
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")
    server.fault = lambda path, number: Fault(status=503)  # a server that is down for now
    timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / "mine")


def test_the_cache_is_below_torch_home(server, tmp_path):
    timm.create_model(NAME, pretrained=True)
    names = sorted(p.name for p in (tmp_path / "torch" / "hub" / "metala_vision").iterdir())
    sha256 = json.loads(FILES["/manifest.json"])["weights"][NAME]["sha256"]
    assert f"{NAME}-{sha256[:16]}.safetensors" in names
    assert not any(name.endswith(".part") for name in names)


def test_a_dead_server_does_not_hide_the_hub(hub, monkeypatch):
    monkeypatch.setenv(source.WEIGHTS_VARIABLE, "http://127.0.0.1:1")
    there = dict(hub.files)
    hub.files.clear()
    assert "cannot download http://127.0.0.1:1/manifest.json: " in refused()
    hub.files |= there
    assert same(timm.create_model(NAME, pretrained=True), load(FILES[FILE]))


@pytest.mark.parametrize(
    ("changes", "line"),
    [({"num_classes": 10**6, "label_names": None}, "has 3 classes, the manifest says 1000000"),
     ({"num_classes": 10**12, "label_names": None}, "num_classes: Input should be less than or")],
    ids=["a million", "more"],
)  # fmt: skip
def test_a_manifest_cannot_ask_for_memory(changes, line, base):
    content = FILES[FILE]
    text = (base / "manifest.json").read_text()
    entry = json.loads(text)["weights"][NAME] | changes
    (base / "manifest.json").write_text(json.dumps({"format": 1, "weights": {NAME: entry}}))
    assert line in refused() and content


def test_a_server_whose_manifest_is_hostile(server):
    text = FILES["/manifest.json"].replace(FILE[1:].encode(), b"../../etc/x.safetensors")
    server.files["/below/manifest.json"] = text
    assert "is not a plain path inside the folder" in refused()


def test_the_message_of_a_variant_is_of_its_own_configuration():
    for name in ("metala_small", "hgrn2_tiny"):
        assert (pretrained.PACKAGE / f"configs/imagenet1k/{name}.yaml").is_file()
        assert f"--config imagenet1k/{name} " in refused(name)
