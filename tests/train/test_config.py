"""One schema for files and flags; unknown keys name the nearest."""

from pathlib import Path

import pytest
import timm
import yaml

from metala_vision.cli import parse_config
from metala_vision.config import SECTIONS, Config
from metala_vision.config_file import load_config, shipped_configs
from metala_vision.errors import UserError
from metala_vision.layers import TokenConv


def test_no_key_stands_in_two_sections():
    keys = [key for section in SECTIONS.values() for key in section.model_fields]
    assert len(keys) == len(set(keys))


def test_every_key_has_a_description():
    for section in SECTIONS.values():
        assert all(field.description for field in section.model_fields.values())


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_configuration_builds_and_names_every_section(name):
    assert load_config(name).model_fields_set == set(SECTIONS)


def test_shipped_configurations():
    names = {
        "quickstart", "tiny_imagenet/metala_nano", "imagenet1k/metala_tiny_paper",
        "imagenet1k/metala_small_paper", "finetune/cifar10", "finetune/cifar100",
        "finetune/flowers102", "finetune/oxford_pets",
    }  # fmt: skip
    assert names <= set(shipped_configs())


MIXERS = {
    "metala", "attention", "eva_attention", "gla", "hgrn", "hgrn2", "retnet", "linear_attention",
    "lru", "mamba", "regla",
}  # fmt: skip


def test_every_mixer_stands_in_matched_and_in_published():
    shipped = shipped_configs()
    for folder in ("matched", "published"):
        assert {f"{folder}/{mixer}_tiny" for mixer in MIXERS} <= set(shipped)


def test_imagenet_configurations_are_one_recipe_and_the_papers():
    families = ("metala", "deit", "attention", "mamba", "gla", "hgrn", "hgrn2")
    names = {f"imagenet1k/{family}_{size}" for family in families for size in ("tiny", "small")}
    shipped = {name for name in shipped_configs() if name.startswith("imagenet1k/")}
    papers = {f"imagenet1k/metala_{size}_paper" for size in ("tiny", "small")}
    assert shipped == names | papers
    one = load_config("matched/metala_tiny")
    for name in names:
        config = load_config(name)
        family = name.split("/")[1].rpartition("_")[0]
        assert config.model.model.startswith(f"{family}_")
        assert (config.data, config.optim, config.run) == (one.data, one.optim, one.run), name
    assert one.data.mixup and one.data.cutmix and one.data.aug_repeats == 3 and one.optim.model_ema


def test_matched_configurations_differ_in_the_model_alone():
    matched = [load_config(name) for name in shipped_configs() if name.startswith("matched/")]
    assert len(matched) == len(MIXERS)
    for config in matched:
        for section in ("data", "optim", "run"):
            assert getattr(config, section) == getattr(matched[0], section)
        name = config.model.model
        other = matched[0].model.model_copy(update={"model": name})
        assert config.model == other
        kwargs = config.model.model_kwargs
        mixer = timm.create_model(name, device="meta", **kwargs).blocks[0].mixer
        kinds = {x.kind for x in mixer.modules() if isinstance(x, TokenConv)}
        assert (kinds, mixer.direction) == ({"depthwise2d"}, "bidirectional")


def test_published_language_models_are_causal_without_a_convolution():
    for name in ("gla", "lru", "regla", "retnet", "transnormer"):
        model = load_config(f"published/{name}_tiny").model
        mixer = timm.create_model(model.model, device="meta", **model.model_kwargs).blocks[0].mixer
        assert (mixer.conv.kind, mixer.direction) == ("none", "forward")


@pytest.mark.parametrize("name", [n for n in shipped_configs() if "/" in n])
def test_every_shipped_configuration_builds_its_model(name):
    model = load_config(name).model
    kwargs = {"drop_path_rate": model.drop_path_rate, **model.model_kwargs}
    built = timm.create_model(model.model, device="meta", **kwargs)
    assert 1e6 < sum(p.numel() for p in built.parameters()) < 30e6
    if name.startswith(("matched/", "published/")):
        # Vim's own 7M
        size = 7_000_000 if name == "published/vim_tiny" else 6_125_224
        assert abs(sum(p.numel() for p in built.parameters()) / size - 1) <= 0.07


def test_a_flag_overrides_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 3e-4, epochs: 7}\nmodel: {model: deit_tiny_patch16_224}\n")
    arguments = [
        "--config", str(file), "--lr", "1e-3", "--betas", "0.9", "0.95", "--data-dir", "/x/y",
        "--model-kwargs", "conv=none", "depth=3", "--grad-checkpointing", "--clip-grad", "null",
    ]  # fmt: skip
    config, name = parse_config(arguments, "prog")
    assert name == "mine"
    assert config.optim.lr == 1e-3 and config.optim.epochs == 7
    assert config.optim.betas == (0.9, 0.95) and config.optim.clip_grad is None
    assert config.model.model_kwargs == {"conv": "none", "depth": 3}
    assert config.model.grad_checkpointing and str(config.data.data_dir) == "/x/y"
    assert config.model.model == "deit_tiny_patch16_224"


def test_a_resolved_configuration_reads_back(tmp_path):
    config = load_config("quickstart")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(str(file)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", r"unknown key 'optim\.lrr'; did you mean lr\?"),
        (
            "optim: {batch_size: 1}",
            r"unknown key 'optim\.batch_size'; did you mean data\.batch_size",
        ),
        ("optim: {zzzzzz: 1}", r"unknown key 'optim\.zzzzzz'$"),
        ("lr: 1", r"unknown section 'lr'; it is a key of 'optim': optim\.lr"),
        ("optin: {lr: 1}", r"unknown section 'optin'; did you mean optim\?"),
        ("optim: {lr: fast}", r"optim\.lr='fast' does not fit: .*number"),
        ("optim: {lr: -1}", r"optim\.lr=-1 does not fit: .*greater than 0"),
        ("data: {hflip: 2}", r"data\.hflip=2 does not fit: .*less than or equal to 1"),
        ("model: {in_chans: 2}", r"model\.in_chans=2 does not fit: 1 \(grey\) and 3"),
        ("run: {mixed_precision: fp8}", r"run\.mixed_precision='fp8' does not fit: .*'bf16'"),
        ("- a\n- b", "must be a mapping of model, data, optim, run, got"),
        ("optim: [", "cannot read .*bad.yaml"),
        ("optim: 3", r"optim=3 does not fit"),
        ("optim: on", r"optim takes no True \(YAML reads yes"),
        ("optim: {lr: 2020-13-45}", "cannot read .*month must be in"),
        ("[]", r"must be a mapping of model, data, optim, run, got \[\]"),
        ("optim: {epochs: on}", r"optim does not fit: epochs takes no True \(YAML reads yes"),
        ("optim: {lr: .inf}", r"optim\.lr=inf does not fit: .*finite"),
        ("optim: {betas: [0.9, 1.5]}", r"optim\.betas\.1=1\.5 does not fit"),
        ("data: {scale: [1, 0.08]}", r"data\.scale=\[1, 0\.08\] does not fit: a range needs"),
        ("data: {ratio: [0, 1]}", r"data\.ratio=\[0, 1\] does not fit: a range needs"),
        ("data: {std: [0]}", r"data\.std\.0=0 does not fit: .*greater than 0"),
        ("run: {seed: 99999999999}", r"run\.seed=99999999999 does not fit"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text, message, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(str(file))
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrr", "1"], r"unknown argument '--lrr'; did you mean --lr\?"),
        (["--batchsize", "1"], r"unknown argument '--batchsize'; did you mean --batch-size\?"),
        (["stray"], r"unknown argument 'stray'"),
        (["--lr"], r"argument --lr: expected one argument"),
        (["--lr", "fast"], r"optim\.lr='fast' does not fit"),
        (["--model-kwargs", "depth"], r"--model-kwargs takes key=value, got 'depth'"),
        (["--model-kwargs", "x=2020-13-45"], r"--model-kwargs: month must be in"),
        (["--config", "quickstarts"], r"no configuration 'quickstarts'.*shipped: .*quickstart"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as error:
        parse_config(arguments, "prog")
    assert "\n" not in str(error.value)


def test_defaults_pass_their_own_schema():
    assert Config.model_validate(Config().model_dump()) == load_config()


@pytest.mark.parametrize(
    ("flags", "section", "key", "value"),
    [
        (["--mixed-precision", "no"], "run", "mixed_precision", "no"),
        (["--data-dir", "2024"], "data", "data_dir", Path("2024")),
        (["--run-dir", "a b: #c"], "run", "run_dir", Path("a b: #c")),
        (["--output", "~/runs"], "run", "output", Path.home() / "runs"),
        (["--model", "on"], "model", "model", "on"),
        (["--mean", "null"], "data", "mean", None),
        (["--grad-checkpointing", "false"], "model", "grad_checkpointing", False),
        (["--drop-path-rate", "0"], "model", "drop_path_rate", 0.0),
    ],
)
def test_what_is_typed_is_what_is_meant(flags, section, key, value):
    config, _ = parse_config(flags, "prog")
    assert getattr(getattr(config, section), key) == value


def test_yaml_reads_no_as_false_and_we_know(tmp_path):
    file = tmp_path / "no.yaml"
    file.write_text("run: {mixed_precision: no}\noptim:\n  # lr: 1\n")
    assert load_config(str(file)).run.mixed_precision == "no"


def test_a_flag_s_mistake_is_not_the_files():
    with pytest.raises(UserError) as error:
        parse_config(["--config", "quickstart", "--lr", "abc"], "prog")
    assert str(error.value).startswith("optim.lr='abc' does not fit")
