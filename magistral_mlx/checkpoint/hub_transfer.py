"""Download a byte range of a hub file; resume a transfer that broke."""

import logging
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.documents import MAX_JSON_BYTES
from magistral_mlx.checkpoint.hub_api import HubFile, explain, reason, unreachable
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.errors import HubError

log = logging.getLogger(__name__)

RETRYABLE_STATUSES = (408, 429, 500, 502, 503, 504)
# First request of a header. A longer one takes a second; those of Magistral are far shorter.
HEAD_BYTES = 2**17
FAILURES_IN_A_ROW = 5
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0


class Cancelled(Exception):
    """Transfer that ended because ``cancelled`` returned True."""


def read(
    repo_id: str,
    commit: str,
    file: HubFile,
    begin: int,
    end: int,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[bytes, None, None]:
    """Yield bytes ``begin`` to ``end`` of a file as they arrive; continue broken transfers.

    Raises:
        HubError: the hub refuses, or no byte came in several tries.
        Cancelled: ``cancelled``, which is called before every piece, returned True.
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
        except _TransferInterrupted as error:
            failures += 1
            if failures > FAILURES_IN_A_ROW:
                raise HubError(
                    f"{repo_id}: {file.name} could not be fetched ({error}); run the same command "
                    "again, what arrived is kept"
                ) from None
            log.info("%s: %s; trying again", file.name, error)
            _pause(max(error.pause_seconds, FIRST_PAUSE_SECONDS * 2 ** (failures - 1)), cancelled)


def fetch_header(repo_id: str, commit: str, file: HubFile, folder: Path) -> Shard:
    """Fetch the header of a weight file that will lie in a folder.

    Args:
        repo_id: ``org/name``.
        commit: of the file.
        file: the weight file.
        folder: where the file will lie.

    Raises:
        HubError: it cannot be fetched.
        CheckpointError: it contradicts itself.
    """
    head = b"".join(read(repo_id, commit, file, 0, min(HEAD_BYTES, file.size)))
    end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < end <= min(file.size, 8 + MAX_JSON_BYTES):
        head += b"".join(read(repo_id, commit, file, len(head), end))
    return Shard.parse(folder / file.name, head, file.size)


class _TransferInterrupted(Exception):
    """Transfer that ended early; another try may succeed.

    The hub may ask for a pause of ``pause_seconds``.
    """

    pause_seconds = 0.0


def _request(
    repo_id: str, commit: str, file: HubFile, begin: int, end: int
) -> Generator[bytes, None, None]:
    """Do one request of ``read``; raise _TransferInterrupted if fewer bytes come."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    # The token is for the hub alone: the session drops it when the hub redirects to another host.
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
            # Status 200: the whole file, from its first byte.
            bytes_to_skip = begin if response.status_code == 200 else 0
            for received in response.iter_bytes():
                piece = received[bytes_to_skip : bytes_to_skip + remaining]
                bytes_to_skip -= min(bytes_to_skip, len(received))
                if piece:
                    remaining -= len(piece)
                    yield piece
                if not remaining:
                    return
    except HfHubHTTPError as error:
        if error.response.status_code not in RETRYABLE_STATUSES:
            raise explain(repo_id, commit, error, name=file.name) from None
        broken = _TransferInterrupted(reason(error))
        asked = error.response.headers.get("Retry-After", "")
        broken.pause_seconds = (
            min(float(asked), LONGEST_PAUSE_SECONDS) if asked.isdecimal() else 0.0
        )
        raise broken from None
    except HTTPError as error:
        raise _TransferInterrupted(reason(error)) from None
    # huggingface_hub raises OSError in offline mode.
    except OSError as error:
        raise unreachable(repo_id, error) from None
    raise _TransferInterrupted(f"{remaining} bytes did not come")


def _pause(seconds: float, cancelled: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if cancelled():
            raise Cancelled
        time.sleep(min(left, 0.1))
