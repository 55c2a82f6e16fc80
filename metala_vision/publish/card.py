"""The model card of published weights: what they are, how good, how they came to be."""

import os
import re
from typing import Any

import yaml

from metala_vision.errors import one_line
from metala_vision.weights.manifest import Entry


def without_path(word: str) -> str:
    """The word, or DIR where it names a place on this machine; `local-dir:` and `--flag=` stay."""
    if re.match(r"[A-Za-z]:[\\/]", word):
        return "DIR"
    head, mark, tail = word.rpartition("=" if word.startswith("-") else ":")
    if mark and "//" not in word:
        return f"{head}{mark}{without_path(tail)}"
    place = os.path.expanduser(word)
    if os.path.isabs(place) or ".." in re.split(r"[\\/]", place):
        return "DIR"
    return "DIR" if word.startswith(("~", "./")) else word


def scrubbed(values: Any) -> Any:
    """The same without the places of this machine, in lists and dictionaries too."""
    if isinstance(values, dict):
        return {key: scrubbed(value) for key, value in values.items()}
    if isinstance(values, list):
        return [scrubbed(value) for value in values]
    return without_path(values) if isinstance(values, str) else values


def as_card(
    name: str, entry: Entry, facts: dict[str, Any], environments: list[dict[str, Any]]
) -> str:
    """Markdown with the front matter of a model hub.

    Args:
        name: of the weights.
        facts: model, began_from, parameters, dtype, step, finished, epochs, hours, ema, as (whose
            the metrics are) and files (that lie beside it).
        environments: of the run's start, and of each time it was resumed.
    """
    front: dict[str, Any] = {
        "tags": ["image-classification", "timm", "metala-vision"],
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "license": entry.license,
    }
    if entry.license == "other":
        front["license_name"] = "terms-in-this-card"
    first = environments[0]
    commits = list(dict.fromkeys(
        (x["commit"] or "no checkout") + (" with changes" if x["uncommitted_changes"] else "")
        for x in environments
    ))  # fmt: skip
    devices = first["gpus"] or [f"{first['cpu_cores']} CPU cores"]
    versions = ", ".join(f"{k} {v}" for k, v in first["versions"].items() if v)
    channels, height, width = entry.preprocessing.input_size
    metrics = entry.metrics
    quality = "not evaluated" if metrics is None else (
        f"{metrics.top1:.2f} %, {metrics.top5:.2f} % on {metrics.images:,} held-out images, "
        + facts["as"]
    )  # fmt: skip
    rows = [
        ("model", f"{facts['model']}, {facts['parameters']:,} parameters"),
        ("images", f"{height}x{width}, {channels} channels, {entry.num_classes} classes"),
        ("trained on", entry.dataset),
        ("began from", facts["began_from"]),
        ("top-1, top-5", quality),
        ("length", f"{facts['step']:,} steps, {facts['epochs']:.1f} epochs, "
                   f"{facts['hours']:.2f} hours" + ("" if facts["finished"] else ", unfinished")),
        ("weights", f"{facts['dtype']}, {entry.size:,} bytes"
                    + (", averaged over the steps" if facts["ema"] else "")),
        ("sha256", f"`{entry.sha256}`"),
        ("recipe", f"{entry.recipe}; resolved in `config.yaml`"),
        ("command", f"`{' '.join(scrubbed(first['command']))}`"),
        ("commit", ", then ".join(commits)),
        ("machine", f"{', '.join(devices)}, {first['processes']} process(es), "
                    f"{first['torch_threads']} thread(s) each; {first['platform']}"),
        ("versions", versions),
        ("log", ", ".join(f"`{name}`" for name in facts["files"])),
        ("license", entry.license + (f": {entry.terms}" if entry.terms else "")),
    ]  # fmt: skip
    cells = [(key, one_line(value).replace("|", "\\|")) for key, value in rows]
    table = "\n".join(f"| {key} | {value} |" for key, value in cells)
    model = name if "." in name else "local-dir:FOLDER"
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}

| | |
|---|---|
{table}

```python
import timm
import metala_vision  # registers the models

model = timm.create_model("{model}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
```

A copy of this folder is read by `timm.create_model("local-dir:FOLDER", pretrained=True)` too, and a
repository of the Hub by `hf-hub:NAMESPACE/NAME`.
"""
