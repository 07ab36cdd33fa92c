"""Look at a hub checkpoint before it is fetched: its config and the headers of its weights."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from magistral_mlx.checkpoint.documents import MAX_JSON_BYTES
from magistral_mlx.checkpoint.folder import Checkpoint, open_checkpoint
from magistral_mlx.checkpoint.hub_api import HubFile, list_files
from magistral_mlx.checkpoint.hub_transfer import fetch_header, read
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.errors import CheckpointError, HubError


@dataclass(frozen=True, slots=True)
class Preview:
    """A checkpoint on the hub.

    Attributes:
        nbytes: of all files that a fetch takes.
        checkpoint: its shapes and formats; its files are not there.
    """

    nbytes: int
    checkpoint: Checkpoint


def preview(repo_id: str, revision: str | None = None) -> Preview:
    """Read the documents and headers of a checkpoint; fetch no weights, and keep nothing.

    Raises:
        Unreachable: the hub does not answer.
        HubError: the repository cannot be fetched, or holds no weights.
        CheckpointError: it is no checkpoint of Magistral.
    """
    listing = list_files(repo_id, revision, "hf")
    with TemporaryDirectory() as name:
        folder = Path(name) / repo_id.rpartition("/")[2]
        folder.mkdir()
        for document in ("config.json", INDEX):
            if (file := listing.documents.get(document)) is not None:
                (folder / document).write_bytes(_document(repo_id, listing.commit, file))
        try:
            shards = [
                fetch_header(repo_id, listing.commit, file, folder)
                for file in listing.weights.values()
            ]
            checkpoint = open_checkpoint(folder, compares_manifest=False, shards=shards)
        except CheckpointError as error:
            # The folder is gone when this is read.
            raise CheckpointError(str(error).replace(str(folder), repo_id)) from None
    return Preview(sum(file.size for file in listing.files.values()), checkpoint)


def _document(repo_id: str, commit: str, file: HubFile) -> bytes:
    if file.size > MAX_JSON_BYTES:
        raise HubError(
            f"{repo_id}: {file.name} has {file.size} bytes, far too many for such a file; name "
            "another repository"
        )
    return b"".join(read(repo_id, commit, file, 0, file.size))
