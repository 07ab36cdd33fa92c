"""Small sound checkpoints of every kind, to be damaged, and the rules for refusing them."""

import faulthandler
import json
import re
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import mlx.core as mx

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.errors import CheckpointError, ConversionError, TokenizerError
from magistral_mlx.model.loader import load_model
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.sources import PARAMS, convert_quickly, write_consolidated
from tests.support.tekken import write_tekken
from tests.support.tiny import (
    make_config,
    make_weights,
    quantize_weights,
    raw_config,
    write_checkpoint,
)

Step = Literal["run", "convert", "load"]
# The kinds of checkpoints and the ways to open them.
SOUND: tuple[tuple[str, Step], ...] = (
    ("hf", "run"),
    ("hf", "convert"),
    ("own", "run"),
    ("community", "run"),
    ("native", "convert"),
)
CONFIG = make_config(
    hidden_size=128, intermediate_size=192, head_dim=64, num_layers=2, vocab_size=1300
)
NATIVE = PARAMS | {"hidden_dim": 192, "vocab_size": 1300}
INDEX, OWN = "model.safetensors.index.json", "magistral_mlx.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# Longest message in characters, without the folder's name.
LONGEST_MESSAGE = 1000
# A case that takes longer hangs, even on a busy machine.
HANG_SECONDS = 300
# Memory that a case may take beyond that of opening sound checkpoints.
ALLOWED_BYTES = 200_000_000
REMEDY = re.compile(
    r"\b(fetch|download|convert|move|name|remove|choose|start from|take|copy|put|state|check|use|"
    r"leave|do not trust)\b",
    re.IGNORECASE,
)


def write_kinds(root: Path) -> Path:
    """Write a sound checkpoint of each kind.

    ``hf``: bf16, two shards, an index. ``own``: converted here, to 4 bit. ``community``: 4 bit in
    one file without an index. ``native``: Mistral's own layout with config.json.
    """
    weights = make_weights(CONFIG, mx.bfloat16)
    write_tekken(write_checkpoint(root / "hf", CONFIG, weights), CONFIG.vocab_size)
    (root / "hf" / "SYSTEM_PROMPT.txt").write_text("Think first: <think>\n</think>\n\nProblem:\n\n")
    convert_quickly(root / "hf", root / "own", q_bits=4, q_group_size=32)
    packed, block = quantize_weights(weights, QuantFormat(4, 32))
    write_checkpoint(root / "community", CONFIG, {}, block)
    for path in (root / "community").glob("model*"):
        path.unlink()
    mx.save_safetensors(str(root / "community" / "model.safetensors"), packed, {"format": "mlx"})
    shutil.copy(root / "hf" / "tekken.json", root / "community")
    write_consolidated(root / "native", weights, **NATIVE)
    shutil.copy(root / "hf" / "tekken.json", root / "native")
    (root / "native" / "config.json").write_text(json.dumps(raw_config(CONFIG)))
    return root


def take(step: Step, folder: Path) -> None:
    """Open a checkpoint as a command would."""
    if step == "convert":
        Tokenizer.of_model(folder, open_source(folder).config.vocab_size)
        return
    checkpoint = open_checkpoint(folder)
    Tokenizer.from_folder(folder)
    if step == "load":
        load_model(checkpoint).result()


def faults_of(error: BaseException, folder: Path) -> list[str]:
    """List the reasons why a user cannot act on an error; empty if there are none."""
    message = str(error)
    claims: Mapping[str, bool] = {
        "is not of a kind meant for a checkpoint": type(error)
        in (CheckpointError, ConversionError, TokenizerError),
        "does not name the file": str(folder) in message,
        "names no remedy": REMEDY.search(message.replace(str(folder), "")) is not None,
        "is over one line": "\n" not in message and message.isprintable(),
        "is too long": len(message) <= LONGEST_MESSAGE + len(str(folder)),
    }
    return [claim for claim, holds in claims.items() if not holds]


class Watch:
    """Ends the process if a case hangs, and measures the peak of memory since it was made."""

    def __init__(self) -> None:
        self._before = _peak_bytes()

    @contextmanager
    def case(self) -> Iterator[None]:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def figures(self) -> dict[str, float]:
        return {"growth_bytes": _peak_bytes() - self._before}


def _peak_bytes() -> int:
    """Return the peak of this process; on Linux ru_maxrss would count its parent before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
