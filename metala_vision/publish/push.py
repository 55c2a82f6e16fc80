"""A published folder to the Hub."""

from pathlib import Path

from metala_vision.errors import UserError, one_line


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
