"""A repository on the Hugging Face hub: the files of one commit, and what a refusal means."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, NamedTuple

from magistral_mlx.checkpoint.manifest import MANIFEST
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

Layout = Literal["hf", "consolidated"]

TEKKEN_FILE = "tekken.json"
# The model card. It is fetched where tekken.json is missing: it names the base model, which has it.
CARD = "README.md"
BESIDE_THE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "params.json",
    TEKKEN_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "SYSTEM_PROMPT.txt",
    "*.jinja",
    MANIFEST,
)
# In this order of preference: the published repository has both, 47 GB each.
WEIGHTS: dict[Layout, tuple[str, ...]] = {
    "hf": ("model*.safetensors", INDEX),
    "consolidated": ("consolidated*.safetensors",),
}
PLAIN_NAME = re.compile(r"\w[\w.-]{,200}", re.ASCII)
TIMEOUT_SECONDS = 10.0


class Unreachable(HubError):
    """Hub that does not answer: no network, offline mode, or the hub is down."""


class HubFile(NamedTuple):
    """File of a commit, as the hub lists it.

    Attributes:
        size: bytes.
        sha256: of the content, if the hub stores it outside git, as it does weights.
        git_sha1: of the content as a git blob; means nothing if there is a ``sha256``.
    """

    name: str
    size: int
    sha256: str | None
    git_sha1: str

    @property
    def checksum(self) -> str:
        return self.sha256 or self.git_sha1

    def digest(self) -> "hashlib._Hash":
        """Make the hash object that gives ``checksum`` for the content."""
        if self.sha256 is not None:
            return hashlib.sha256()
        # By git's definition of a blob.
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class Listing(NamedTuple):
    """Files of one commit that make up a checkpoint. The index is a document."""

    commit: str
    layout: Layout
    documents: Mapping[str, HubFile]
    weights: Mapping[str, HubFile]

    @property
    def files(self) -> dict[str, HubFile]:
        return {**self.documents, **self.weights}


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form ``org/name`` of a hub id."""
    pattern = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
    return re.fullmatch(pattern, name, re.ASCII) is not None


def list_files(repo_id: str, revision: str | None, layout: Layout | None) -> Listing:
    """List the files of a checkpoint in the commit that ``revision`` means now, by one request.

    Args:
        repo_id: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        layout: the weights wanted; None for the HF shards if there are any.

    Raises:
        Unreachable: the hub does not answer.
        HubError: there is no such repository or revision, no access to it, or no weights in it.
    """
    commit, siblings = _listed(repo_id, revision)
    return _choose(repo_id, commit, siblings, layout)


def list_named(repo_id: str, names: Sequence[str]) -> tuple[str, dict[str, HubFile]]:
    """Return the commit of the main branch, and those of the files ``names`` that it has.

    Raises:
        Unreachable, HubError: as ``list_files``, though no weights are needed.
    """
    commit, siblings = _listed(repo_id, None)
    found = [file for file in siblings if file.rfilename in names]
    return commit, {file.rfilename: _hub_file(repo_id, file) for file in found}


def _listed(repo_id: str, revision: str | None) -> tuple[str, Sequence["RepoSibling"]]:
    """Return the commit that a revision means now, and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        info = HfApi().model_info(
            repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        )
    except HFValidationError as error:
        raise HubError(
            f"{repo_id!r} cannot be a hub id ({error}); use org/name, or name a folder"
        ) from None
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise explain(repo_id, revision, error) from None
        raise unreachable(repo_id, error) from None
    # The HTTP library's own errors; offline mode is an OSError.
    except (HTTPError, OSError) as error:
        raise unreachable(repo_id, error) from None
    if not info.sha:
        raise HubError(
            f"{repo_id}: the hub does not say which commit it lists; run the same command again"
        )
    return info.sha, info.siblings or []


def _choose(
    repo_id: str, commit: str, siblings: Sequence["RepoSibling"], layout: Layout | None
) -> Listing:
    """Choose the files of one layout; all lie at the top of the repository."""

    def matching(patterns: Sequence[str]) -> dict[str, HubFile]:
        top = [file for file in siblings if PLAIN_NAME.fullmatch(file.rfilename)]
        wanted = [
            file
            for file in top
            if any(fnmatchcase(file.rfilename, pattern) for pattern in patterns)
        ]
        return {file.rfilename: _hub_file(repo_id, file) for file in wanted}

    for choice in WEIGHTS if layout is None else (layout,):
        pattern, *index = WEIGHTS[choice]
        if weights := matching([pattern]):
            documents = matching([*BESIDE_THE_WEIGHTS, *index])
            if TEKKEN_FILE not in documents:
                documents |= matching([CARD])
            return Listing(commit, choice, documents, weights)
    if layout == "hf" and matching(WEIGHTS["consolidated"]):
        raise HubError(
            f"{repo_id} holds only Mistral's own layout; convert it first: "
            f"python -m magistral_mlx.convert --hf-path {repo_id} --mlx-path OUT"
        )
    wanted = " or ".join(
        WEIGHTS[choice][0] for choice in (WEIGHTS if layout is None else (layout,))
    )
    raise HubError(
        f"{repo_id} holds no {wanted}; it is not a checkpoint this software can use: name one in "
        "safetensors, such as the published Magistral or a conversion of it to MLX"
    )


def _hub_file(repo_id: str, file: "RepoSibling") -> HubFile:
    size, sha256 = (file.size, None) if file.lfs is None else (file.lfs.size, file.lfs.sha256)
    if not isinstance(size, int) or size < 0 or not (sha256 or file.blob_id):
        raise HubError(
            f"{repo_id}: the hub states no size or no hash of {file.rfilename}, so it could not "
            "be checked; if HF_ENDPOINT is set to a mirror, leave it out, or name a folder that "
            "holds the checkpoint"
        )
    return HubFile(file.rfilename, size, sha256, file.blob_id or "")


def unreachable(repo_id: str, error: Exception) -> Unreachable:
    """Make the error for a hub that does not answer."""
    return Unreachable(
        f"{repo_id} cannot be fetched: the hub cannot be reached ({reason(error)}). Connect and "
        "run the same command again, or name a folder that holds the checkpoint"
    )


def explain(
    repo_id: str, revision: str | None, error: Exception, *, name: str | None = None
) -> HubError:
    """Make the error that explains why the hub refused a repository, or a file ``name`` of it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo_id}"
    if isinstance(error, GatedRepoError):
        way = f"is gated: accept its terms at {page}, then log in here with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        way = (
            "is no folder here, and missing or private on the hub: check the spelling, "
            "or log in with `hf auth login`"
        )
    elif name is not None and isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        way = (
            f"no longer has {name} at commit {revision}: see {page}/commits, "
            "and name a commit that is there"
        )
    elif isinstance(error, RevisionNotFoundError):
        way = (
            f"has no revision {revision!r}: take a branch, tag or commit from {page}/commits, "
            "or leave it out"
        )
    elif isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        way = (
            "was refused: it is private, or the token used is not valid; "
            "log in with `hf auth login`"
        )
    else:
        way = (
            f"could not be fetched ({reason(error)}): run the same command again, "
            "files that arrived are kept"
        )
    return HubError(f"{repo_id} {way}; or name a folder that holds the checkpoint")


def reason(error: Exception) -> str:
    """Return an error in a few words, without addresses, which may be signed and so secret."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}".strip()
    return next(
        (line for line in str(error).splitlines() if line.strip()), type(error).__name__
    ).strip()
