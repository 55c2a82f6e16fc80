"""A published folder to the Hub."""

import re
from pathlib import Path

from metala_vision.errors import UserError, one_line
from metala_vision.weights.manifest import MANIFEST_FILE, read_manifest


def check_name(tag: str | None, repository: str) -> None:
    """Raises UserError where nobody could load `tag`, MODEL.TAG, from that repository."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"--push {repository!r}: NAMESPACE/NAME is accepted")
    name = repository.partition("/")[2]
    if tag is not None and name != tag:
        raise UserError(
            f"--push {repository}: the tag {tag} is looked for in a repository of that name, "
            f"{repository.partition('/')[0]}/{tag}"
        )


def tag_of(folder: Path) -> str | None:
    """MODEL.TAG of a published folder; None without one. Raises UserError for another folder."""
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no published folder: no model.safetensors and config.json")
    if not (folder / MANIFEST_FILE).is_file():
        return None
    return next(iter(read_manifest(folder / MANIFEST_FILE).weights), None)


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload the folder as NAMESPACE/NAME, made where it is not there; its address.

    The token is that of `hf auth login` or HF_TOKEN.

    Raises:
        UserError: not allowed, no network, a name that the Hub does not take.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="metala-vision")
    try:
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"{folder.name}",
            ignore_patterns=[".*"],
        )  # fmt: skip
    except Exception as error:  # of the Hub, of the network: its own and others
        reason = one_line(error) or type(error).__name__
        if error.__cause__ is not None:
            reason += f" ({one_line(error.__cause__) or type(error.__cause__).__name__})"
        raise UserError(f"cannot publish {repository}: {reason[:300]}") from error
    return str(done.commit_url).split("/commit/")[0]
