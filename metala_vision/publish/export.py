"""A run as published weights: safetensors, config.json and card, in a folder that timm reads."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from metala_vision.catalogue import CATALOGUE
from metala_vision.checkpoint import CONFIG_FILE, MODEL_FILE, load_state, load_weights, verify
from metala_vision.config import ModelConfig
from metala_vision.config_file import load_config
from metala_vision.errors import UserError, WeightsError, one_line
from metala_vision.evaluate import evaluate_checkpoint, load_model
from metala_vision.files import write_text
from metala_vision.labels import describe
from metala_vision.run_folder import METRICS_FILE, read_metrics
from metala_vision.transfer import lora_scale, merged
from metala_vision.weights.check import sha256_of
from metala_vision.weights.manifest import (
    MANIFEST_FILE,
    TAG,
    Entry,
    Manifest,
    Metrics,
    as_json,
    read_manifest,
)

from .card import as_card, scrubbed, without_path

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Arguments that weights do not depend on, or that timm adapts them to.
FREE_ARGUMENTS = {"num_classes", "in_chans", "global_pool", "img_size", "drop_rate",
                  "drop_path_rate", "pretrained"}  # fmt: skip
LOG_FILES = ("config.yaml", METRICS_FILE, "curve.png")
PUBLISHED = {MODEL_FILE, CONFIG_FILE, MANIFEST_FILE, "README.md", *LOG_FILES}


@dataclass(frozen=True)
class Publication:
    """What is published, and how.

    Attributes:
        run: a run's folder. out: the folder to write; with a tag, out/MODEL.TAG and out's manifest.
        tag: of METALA_VISION_WEIGHTS, METALA_VISION_HUB and timm.create_model("MODEL.TAG").
        checkpoint: "last" or "best". ema: False takes the weights themselves where the run averaged
            them. dtype: of the file.
        license: in the Hub's words. terms: in the user's. dataset, recipe: None are the run's.
        data_dir: evaluate the file on its held-out images. workers: that decode them.
        replace: write over a publication that is there.
    """

    run: Path
    out: Path
    license: str
    tag: str | None = None
    checkpoint: str = "last"
    ema: bool = True
    dtype: str = "float32"
    terms: str | None = None
    dataset: str | None = None
    recipe: str | None = None
    data_dir: Path | None = None
    workers: int = 4
    replace: bool = False


def publish(wanted: Publication) -> tuple[Path, Entry]:
    """Write the folder, whole or not at all; the folder, and what its manifest says.

    Raises:
        UserError: for no run, a damaged checkpoint, values that are not finite, a folder that is
            there, arguments that a tag cannot hold, no room.
    """
    out = wanted.out.resolve()
    if wanted.license == "other" and not wanted.terms:
        raise UserError("--license other needs --terms")
    model, weights, facts = _read(wanted)
    architecture = str(model.pretrained_cfg["architecture"])  # pyright: ignore
    name = architecture if wanted.tag is None else f"{architecture}.{wanted.tag}"
    if wanted.tag is not None:
        _check_tag(name, architecture, model)
    folder = out if wanted.tag is None else out / name
    _check_place(folder, wanted.replace)
    if wanted.tag is not None:
        _read_manifest(out)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        entry = _write(wanted, fresh, name, model, weights, facts)
        if wanted.tag is None:
            _put(fresh, folder, wanted.replace)
            return wanted.out, entry
        with FileLock(out / f".{MANIFEST_FILE}.lock"):
            manifest = _read_manifest(out)
            _put(fresh, folder, wanted.replace)
            entry = entry.model_copy(update={"file": f"{name}/{MODEL_FILE}"})
            every = {**manifest.weights, name: entry}
            write_text(out / MANIFEST_FILE, as_json(Manifest(weights=dict(sorted(every.items())))))
        return wanted.out / name, entry
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"cannot write {folder}: {reason}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _check_place(folder: Path, replace: bool) -> None:
    """A folder that is there is replaced if asked, and if it holds nothing but a publication."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    held = {p.name for p in folder.iterdir()}
    if held and not replace:
        raise UserError(f"{folder} is there already; --replace writes over it")
    if foreign := sorted(held - PUBLISHED):
        raise UserError(
            f"{folder} holds {foreign[0]}, which no publication has: it is not replaced"
        )


def _read_manifest(out: Path) -> Manifest:
    path = out / MANIFEST_FILE
    return read_manifest(path) if path.is_file() else Manifest()


def _put(fresh: Path, folder: Path, replace: bool) -> None:
    """Give the new folder its name; what had it is dropped behind that."""
    _check_place(folder, replace)
    old = fresh.with_name(f"{fresh.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write(
    wanted: Publication, folder: Path, name: str, model: nn.Module, weights: dict[str, Tensor],
    facts: dict[str, Any],
) -> Entry:  # fmt: skip
    """All files of a publication."""
    _write_weights(folder, model, weights, wanted.dtype)
    entry = _entry(wanted, folder, model, facts)
    _write_config(folder, model, entry, wanted.tag)
    if wanted.data_dir is not None:
        entry = _evaluated(wanted, folder, entry)
        facts["as"] = "of this file"
    facts["files"] = _write_log(wanted.run, folder, facts["step"])
    write_text(folder / "README.md", as_card(name, entry, facts, facts["environments"]))
    if wanted.tag is not None:
        write_text(folder / MANIFEST_FILE, as_json(Manifest(weights={name: entry})))
    return entry


def _read(wanted: Publication) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The model with the run's weights, the weights, and what the card tells."""
    run, checkpoint = wanted.run, wanted.run / wanted.checkpoint
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run: config.yaml is missing")
    if not checkpoint.is_dir():
        raise UserError(f"{run} has no checkpoint {wanted.checkpoint!r} yet")
    verify(checkpoint)
    config, state = load_config(str(run / "config.yaml")), load_state(checkpoint)
    model = load_model(str(checkpoint))
    weights = load_weights(checkpoint)
    if not wanted.ema:
        if not config.optim.model_ema:
            raise UserError(f"--no-ema: the run in {run} averages no weights")
        weights = state["model"]
        if config.model.lora_rank:
            weights = merged(weights, lora_scale(config.model))
        weights = {name: x.contiguous() for name, x in weights.items()}
    metrics = read_metrics(run)
    steps = [x for x in metrics if x["event"] == "train" and x["step"] <= state["step"]]
    scored = [x for x in metrics if x["event"] == "eval" and x["step"] == state["step"]]
    names = sorted(run.glob("environment*.json"), key=lambda p: (len(p.name), p.name))
    if not names:
        raise UserError(f"{run} is no run: environment.json is missing")
    facts = {
        "config": config, "model": config.model.model.partition(".")[0],
        "began_from": _origin(config.model), "dtype": wanted.dtype,
        "parameters": sum(p.numel() for p in model.parameters()),
        "step": state["step"], "finished": (run / "result.json").is_file(),
        "epochs": max((x["epoch"] for x in steps), default=0.0),
        "hours": state["seconds"] / 3600, "ema": config.optim.model_ema and wanted.ema,
        # The average is what a run evaluates.
        "scored": scored[-1] if scored and (wanted.ema or not config.optim.model_ema) else None,
        "as": _precision(wanted.dtype, config.run.mixed_precision),
        "environments": [json.loads(path.read_text(encoding="utf-8")) for path in names],
    }  # fmt: skip
    return model, weights, facts


def _origin(config: ModelConfig) -> str:
    """What the run began from, without the path of a machine."""
    if config.pretrained_path is not None:
        return f"other weights, {'/'.join(config.pretrained_path.parts[-2:])}"
    return f"the pretrained weights of {config.model}" if config.pretrained else "nothing"


def _precision(dtype: str, mixed_precision: str) -> str:
    """Whose the run's figures are."""
    if dtype == "float32" and mixed_precision == "no":
        return "of this file"
    mixed = "" if mixed_precision == "no" else f", in {mixed_precision}"
    return f"of the run{mixed}" + ("" if dtype == "float32" else f", before rounding to {dtype}")


def _check_tag(name: str, architecture: str, model: nn.Module) -> None:
    if not TAG.fullmatch(name):
        tag = name.partition(".")[2]
        raise UserError(f"--tag {tag!r}: small letters, digits and _ are accepted")
    own = get_model_args(model)
    free = {key: value for key, value in own.items() if key in FREE_ARGUMENTS}
    size: Any = model.pretrained_cfg["input_size"]  # pyright: ignore
    images = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
    plain = timm.create_model(architecture, **free).eval()
    try:
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            same = torch.allclose(plain(images), model(images), rtol=1e-4, atol=1e-5)
    except RuntimeError:  # other names, other shapes
        same = False
    if not same:
        changed = ", ".join(sorted(own.keys() - FREE_ARGUMENTS)) or "weights"
        raise UserError(
            f"--tag: the run's {architecture} has its own {changed}, which a tag cannot hold; "
            "without --tag the folder says so, and local-dir: and hf-hub: read it"
        )


def _write_weights(
    folder: Path, model: nn.Module, weights: dict[str, Tensor], dtype: str
) -> None:  # fmt: skip
    own = {name for name, _ in model.state_dict().items()}
    if own != weights.keys():
        raise WeightsError(f"the checkpoint lacks or adds {min(own ^ weights.keys())}")
    for name, x in weights.items():
        rounded = x.to(DTYPES[dtype])
        if not bool(rounded.isfinite().all()):
            what = "is not finite" if not bool(x.isfinite().all()) else f"is too large for {dtype}"
            raise UserError(f"{name} {what}; it is not published")
    rounded = {name: x.to(DTYPES[dtype]).contiguous() for name, x in weights.items()}
    save_file(rounded, folder / MODEL_FILE, metadata={"format": "pt"})
    (folder / MODEL_FILE).chmod(0o644)  # safetensors lets nobody else read


def _entry(wanted: Publication, folder: Path, model: nn.Module, facts: dict[str, Any]) -> Entry:
    cfg: Any = model.pretrained_cfg
    names = cfg.get("label_names")
    config, scored, path = facts["config"], facts["scored"], folder / MODEL_FILE
    where = config.data.dataset
    if config.data.data_dir and where not in CATALOGUE:
        where = config.data.data_dir.name
    preprocessing = {
        key: cfg[key]
        for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    }
    return Entry(
        file=MODEL_FILE, size=path.stat().st_size, sha256=sha256_of(path),
        dataset=wanted.dataset or where, recipe=wanted.recipe or _recipe(facts),
        license=wanted.license, terms=wanted.terms, num_classes=int(cfg["num_classes"]),
        metrics=scored and Metrics(**{key: scored[key] for key in ("top1", "top5", "images")}),
        preprocessing=preprocessing,  # pyright: ignore[reportArgumentType]
        label_names=names, label_descriptions=describe(names or ()) or None,
    )  # fmt: skip


def _recipe(facts: dict[str, Any]) -> str:
    """The configuration that the command named."""
    command = [part for word in facts["environments"][0]["command"] for part in word.split("=", 1)]
    named = command[command.index("--config") + 1] if "--config" in command[:-1] else "flags"
    return Path(named).name if without_path(named) != named else named


def _write_config(folder: Path, model: nn.Module, entry: Entry, tag: str | None) -> None:
    labels = {"label_names": entry.label_names, "label_descriptions": entry.label_descriptions}
    save_config_for_hf(
        model, str(folder / CONFIG_FILE),
        model_config={
            **{key: value for key, value in labels.items() if value},
            "pretrained_cfg": {"license": entry.license, **({"tag": tag} if tag else {})},
        },
        data_config=entry.preprocessing.model_dump(),
    )  # fmt: skip


def _evaluated(wanted: Publication, folder: Path, entry: Entry) -> Entry:
    assert wanted.data_dir is not None
    report = evaluate_checkpoint(
        str(folder), wanted.data_dir, workers=wanted.workers,
        known_classes=entry.label_names is not None,
    )  # fmt: skip
    metrics = {"top1": report.top1, "top5": report.top5, "images": report.images}
    return Entry.model_validate({**entry.model_dump(), "metrics": metrics})


def _write_log(run: Path, folder: Path, step: int) -> list[str]:
    """Configuration, metrics and curve, without the places of this machine; the files' names."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config["run"] |= {"output": "runs", "run_dir": None, "resume": None}
    config["data"]["data_dir"] = None
    if config["data"].get("val_file"):
        config["data"]["val_file"] = Path(config["data"]["val_file"]).name
    write_text(folder / "config.yaml", yaml.safe_dump(scrubbed(config), sort_keys=False))
    metrics = (line for line in read_metrics(run) if line["event"] in ("train", "eval"))
    kept = [line for line in metrics if line["step"] <= step]
    write_text(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))
    if (run / "curve.png").is_file():
        shutil.copyfile(run / "curve.png", folder / "curve.png")
    return [name for name in LOG_FILES if (folder / name).is_file()]
