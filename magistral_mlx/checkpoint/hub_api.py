"""A repository on the Hugging Face hub: what one commit of it holds, and any bytes of its files."""

import hashlib
import logging
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from magistral_mlx.checkpoint.manifest import MANIFEST
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.errors import HubError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

Layout = Literal["hf", "consolidated"]

BESIDE_THE_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "params.json",
    "tekken.json",
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
PASSING = (408, 429, 500, 502, 503, 504)  # statuses that another try may not meet again
FAILURES_IN_A_ROW = 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


class Unreachable(HubError):
    """No answer of the hub: no network, offline mode, or the hub itself is down."""


class Cancelled(Exception):
    """A transfer ended because its ``cancelled`` said so."""


class HubFile(NamedTuple):
    """A file of a commit, as the hub states it."""

    name: str
    size: int  # bytes
    sha256: (
        str | None
    )  # of the content, stated where the hub keeps it apart from git, as it does weights
    git_sha1: str  # of the content as a git blob; says nothing where ``sha256`` is stated

    @property
    def checksum(self) -> str:
        return self.sha256 or self.git_sha1

    def digest(self) -> "hashlib._Hash":
        """What the content has to be fed to for ``checksum``."""
        if self.sha256 is not None:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)  # git's own definition


class Listing(NamedTuple):
    """The files of one commit that make up a checkpoint."""

    commit: str
    layout: Layout
    documents: Mapping[str, HubFile]  # by name; the index is one
    weights: Mapping[str, HubFile]

    @property
    def files(self) -> dict[str, HubFile]:
        return {**self.documents, **self.weights}


def list_files(repo_id: str, revision: str | None, layout: Layout | None) -> Listing:
    """What a checkpoint consists of, in the commit that ``revision`` stands for now; one request.

    Args:
        repo_id: ``org/name``.
        revision: branch, tag or commit; None for the main branch.
        layout: the weights wanted; None for the HF shards where there are any.
    Raises:
        Unreachable: the hub does not answer.
        HubError: no such repository or revision, or no access to it; no weights in it.
    """
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
        raise _unreachable(repo_id, error) from None
    except (HTTPError, OSError) as error:  # the HTTP library's own; offline mode is an OSError
        raise _unreachable(repo_id, error) from None
    if not info.sha:
        raise HubError(
            f"{repo_id}: the hub does not say which commit it lists; run the same command again"
        )
    return _choose(repo_id, info.sha, info.siblings or [], layout)


def _choose(
    repo_id: str, commit: str, siblings: Sequence["RepoSibling"], layout: Layout | None
) -> Listing:
    """The files of one layout; all lie at the top of the repository."""

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
            return Listing(commit, choice, matching([*BESIDE_THE_WEIGHTS, *index]), weights)
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


def read(
    repo_id: str,
    commit: str,
    file: HubFile,
    begin: int,
    end: int,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[bytes, None, None]:
    """Yield bytes ``begin`` to ``end`` of a file as they arrive; where a transfer breaks off, the next goes on.

    Raises:
        HubError: the hub refuses; or no byte came in several tries.
        Cancelled: ``cancelled``, which is asked before every piece, gave True.
    """
    failures = 0
    while begin < end:
        try:
            with closing(_request(repo_id, commit, file, begin, end)) as pieces:
                for piece in pieces:
                    if cancelled():
                        raise Cancelled
                    yield piece
                    begin, failures = begin + len(piece), 0
        except _BrokenOff as error:
            failures += 1
            if failures > FAILURES_IN_A_ROW:
                raise HubError(
                    f"{repo_id}: {file.name} could not be fetched ({error}); run the same command "
                    "again, what arrived is kept"
                ) from None
            log.info("%s: %s; trying again", file.name, error)
            _pause(max(error.pause_seconds, FIRST_PAUSE_SECONDS * 2 ** (failures - 1)), cancelled)


class _BrokenOff(Exception):
    """A transfer ended early for a reason that may pass."""

    pause_seconds = 0.0  # that the hub asks for


def _request(
    repo_id: str, commit: str, file: HubFile, begin: int, end: int
) -> Generator[bytes, None, None]:
    """As ``read``, in one request; raises _BrokenOff at the latest where fewer bytes come than were asked for."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    # The token is for the hub alone: the session drops it where the hub sends us on to another host.
    headers = build_hf_headers() | {
        "Range": f"bytes={begin}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(repo_id, file.name, revision=commit)
    remaining = end - begin
    options: Any = {
        "headers": headers,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "follow_redirects": True,
    }
    try:
        with get_session().stream("GET", url, **options) as response:
            hf_raise_for_status(response)
            superfluous = (
                begin if response.status_code == 200 else 0
            )  # 200: the whole file, from its first byte
            for received in response.iter_bytes():
                piece = received[superfluous : superfluous + remaining]
                superfluous -= min(superfluous, len(received))
                if piece:
                    remaining -= len(piece)
                    yield piece
                if not remaining:
                    return
    except HfHubHTTPError as error:
        if error.response.status_code not in PASSING:
            raise explain(repo_id, commit, error, name=file.name) from None
        broken = _BrokenOff(reason(error))
        asked = error.response.headers.get("Retry-After", "")
        broken.pause_seconds = (
            min(float(asked), LONGEST_PAUSE_SECONDS) if asked.isdecimal() else 0.0
        )
        raise broken from None
    except HTTPError as error:
        raise _BrokenOff(reason(error)) from None
    except OSError as error:  # offline mode
        raise _unreachable(repo_id, error) from None
    raise _BrokenOff(f"{remaining} bytes did not come")


def _pause(seconds: float, cancelled: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if cancelled():
            raise Cancelled
        time.sleep(min(left, 0.1))


def _unreachable(repo_id: str, error: Exception) -> Unreachable:
    return Unreachable(
        f"{repo_id} cannot be fetched: the hub cannot be reached ({reason(error)}). Connect and "
        "run the same command again, or name a folder that holds the checkpoint"
    )


def explain(
    repo_id: str, revision: str | None, error: Exception, *, name: str | None = None
) -> HubError:
    """What the hub's refusal, of the repository or of a file ``name`` that it listed, means for the user."""
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
        way = "is no folder here, and missing or private on the hub: check the spelling, or log in with `hf auth login`"
    elif name is not None and isinstance(error, RevisionNotFoundError | EntryNotFoundError):
        way = f"no longer has {name} at commit {revision}: see {page}/commits, and name a commit that is there"
    elif isinstance(error, RevisionNotFoundError):
        way = f"has no revision {revision!r}: take a branch, tag or commit from {page}/commits, or leave it out"
    elif isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        way = "was refused: it is private, or the token used is not valid; log in with `hf auth login`"
    else:
        way = f"could not be fetched ({reason(error)}): run the same command again, files that arrived are kept"
    return HubError(f"{repo_id} {way}; or name a folder that holds the checkpoint")


def reason(error: Exception) -> str:
    """An error in a few words, without the addresses of a refusal, which may be signed and so secret."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"{error.response.status_code} {error.response.reason_phrase}".strip()
    return next(
        (line for line in str(error).splitlines() if line.strip()), type(error).__name__
    ).strip()
