"""A small comparison."""

import csv

import yaml

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 1}


def comparison(tmp_path, tree=None, more=(), **changes):
    """A file with two small members on the digits' tree; `more` are further overrides."""
    values = {
        "recipe": "quickstart",
        "overrides": {
            "model": {"img_size": 32, "patch_size": 8, "in_chans": 3, "model_kwargs": SMALL},
            "data": {
                "dataset": "folder", "data_dir": str(tree), "val_fraction": None, "batch_size": 12,
                "mean": None, "std": None, "workers": 0,
            },
            "optim": {"epochs": 1, "warmup_epochs": 0},
            **dict(more),
        },
        "members": ["metala_nano", "attention_nano"],
        **changes,
    }  # fmt: skip
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def table(output):
    """The rows of compare.csv, without what depends on the clock."""
    rows = list(csv.DictReader((output / "compare.csv").read_text().splitlines()))
    for row in rows:
        row.pop("minutes")
    return rows
