"""The model card of published weights: what they are, how good, how they came to be."""

import os
from typing import Any

import yaml

from metala_vision.weights.manifest import Entry


def without_paths(command: list[str]) -> str:
    """A command line, in which what names a place on this machine is DIR."""

    def own(word: str) -> str:
        flag, equals, value = word.partition("=")
        if equals and os.path.isabs(os.path.expanduser(value)):
            return f"{flag}=DIR"
        return "DIR" if os.path.isabs(os.path.expanduser(word)) else word

    return " ".join(own(word) for word in command)


def as_card(
    name: str, entry: Entry, facts: dict[str, Any], environments: list[dict[str, Any]]
) -> str:
    """Markdown with the front matter of a model hub.

    Args:
        name: of the weights.
        facts: model, parameters, dtype, step, finished, epochs, hours, ema, exact (whether the
            metrics are of the file itself) and files (that lie beside it).
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
    of = "of this file" if facts["exact"] else f"of the run, before rounding to {facts['dtype']}"
    metrics = entry.metrics
    quality = "not evaluated" if metrics is None else (
        f"{metrics.top1:.2f} %, {metrics.top5:.2f} % on {metrics.images:,} held-out images, {of}"
    )  # fmt: skip
    rows = [
        ("model", f"{facts['model']}, {facts['parameters']:,} parameters"),
        ("images", f"{height}x{width}, {channels} channels, {entry.num_classes} classes"),
        ("trained on", entry.dataset),
        ("top-1, top-5", quality),
        ("length", f"{facts['step']:,} steps, {facts['epochs']:.1f} epochs, "
                   f"{facts['hours']:.2f} hours" + ("" if facts["finished"] else ", unfinished")),
        ("weights", f"{facts['dtype']}, {entry.size:,} bytes"
                    + (", averaged over the steps" if facts["ema"] else "")),
        ("sha256", f"`{entry.sha256}`"),
        ("recipe", f"{entry.recipe}; resolved in `config.yaml`"),
        ("command", f"`{without_paths(first['command'])}`"),
        ("commit", ", then ".join(commits)),
        ("machine", f"{', '.join(devices)}, {first['processes']} process(es), "
                    f"{first['torch_threads']} thread(s) each; {first['platform']}"),
        ("versions", versions),
        ("log", ", ".join(f"`{name}`" for name in facts["files"])),
        ("license", entry.license + (f": {entry.terms}" if entry.terms else "")),
    ]  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
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
