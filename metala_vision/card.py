"""The model card that a run leaves: what was trained, how, and how good it is."""

import json
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

CARD_FILE = "README.md"


def write_card(run_dir: Path, name: str, facts: dict[str, Any]) -> None:
    """Write run_dir/README.md, with the front matter of a model hub.

    Args:
        name: of the run.
        facts: model, parameters, input_size, classes, dataset, images, top1, top5, best_top1,
            best_epoch, epochs, steps, begins_from (or None).
    Raises:
        UserError: where it cannot be written.
    """
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    versions = {k: v for k, v in environment["versions"].items() if v}
    front = {
        "tags": ["image-classification", "timm", "metala-vision"],
        "library_name": "timm",
        "pipeline_tag": "image-classification",
    }
    devices = environment["gpus"] or [f"{environment['cpu_cores']} CPU cores"]
    commit = environment["commit"] or "no checkout"
    if environment["uncommitted_changes"]:
        commit += " with changes (changes.patch)"
    command = " ".join(environment["command"])
    packages = ", ".join(f"{package} {version}" for package, version in versions.items())
    height, width = facts["input_size"][-2:]
    last = f"{facts['top1']:.2f} %, {facts['top5']:.2f} % on {facts['images']:,} held-out images"
    best = f"{facts['best_top1']:.2f} % after epoch {facts['best_epoch']:g}"
    text = f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {name}: {facts["model"]}

| | |
|---|---|
| parameters | {facts["parameters"]:,} |
| images | {height}x{width}, {facts["classes"]} classes, {facts["dataset"]} |
| began from | {facts["begins_from"] or "nothing"} |
| top-1, top-5 after the last epoch | {last} |
| best top-1 | {best} (chosen on the same images) |
| trained | {facts["epochs"]} epochs, {facts["steps"]:,} steps, from {environment["started"]} |
| command | `{command}` |
| commit | {commit} |
| machine | {", ".join(devices)}; {environment["platform"]} |
| versions | {packages} |

The whole recipe is in `config.yaml`, every figure in `metrics.jsonl`, the curve in `curve.png`.

```python
import timm
import metala_vision  # registers the models

model = timm.create_model("local-dir:FOLDER/last", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
```
"""
    try:
        (run_dir / CARD_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {run_dir / CARD_FILE}: {error.strerror}") from error
