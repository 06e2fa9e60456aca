"""Publish a bundle as a model of the hub, in one commit, with the hub's own client.

    mobilellm publish nano.tar.zst --to hub:OWNER/NAME --yes

The token is that of ``hf auth login`` or ``HF_TOKEN``. A repository that is new has the default
visibility of its owner.
"""

import tempfile
from pathlib import Path
from typing import Any

from exporter.bundle.bundle import CHECKSUMS
from exporter.bundle.markdown import plain
from exporter.bundle.origin import is_hub_id
from exporter.errors import InputError
from exporter.files import sha256
from exporter.progress import Progress
from exporter.publishing.contents import Contents
from exporter.publishing.network import network_errors

#: The file that the hub itself writes into every repository.
_ATTRIBUTES = ".gitattributes"


def parse_repository(text: str, destination: str) -> str:
    """The repository in ``OWNER/NAME``. Raises InputError."""
    if not is_hub_id(text):
        raise InputError(destination, "names no model of the hub", "Write hub:OWNER/NAME")
    return text


def write(repository: str, contents: Contents, overwrite: bool, progress: Progress) -> str:
    """Upload the bundle in one commit. Returns the address of the commit.

    The repository is created if there is none. Files of an earlier bundle are deleted in the same
    commit; the history of the repository keeps them. Raises InputError for another bundle in the
    repository, unless `overwrite`, for a repository with other files, and for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    with network_errors(repository, "hf auth login"):
        api = HfApi()
        progress("publish", 0, 2, "look at the repository")
        present = _present(api, repository)
        _check_present(api, repository, present, contents, overwrite)
        api.create_repo(repository, exist_ok=True)
        progress("publish", 1, 2, "upload")
        additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=contents.folder / name)
            for name in contents.hashes
        ]
        stale = sorted(present - contents.hashes.keys())
        commit = api.create_commit(
            repository,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=f"Bundle {plain(contents.manifest.recipe.get('name', ''))}",
        )
        missing = sorted(contents.hashes.keys() - _present(api, repository))
        if missing:  # an ignore file in the repository, which the client obeys without a word
            raise ValueError(f"the hub did not take {missing[0]} ({len(missing)} files)")
    progress("publish", 2, 2)
    return str(commit.commit_url)


def _present(api: Any, repository: str) -> set[str]:
    """The files of the repository; empty if there is no such repository."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        siblings = api.model_info(repository).siblings or ()
    except RepositoryNotFoundError:
        return set()
    return {one.rfilename for one in siblings} - {_ATTRIBUTES}


def _check_present(
    api: Any, repository: str, present: set[str], contents: Contents, overwrite: bool
) -> None:
    """Raise InputError if the repository may not be written."""
    if present and CHECKSUMS not in present:
        raise InputError(
            repository,
            f"holds other files and no bundle ({min(present)})",
            "Give another name; nothing was changed",
        )
    if present and not overwrite and not _is_same(api, repository, contents):
        raise InputError(
            repository,
            "holds another bundle",
            "Give another name, or replace it with --overwrite: its history keeps the old one",
        )


def _is_same(api: Any, repository: str, contents: Contents) -> bool:
    """Whether the repository holds this bundle, but for signatures."""
    with tempfile.TemporaryDirectory(prefix="mobilellm-") as scratch:
        found = api.hf_hub_download(repository, CHECKSUMS, local_dir=scratch)
        return sha256(Path(found)) == contents.hashes[CHECKSUMS]
