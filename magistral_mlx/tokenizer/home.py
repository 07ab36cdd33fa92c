"""The folder that a checkpoint's tekken.json is in: its own, a named one, or its base model's."""

import logging
import os
import re
from pathlib import Path

from magistral_mlx.checkpoint.documents import MAX_JSON_BYTES, open_plain, parse_json
from magistral_mlx.checkpoint.folder import DEMO, DEMO_SOURCE
from magistral_mlx.checkpoint.hub_api import CARD, TEKKEN_FILE, is_hub_id
from magistral_mlx.checkpoint.hub_cache import cached_files, fetch_files
from magistral_mlx.errors import CheckpointError, HubError, TokenizerError, named, quoted
from magistral_mlx.files import as_path
from magistral_mlx.tokenizer.tekken_file import MAX_TEKKEN_BYTES

log = logging.getLogger(__name__)

# A base model's prompt counts as well: mlx-lm copies neither file.
FILES = (TEKKEN_FILE, "SYSTEM_PROMPT.txt")
TOKENIZER_CONFIG = "tokenizer_config.json"
BASE_MODEL = "base_model"  # its key in both
# The value of the key in the card's front matter: an id, or a list that begins with one. No two
# repetitions meet, so the time is linear.
BASE_IN_CARD = re.compile(
    r"^base_model:[ \t]*(?:\r?\n[ \t]*-[ \t]*)?(['\"]?)(\S+?)\1[ \t\r]*$", re.M
)
RELEASE = "mistralai/Magistral-Small-2506"


def find_tokenizer(folder: Path, given: str | Path | None = None, *, fetches: bool = True) -> Path:
    """Return the folder whose tekken.json a checkpoint uses.

    It is the ``given`` one, else the checkpoint's own, else that of the base model that its card
    or tokenizer_config.json names. Folders that mlx-lm wrote often have none of their own.

    Args:
        folder: of the checkpoint.
        given: by the user: a folder or hub id that has a tekken.json, or "demo".
        fetches: False to use no network, only the hub's cache.

    Raises:
        TokenizerError: there is none, and no base model is named; or ``given`` has none.
        HubError: it is in no folder or cache here and cannot be fetched.
        OptionError: ``given`` is no name.
    """
    if given is not None:
        return _given_home(given, fetches=fetches)
    if os.path.lexists(folder / TEKKEN_FILE):
        return folder
    base = _base_model(folder)
    if base is None:
        raise TokenizerError(
            f"{folder / TEKKEN_FILE} is missing, and no file beside it names the base model that "
            f"has it; name the folder or hub id that this model was made from, such as "
            f"{named('tokenizer', RELEASE)}"
        )
    try:
        home = _from_hub(base, fetches=fetches)
    except HubError as error:
        raise HubError(
            f"{folder / TEKKEN_FILE} is missing; name a folder that has it by "
            f"{named('tokenizer')}. That of the base model is not here: {error}"
        ) from None
    log.info("%s is missing; that of the base model %s is used", folder / TEKKEN_FILE, base)
    return home


def _given_home(given: str | Path, *, fetches: bool) -> Path:
    folder = Path(os.path.expanduser(as_path(given, "tokenizer")))
    if given == DEMO:
        return DEMO_SOURCE
    if os.path.isdir(folder):
        if os.path.lexists(folder / TEKKEN_FILE):
            return folder
        raise TokenizerError(
            f"{folder} has no {TEKKEN_FILE}; let {named('tokenizer')} name a folder or hub id "
            f"that has one, such as {RELEASE}"
        )
    if isinstance(given, str) and is_hub_id(given) and not os.path.lexists(folder):
        return _from_hub(given, fetches=fetches)
    raise TokenizerError(
        f"{given} is no folder and no hub id; let {named('tokenizer')} name one that has a "
        f"{TEKKEN_FILE}, such as {RELEASE}"
    )


def _from_hub(repo_id: str, *, fetches: bool) -> Path:
    found = cached_files(repo_id, TEKKEN_FILE)
    if found is not None:
        return found
    if not fetches:
        raise HubError(
            f"{repo_id} has it, and nothing is fetched here; load the model once with "
            "`magistral generate`"
        )
    return fetch_files(repo_id, FILES, most_bytes=MAX_TEKKEN_BYTES)


def _base_model(folder: Path) -> str | None:
    """Return the hub id of the base model that the files of a checkpoint name, if any."""
    front_matter = re.match(r"---\r?\n(.*?)\n---", _text(folder / CARD), re.DOTALL)
    found = BASE_IN_CARD.search(front_matter[1]) if front_matter else None
    base: object = found[2] if found else None
    if base is None and (text := _text(folder / TOKENIZER_CONFIG)):
        path = folder / TOKENIZER_CONFIG
        base = parse_json(text.encode(), path).get(BASE_MODEL)
    if base is None:
        return None
    if not isinstance(base, str) or not is_hub_id(base):
        raise CheckpointError(
            f"{folder} names {quoted(base)} as its base model, which is no hub id; name the "
            f"folder or hub id that has its {TEKKEN_FILE}, such as {named('tokenizer', RELEASE)}"
        )
    return base


def _text(path: Path) -> str:
    """Return a small file's text, or "" if there is no such plain file."""
    try:
        with open_plain(path) as file:
            return file.read(MAX_JSON_BYTES).decode(errors="replace")
    except OSError:
        return ""
