"""Check a converted checkpoint: its files, numbers and two tokenizers, and its source if given."""

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import (
    DEMO,
    SOURCES,
    Checkpoint,
    Layout,
    open_checkpoint,
    resolve,
)
from magistral_mlx.checkpoint.hub_api import TEKKEN_FILE
from magistral_mlx.checkpoint.manifest import Manifest
from magistral_mlx.convert.output.manifest import first_difference
from magistral_mlx.convert.source.consolidated import CONSOLIDATED
from magistral_mlx.convert.source.source import Source, open_source, with_document
from magistral_mlx.convert.verification.checks import (
    Check,
    check_config,
    check_files,
    check_finite,
    float_tensors,
    nbytes_of,
    read_manifest,
    verdict,
)
from magistral_mlx.convert.verification.fidelity import TensorError, measure_errors
from magistral_mlx.convert.verification.parity import (
    CHATS,
    NUM_TEXTS,
    TEMPLATE,
    TOKENIZER_JSON,
    read_tokenizer_json,
    require_parsers,
    template_fault,
    tokenizer_fault,
)
from magistral_mlx.demo import demo_checkpoint
from magistral_mlx.errors import CheckpointError, TokenizerError
from magistral_mlx.files import sha256_of
from magistral_mlx.streams import Progress, Stream, streamed
from magistral_mlx.tokenizer.tekken import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Report:
    """The outcome of all checks; ``tensors``, worst first, is empty without a source."""

    target: Path
    checks: tuple[Check, ...]
    tensors: tuple[TensorError, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed is not False for check in self.checks)


def verify_checkpoint(target: str | Path, source: str | Path | None = None) -> Report:
    """Check a converted checkpoint.

    Args:
        target: its folder, or "demo" for the embedded model in 4 bit.
        source: the folder or hub id that it was made from, to compare every tensor with.

    Raises:
        CheckpointError, HubError: ``target`` is no folder, or ``source`` cannot be used or fetched.
            The report names every fault inside ``target``.
        ConversionError: the library that reads tokenizer.json is not installed.
    """
    return stream_verification(target, source).result()


@streamed
def stream_verification(
    target: str | Path, source: str | Path | None = None
) -> Generator[Progress, None, Report]:
    """Check as ``verify_checkpoint``, as a stream of progress in bytes read."""
    folder = demo_checkpoint() if target == DEMO else Path(os.path.expanduser(target))
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is no folder; name one that holds a converted checkpoint")
    if (folder / TOKENIZER_JSON).exists():
        require_parsers()
    manifest, not_recorded = _tried(lambda: read_manifest(folder))
    original = None if source is None else _open_source(source, manifest)
    checkpoint, not_opened = _tried(lambda: open_checkpoint(folder, compares_manifest=False))
    checks: list[Check] = []
    tensors: list[TensorError] = []
    done, total = 0, 0 if manifest is None else manifest.nbytes
    if checkpoint is not None:
        total += nbytes_of(checkpoint, float_tensors(checkpoint)) + (
            0 if original is None else original.nbytes
        )

    def counted(steps: Generator[tuple[int, str], None, T]) -> Generator[Progress, None, T]:
        nonlocal done
        stream = Stream(steps)
        for nbytes, name in stream:
            done += nbytes
            yield Progress(done, total, name)
        return stream.result()

    if manifest is None:
        checks.append(Check("files", False, not_recorded))
    else:
        checks.append((yield from counted(check_files(folder, manifest))))
    if checkpoint is None:
        checks.append(Check("tensors", False, not_opened))
    else:
        count = sum(len(shard.header) for shard in checkpoint.shards)
        checks.append(
            Check("tensors", True, f"{count} have the names, shapes and types config.json implies")
        )
        checks.append(check_config(checkpoint))
        checks.append((yield from counted(check_finite(checkpoint))))
    yield Progress(done, total, TOKENIZER_JSON)
    checks += _check_texts(
        folder, manifest, None if checkpoint is None else checkpoint.config.vocab_size
    )
    if original is not None and checkpoint is not None:
        checks.append(_check_source(checkpoint, original, manifest))
        if checkpoint.config.shapes == original.config.shapes:
            # GPTQ's bound is the widest.
            method = "gptq" if manifest is None else str(manifest.options["q_method"])
            tensors = yield from counted(measure_errors(checkpoint, original, method))
            checks.append(_check_rounding(tensors, method))
    return Report(folder, tuple(checks), tuple(tensors))


def _tried(read: Callable[[], T]) -> tuple[T | None, str]:
    """Return the result of ``read`` and an empty text, or None and its error."""
    try:
        return read(), ""
    except CheckpointError as error:
        return None, str(error)


def _open_source(source: str | Path, manifest: Manifest | None) -> Source:
    """Open the source in the recorded commit and layout."""
    recorded = {} if manifest is None else manifest.source
    layout: Layout | None = "consolidated" if recorded.get("layout") == "consolidated" else None
    hub = recorded.get("hub")
    revision = None
    if (
        isinstance(hub, dict)
        and hub.get("id") == str(source)
        and not os.path.isdir(os.path.expanduser(source))
    ):
        revision = hub.get("commit")
    folder = resolve(source, revision=revision, layout=layout, advice=SOURCES)
    return open_source(folder, layout if (folder / CONSOLIDATED).is_file() else None)


def _check_texts(folder: Path, manifest: Manifest | None, vocab_size: int | None) -> list[Check]:
    """Compare both tokenizers, and the template with mistral-common."""
    if (
        manifest is not None
        and manifest.options.get("tokenizer_json") is False
        and not (folder / TOKENIZER_JSON).exists()
    ):
        left_out = f"nothing to compare: {TOKENIZER_JSON} was left out on purpose"
        return [Check(name, None, left_out) for name in ("tokenizer", "template")]
    try:
        tokenizer, backend = Tokenizer.from_folder(folder), read_tokenizer_json(folder)
        faults = [] if (fault := tokenizer_fault(tokenizer, backend)) is None else [fault]
        if vocab_size not in (None, tokenizer.vocab_size):
            faults.append(f"{TEKKEN_FILE} has {tokenizer.vocab_size} ids, the model {vocab_size}")
    except (TokenizerError, CheckpointError) as error:
        return [Check(name, False, str(error)) for name in ("tokenizer", "template")]
    holds = f"vocabulary and {NUM_TEXTS:,} random texts encode as in {TEKKEN_FILE}"
    checks = [verdict("tokenizer", faults, holds)]
    try:
        fault = template_fault(folder, tokenizer, backend)
    except CheckpointError as error:
        fault = str(error)
    holds = f"{TEMPLATE} encodes {len(CHATS)} chats as mistral-common does"
    return [*checks, verdict("template", [] if fault is None else [fault], holds)]


def _check_source(checkpoint: Checkpoint, source: Source, manifest: Manifest | None) -> Check:
    """Check that the source is the recorded one and has the same config."""
    faults = []
    if manifest is not None:
        # A folder has no hub id.
        recorded = {key: value for key, value in manifest.source.items() if key != "hub"}
        identity = source.identity()
        # A tekken.json from elsewhere is compared with the manifest, not with the source.
        if TEKKEN_FILE not in identity["files"] and (checkpoint.folder / TEKKEN_FILE).is_file():
            identity = with_document(identity, checkpoint.folder / TEKKEN_FILE)
        if (key := first_difference(recorded, identity)) is not None:
            faults.append(f"it was made from another source: {key}")
    faults += [
        f"{field.name} is {getattr(checkpoint.config, field.name)}, "
        f"the source's {getattr(source.config, field.name)}"
        for field in fields(ModelConfig)
        if field.name != "quantization"
        and getattr(checkpoint.config, field.name) != getattr(source.config, field.name)
    ]
    ours, theirs = checkpoint.folder / TEKKEN_FILE, source.folder / TEKKEN_FILE
    if ours.is_file() and theirs.is_file() and sha256_of(ours) != sha256_of(theirs):
        faults.append(f"{TEKKEN_FILE} is not the source's")
    return verdict("source", faults, f"{source.folder} is what this was made from")


def _check_rounding(tensors: list[TensorError], method: str) -> Check:
    cause = {"round": "rounding", "importance": "the search", "gptq": "GPTQ"}[method]
    faults = [
        f"tensor {tensor.name!r} is off by {tensor.largest:.3g}, "
        f"{tensor.of_bound:.3g} times what {cause} explains "
        f"(relative error {tensor.relative:.3g})"
        for tensor in tensors
        if not tensor.is_explained
    ]
    worst = max(tensors, key=lambda tensor: tensor.relative)
    holds = f"{len(tensors)} tensors are within the bound of {cause}; worst {worst.relative:.4f}"
    return verdict("rounding", faults, holds)
