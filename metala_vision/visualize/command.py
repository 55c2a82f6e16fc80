"""`metala-vision visualize`: scan orders; attention maps, receptive field and memory of a model."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metala_vision.errors import UserError
from metala_vision.files import (
    PICTURES,
    check_outputs,
    check_picture,
    evenly_spread,
    write_text,
)

MOST_LAYERS = 6  # of an attention picture, where none are named
NOISE = "standard normal noise, seed 0"
COMMANDS = {
    "scans": "every scan order on a grid",
    "attention": "what one token of an image takes from every other, layer by layer",
    "receptive-field": "the pixels on which one token of the last map depends",
    "memory": "after how many tokens each layer has forgotten half",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `metala-vision visualize`; imports nothing of torch."""
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    parsers: dict[str, Any] = {
        name: what.add_parser(
            name, help=text, description=f"Draw {text}.", formatter_class=parser.formatter_class
        )
        for name, text in COMMANDS.items()
    }
    parsers["scans"].add_argument(
        "--grid", nargs=2, type=int, default=(14, 14), metavar=("ROWS", "COLUMNS"), help="[14 14]"
    )
    for name in list(COMMANDS)[1:]:
        own = parsers[name]
        own.add_argument("model", help="folder that a run left, or a timm model's name")
        own.add_argument(
            "--untrained", action="store_true",
            help="of a timm name, the weights it starts with, seed 0",
        )  # fmt: skip
        own.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE")
        if name == "attention":
            own.add_argument("--image", type=Path, required=True, metavar="FILE")
            own.add_argument("--layers", nargs="+", metavar="LAYER", help="numbers from 0, or all "
                             f"[{MOST_LAYERS} over the depth]")  # fmt: skip
            own.add_argument("--heads", choices=["mean", "each"], default="mean", help="[mean]")
            own.add_argument("--compare-to", metavar="MODEL", help="below it, as MODEL")
        else:
            own.add_argument("--image", type=Path, nargs="+", metavar="PATH", help="files, or "
                             f"folders of images [{NOISE}]")  # fmt: skip
            own.add_argument("--max-images", type=int, default=16, help="of all [16]")
        if name != "memory":
            own.add_argument(
                "--token", nargs=2, type=int, metavar=("ROW", "COLUMN"),
                help="on the grid of the model's tokens, from 0 [the middle]",
            )  # fmt: skip
        own.add_argument("--json", type=Path, metavar="FILE", help="the numbers as JSON")
    for name, own in parsers.items():
        out = Path(f"{name}.png")
        own.add_argument("--out", type=Path, default=out, help=f"[{out}]; {' '.join(PICTURES)}")


def draw(given: argparse.Namespace) -> Path:
    """Draw what the arguments ask for, and tell its numbers; the path of the picture.

    Raises:
        UserError: for what the user can mend, before any work where it can be seen before.
    """
    if given.what == "scans" and (min(given.grid) < 1 or max(given.grid) > 256):
        raise UserError(f"--grid takes 1 to 256 rows and columns, got {given.grid}")
    if getattr(given, "max_images", 1) < 1:
        raise UserError(f"--max-images needs 1 or more, got {given.max_images}")
    check_picture("--out", given.out)
    as_json = getattr(given, "json", None)
    images = getattr(given, "image", None) or []
    inputs = [(path, "--image") for path in ([images] if isinstance(images, Path) else images)]
    check_outputs({"--out": given.out, "--json": as_json}, inputs)
    if given.what == "scans":
        from .pictures import scan_orders

        rows, columns = given.grid
        scan_orders(rows, columns, given.out)
        return given.out
    numbers = {"attention": _attention, "receptive-field": _receptive_field, "memory": _memory}[
        given.what
    ](given)
    if as_json is not None:
        lines = ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in numbers.items())
        write_text(as_json, f"{{\n{lines}\n}}\n")
    return given.out


def _attention(given: argparse.Namespace) -> dict[str, Any]:
    from .maps import record_attention
    from .pictures import attention_maps
    from .receptive_field import check_token

    files = image_files([given.image])
    if len(files) > 1:
        raise UserError(f"--image takes one image, {given.image} holds {len(files)}")
    model, cfg = _load(given.model, given)
    (image,) = read_images(files, cfg)
    calls, grid, prefix = record_attention(model, image.unsqueeze(0), given.model)
    token = check_token(given.token and tuple(given.token), grid)
    described = [(given.model, calls, grid, prefix, token)]
    if given.compare_to is not None:
        other, other_cfg = _load(given.compare_to, given, ours=False)
        # The same part of the image for both, so that a token is at the same place.
        crop = {key: cfg[key] for key in ("crop_pct", "crop_mode") if key in cfg}
        (other_image,) = read_images(files, {**other_cfg, **crop})
        found = record_attention(other, other_image.unsqueeze(0), given.compare_to)
        calls, other_grid, prefix = found
        # Where the middle of the first model's token lies
        there = (
            (2 * token[0] + 1) * other_grid[0] // (2 * grid[0]),
            (2 * token[1] + 1) * other_grid[1] // (2 * grid[1]),
        )
        described.append((given.compare_to, calls, other_grid, prefix, there))
    most = min(MOST_LAYERS, *(len(calls) for _, calls, *_ in described))
    parts = []
    for name, calls, own_grid, prefix, at in described:
        layers = _layers(given.layers, len(calls), most, name)
        maps = [layer_maps(calls[i], own_grid, prefix, at) for i in layers]
        parts.append({
            "model": name, "untrained": _untrained(name, given), "grid": own_grid, "token": at,
            "prefix_tokens": prefix, "layers": maps,
        })  # fmt: skip
        worst = max(of_layer["error"] for of_layer in maps)
        print(
            f"{name}: token {at[0]} {at[1]} of {own_grid[0]} x {own_grid[1]}; "
            f"map times values is the operator's output to {worst:.0e}"
            + (f"; tokens that are no patches ({prefix}) left out" if prefix else "")
        )
    attention_maps(_shown(image, cfg), parts, given.heads == "each", given.out)
    return {"image": str(given.image), "models": parts}


def layer_maps(
    call: Any, grid: tuple[int, int], prefix: int, token: tuple[int, int]
) -> dict[str, Any]:
    """What one token takes in one layer, for JSON.

    Returns:
        operator; maps: by pass, [H][Gh][Gw], and "sum" of two passes; relative: the same as drawn,
        the mean over heads of |map| over its mean over all patches; prefix: the map's values on
        tokens that are no patches, by pass [H][P]; error: the largest difference between map times
        values and the operator's output, over that output's root mean square.
    """
    from .maps import PRODUCT, attention_map, relative_weight

    t = prefix + token[0] * grid[1] + token[1]
    names, weights = attention_map(call, [t])
    weights = weights[:, 0, :, 0]  # [D, H, N]
    heads_first = call.operator == PRODUCT
    v = call.inputs["value"].transpose(1, 2) if heads_first else call.inputs["v"]
    o = call.output.transpose(1, 2) if heads_first else call.output
    answer = (weights.sum(0).unsqueeze(2) * v[0].double().transpose(0, 1)).sum(1)  # [H, V]
    expected = o[0, t].double()
    error = (answer - expected).abs().max() / expected.square().mean().sqrt().clamp_min(1e-30)
    of_pass = dict(zip(names, weights, strict=True))
    if len(names) == 2:
        of_pass["sum"] = weights.sum(0)
    patches = {name: w[:, prefix:].reshape(-1, *grid) for name, w in of_pass.items()}
    relative = {name: relative_weight(w) for name, w in patches.items()}
    return {
        "layer": call.layer,
        "operator": call.operator.removesuffix("_op"),
        "maps": {name: w.tolist() for name, w in patches.items()},
        "relative": {name: w.mean(0).tolist() for name, w in relative.items()},
        "relative_by_head": {name: w.tolist() for name, w in relative.items()},
        "prefix": {name: w[:, :prefix].tolist() for name, w in of_pass.items()},
        "error": error.item(),
    }


def _layers(asked: Sequence[str] | None, depth: int, most: int, name: str) -> list[int]:
    """Layer numbers: those asked for, all, or `most` spread over the depth."""
    if asked is None:
        return sorted({round(i * (depth - 1) / max(most - 1, 1)) for i in range(most)})
    if list(asked) == ["all"]:
        return list(range(depth))
    for text in asked:
        if not text.isdecimal() or int(text) >= depth:
            raise UserError(f"--layers takes 0 to {depth - 1}, or all, for {name}; got {text}")
    return [int(text) for text in asked]


def _receptive_field(given: argparse.Namespace) -> dict[str, Any]:
    from .pictures import receptive_field as picture
    from .receptive_field import HELD, growing_squares, receptive_field, side_that_holds

    files = image_files(given.image or [])
    model, cfg = _load(given.model, given)
    images, source = _images(files, given, cfg)
    token = given.token and tuple(given.token)
    field, grid, at = receptive_field(model, images, token, given.model)
    sides, shares, areas = growing_squares(field, at, grid)
    held = {share: side_that_holds(share, sides, shares) for share in HELD}
    told = ", ".join(f"{100 * share:g} % within {side} px" for share, side in held.items())
    print(f"{given.model}: of the gradient at token {at[0]} {at[1]}, {told}; {source}")
    picture(
        field.numpy(), at, grid, (sides, shares, areas), held, _titled(given), source, given.out
    )
    return {
        "model": given.model, "untrained": given.untrained, "images": source, "token": at,
        "grid": grid, "sides": sides, "shares": shares, "area_shares": areas,
        "side_that_holds": {str(share): side for share, side in held.items()},
        "field": field.tolist(),
    }  # fmt: skip


def _memory(given: argparse.Namespace) -> dict[str, Any]:
    from .maps import feature_map
    from .memory import QUANTILES, memory_lengths
    from .pictures import memory as picture

    files = image_files(given.image or [])
    model, cfg = _load(given.model, given)
    images, source = _images(files, given, cfg)
    found = memory_lengths(model, images, given.model)
    grid = tuple(feature_map(model, images[:1], given.model).shape[2:])
    names = ", ".join(f"{100 * p:g} %" for p in QUANTILES)
    print(f"half-lives in tokens of {given.model} ({names}); {source}")
    for own in found:
        values = "  ".join(f"{value:10.4g}" for value in own.quantiles)
        print(f"layer {own.layer:2d} {own.decay:16s} {values}")
    picture(found, grid, _titled(given), source, given.out)
    return {
        "model": given.model, "untrained": given.untrained, "images": source, "grid": grid,
        "unit": "tokens; null never forgets", "quantiles": QUANTILES,
        "layers": [
            {"layer": own.layer, "decay": own.decay, "half_life": _finite(own.quantiles),
             "half_life_by_head": _finite(own.heads)} for own in found
        ],
    }  # fmt: skip


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _untrained(name: str, given: argparse.Namespace) -> bool:
    return given.untrained and not Path(name).is_dir()


def _titled(given: argparse.Namespace) -> str:
    return f"{given.model}, untrained" if given.untrained else given.model


def _load(name: str, given: argparse.Namespace, ours: bool = True) -> tuple[Any, dict[str, Any]]:
    """The model in evaluation mode, and its preprocessing."""
    import torch
    from timm import is_model

    from metala_vision.evaluate import load_model

    kwargs = given.model_kwargs if ours else {}
    refused = {"in_chans", "img_size", "device", "dtype"} & set(kwargs)
    if refused:
        raise UserError(f"--model-kwargs takes no {min(refused)}: images are as in training")
    names = [n for n in (given.model, getattr(given, "compare_to", None)) if n is not None]
    if given.untrained and all(Path(n).is_dir() for n in names):
        raise UserError(f"--untrained takes a timm name, got the folder {name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = load_model(name, pretrained=not _untrained(name, given), **kwargs)
        except UserError as error:
            hint = "; --untrained takes the weights it starts with" if is_model(name) else ""
            raise UserError(f"{error}{hint * (not given.untrained)}") from error
    return model.requires_grad_(False), getattr(model, "pretrained_cfg", {})


def _images(
    files: Sequence[Path], given: argparse.Namespace, cfg: dict[str, Any]
) -> tuple[Any, str]:
    """Preprocessed images [B, C, height, width], and what they are in words."""
    import torch

    if given.image is None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(given.max_images, *cfg["input_size"], generator=generator)
        count = f"{given.max_images} images" if given.max_images > 1 else "one image"
        return noise, f"{count} of {NOISE}"
    images = torch.stack(read_images(evenly_spread(files, given.max_images), cfg))
    if len(files) > len(images):
        return images, f"{len(images)} of {len(files)} images, evenly spread"
    return images, f"{len(images)} images" if len(images) > 1 else "one image"


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The images of files and folders."""
    from metala_vision.sources import IMG_EXTENSIONS

    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                raise UserError(
                    f"no images in folder {path}; endings read: {' '.join(IMG_EXTENSIONS)}"
                )
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"image {path} does not exist")
    return files


def read_images(files: Sequence[Path], cfg: dict[str, Any]) -> list[Any]:
    """Images by the model's own evaluation preprocessing."""
    from metala_vision.evaluate import evaluation_transform
    from metala_vision.sources import convert, decode

    size, transform = evaluation_transform(cfg)
    mode = "RGB" if size[0] == 3 else "L"
    return [transform(convert(decode(path, str(path)), mode)) for path in files]


def _shown(image: Any, cfg: dict[str, Any]) -> Any:
    """What the model sees, [height, width, C] in 0 to 1."""
    import torch

    mean, std = (torch.tensor(cfg[key])[:, None, None] for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
