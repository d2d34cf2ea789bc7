"""Uploads an exported folder to the Hugging Face hub."""

import re
from pathlib import Path

from camopd_jax.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_push(repository: str) -> None:
    """Raises UserError unless `repository` is a hub name and a token is there. Needs no network."""
    from huggingface_hub import get_token  # slow to import, and only needed here

    if not _HUB_NAME.fullmatch(repository):
        raise UserError(f"--push: {repository!r} is not a name on the hub; give ORGANISATION/NAME")
    if get_token() is None:
        raise UserError("--push: no token for the hub; set HF_TOKEN, or log in with `hf auth login`")


def push(folder: Path, repository: str, public: bool) -> str:
    """Uploads a folder in one commit, and creates the repository if it does not exist; returns its address.

    A base model without a name on the hub is left out of the metadata of the card, which the hub would refuse.

    Raises:
      UserError: if it cannot be uploaded. The folder stays.
    """
    from huggingface_hub import HfApi

    card = folder / "README.md"
    card.write_text(_without_local_base(card.read_text()))
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by camopd_jax")
    except Exception as error:  # the client raises its own, httpx' and OS errors
        raise UserError(
            f"--push: cannot upload to {repository} ({_reason(error)}). The export is complete: {folder}; upload it "
            f"with `hf upload {repository} {folder}`"
        ) from error
    return f"{api.endpoint}/{repository}"


def _without_local_base(card: str) -> str:
    line = re.search(r'^base_model: "(.*)"\n', card, re.MULTILINE)
    if line is None or (_HUB_NAME.fullmatch(line[1]) and not Path(line[1]).exists()):
        return card
    return card.replace(line[0], "", 1)


def _reason(error: Exception) -> str:
    """One line for an error of the hub's client."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    meaning = {401: "the token is not valid", 403: "the token has no right to write there"}.get(status or 0)
    if meaning:
        return f"{status}: {meaning}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
