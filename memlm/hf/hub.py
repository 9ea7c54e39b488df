"""Exports on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from memlm.config import ConfigError

CARD = "README.md"
"""File that says on the hub what a model is."""

_FETCH = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def folder_of(name: str | os.PathLike[str], how: dict[str, Any]) -> Path:
    """The folder of an export, which is fetched if it is on the hub.

    Args:
        name: A folder, or the name of a model on the hub.
        how: How it is fetched: what `huggingface_hub.snapshot_download` takes.

    Raises:
        ConfigError: For a setting that is not known.
    """
    if unknown := [key for key, value in how.items() if key not in _FETCH and value is not None]:
        raise ConfigError(
            f"from_pretrained of a model of memlm takes no {unknown[0]}; it takes base, trust, dtype, device_map, and "
            f"for the hub {', '.join(_FETCH)}"
        )
    if os.path.isdir(name):
        return Path(name)
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(str(name), **{k: v for k, v in how.items() if v is not None}))


def card_in(folder: Path) -> str | None:
    """Text of the card in a folder; None if there is none."""
    file = folder / CARD
    return file.read_text(encoding="utf-8") if file.is_file() else None


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model of memlm",
    create_pr: bool = False,
) -> str:
    """Upload an export to the hub.

    Args:
        folder: The export.
        repo_id: ``name`` or ``owner/name`` of the repository, which is made if it is not there.
        private: Whether a new repository is private; None for what the owner's are.
        token: As `huggingface_hub.HfApi` takes it; None for that of ``hf auth login``.
        revision: Branch.
        commit_message: Said of the upload.
        create_pr: Whether to ask for it to be merged, instead of doing it.

    Returns:
        Address of the commit.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    done = api.upload_folder(
        repo_id=name, folder_path=Path(folder), revision=revision, commit_message=commit_message, create_pr=create_pr
    )
    return str(done)
