"""Read and write the journal of an unfinished conversion: its plan, then each finished file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magistral_mlx.files import is_own_file

JOURNAL = "conversion.jsonl"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read a journal's lines up to the first incomplete one."""
    if not is_own_file(path):
        return []
    try:
        content = path.read_bytes()
    except FileNotFoundError:  # another process has just published the target
        return []
    records: list[dict[str, Any]] = []
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            break
        keys = {"file", "size", "sha256"} if records else {"plan"}
        if (
            not line.endswith(b"\n")
            or not isinstance(record, dict)
            or set(record) - {"errors", "stamps"} != keys
        ):
            break
        records.append(record)
    return records


def journal_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False, sort_keys=True).encode() + b"\n"
