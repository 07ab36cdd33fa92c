"""From a published checkpoint to one for MLX: checked and planned before any work, then written all or nothing."""

import errno
import os
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from magistral_mlx.checkpoint import open_checkpoint, resolve
from magistral_mlx.errors import CheckpointError, ConversionError, OptionError
from magistral_mlx.reasoning import ReasoningFormat
from magistral_mlx.release import STATED
from magistral_mlx.tokenizer import Tokenizer

from . import disk
from .export import exports, json_text, make_config, read_tokenizer, require_export_extra
from .parallel import unordered
from .planning import Plan, make_plan
from .provenance import PROVENANCE, difference, entry_of, make_plan_record
from .recipes import Options
from .source import Source, checked_layout, open_source, warn_of_rounding_twice
from .staging import Staging, begun_commit, discard_replaced, partial_of
from .streaming import HubStream
from .target import check_apart, check_replaceable, check_space, free_bytes, in_units
from .weights import Progress, WeightsWork

INDEX = "model.safetensors.index.json"
DEFAULTS = Options()


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion made, or found made."""

    target: Path
    bytes_in: int  # of the source's tensors
    bytes_out: int  # of the tensors written
    bits_per_weight: float
    already_complete: bool


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that can begin: everything checked, nothing written."""

    source: Source
    tokenizer: Tokenizer | None  # None where there is nothing to do
    target: Path
    options: Options
    plan: Plan
    identity: dict[str, Any]  # of the source, as the provenance file keeps it
    base_model: str | None  # the source's hub id
    force: bool = False
    hash_source: bool = False
    stream: HubStream | None = None
    documents: TemporaryDirectory[str] | None = None  # of the stream
    is_complete: bool = False  # the target is there already

    @property
    def summary(self) -> Summary:
        plan = self.plan
        return Summary(self.target, self.source.nbytes, plan.tensor_bytes, plan.bits_per_weight, self.is_complete)

    def run(self) -> Generator[Progress, None, Summary]:
        """Write the target, unless it is complete already; goes on where an earlier run of the same ended.

        Raises:
            ConversionError, CheckpointError: it could not be finished. The target is as it was; what is done
                stays in the folder ``OUT.partial`` beside it.
        """
        if self.is_complete:
            discard_replaced(self.target)
            return self.summary
        try:
            with Staging(self.target, self._record(), is_whole=self._is_whole, force=self.force) as staging:
                if self._is_whole(self.target):  # another process was faster
                    disk.discard(staging.folder)
                    return replace(self.summary, already_complete=True)
                if not staging.is_whole:
                    yield from self._hash_source()
                    documents: dict[str, bytes] = {}
                    yield from self._work(staging, lambda: documents.update(self._documents())).run()
                    self._write_documents(staging, documents)
                    open_checkpoint(staging.folder)
                staging.publish(replace=self.force)
        except OSError as error:
            raise self._explain(error) from error
        return self.summary

    def needed_bytes(self) -> int:
        """Of the whole target, roughly: tokenizer.json is up to four times tekken.json. And of what is streamed."""
        return self.plan.file_bytes + 5 * self.identity["files"]["tekken.json"]["size"] + 2**20 + self._fetched_bytes()

    def _fetched_bytes(self) -> int:
        """Most bytes of a streamed source that are there at once."""
        if self.stream is None:
            return 0
        names = [name for shard in self.plan.shards for name in shard.sources]
        return self.stream.peak_bytes([[stored for _, stored in self.source.places(name)] for name in names])

    def _work(self, staging: Staging, at_last: Callable[[], None]) -> WeightsWork:
        if self.stream is None:
            return WeightsWork(self.source, self.plan, staging, at_last=at_last)
        stream = self.stream.into(staging.fetched)
        shards = tuple(replace(shard, path=staging.fetched / shard.path.name) for shard in self.source.shards)
        return WeightsWork(replace(self.source, shards=shards), self.plan, staging, stream, at_last)

    def _hash_source(self) -> Generator[Progress, None, None]:
        """Hash the weight files whole, where that was asked for, and compare with what the hub states of them."""
        if not self.hash_source or self.stream is not None:  # a stream hashes everything anyway
            return
        jobs = (partial(self._sha256_of, shard.path) for shard in self.source.shards)
        with closing(unordered(jobs)) as hashed:
            for file in hashed:
                yield Progress(0, self.source.nbytes, f"sha256 of {file}")

    def _sha256_of(self, path: Path) -> str:
        digest = disk.sha256_of(path)
        if self.identity["files"][path.name].setdefault("sha256", digest) != digest:
            raise CheckpointError(f"{path} is damaged: its sha256 is not what the hub states; fetch it again")
        return path.name

    def _record(self) -> dict[str, Any]:
        return make_plan_record(source=self.identity, options=self.options.stated())

    def _is_whole(self, folder: Path) -> bool:
        return difference(folder, source=self.identity, options=self.options.stated()) is None

    def _documents(self) -> dict[str, bytes]:
        """Everything beside the weights."""
        source, plan = self.source, self.plan
        config = make_config(source.config, plan.quantization, plan.float_type)
        return {INDEX: json_text(plan.index()).encode()} | exports(
            source.folder,
            config,
            self.tokenizer,
            tokenizer_json=self.options.tokenizer_json,
            base_model=self.base_model,
        )

    def _write_documents(self, staging: Staging, documents: dict[str, bytes]) -> None:
        """The provenance last, since it holds the hashes of the rest."""
        for name, content in documents.items():
            disk.write_file(staging.folder / name, content)
        headers = {shard.file: {"header_sha256": shard.header_sha256} for shard in self.plan.shards}
        files = {name: entry | headers[name] for name, entry in staging.finished.items()}
        files |= {name: entry_of(content) for name, content in documents.items()}
        release = {} if self.tokenizer is None else {STATED: self.tokenizer.reasoning_format}
        provenance = self._record() | release | {"files": dict(sorted(files.items()))}
        disk.write_file(staging.folder / PROVENANCE, json_text(provenance).encode())

    def _explain(self, error: OSError) -> ConversionError:
        again = "the same command then goes on where this ended"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ConversionError(
                f"the disk of {self.target} is full: {in_units(self.needed_bytes())} are needed in all, "
                f"{in_units(free_bytes(self.target))} are free now; free some space, {again}"
            )
        return ConversionError(f"{self.target} could not be written ({error}); check the folder and the disk, {again}")


def prepare(
    source: str | Path,
    target: str | Path,
    options: Options = DEFAULTS,
    *,
    layout: str | None = None,
    revision: str | None = None,
    force: bool = False,
    stream: bool = False,
    hash_source: bool = False,
) -> Conversion:
    """Check everything that can be checked before work, and plan it; arguments as ``convert_checkpoint``."""
    wanted_layout = checked_layout(layout)
    if options.tokenizer_json:
        require_export_extra()
    target = Path(os.path.abspath(os.path.expanduser(target)))  # unlike resolve, it does not follow a link at the end
    check_replaceable(target, force=force)
    base_model = None if os.path.isdir(os.path.expanduser(source)) else str(source)
    if base_model is not None and revision is None and not force:
        revision = begun_commit(target, base_model)
    hub = documents = None
    if stream:
        if base_model is None:
            raise OptionError(f"{source} is a folder, all of which is there; --stream is for a hub id")
        documents = TemporaryDirectory(prefix="magistral-")
        hub = HubStream.open(base_model, Path(documents.name), revision=revision, layout=wanted_layout)
        folder, commit = hub.folder, hub.commit
        opened = open_source(folder, hub.layout, hub.shards)
        identity = opened.identity(hub.files)
    else:
        folder = resolve(source, revision=revision, layout=wanted_layout)
        commit = folder.name
        check_apart(folder, target)
        opened = open_source(folder, wanted_layout)
        identity = opened.identity()
    plan = make_plan(opened.config, opened.float_type, options)
    warn_of_rounding_twice(opened, plan.formats)
    if base_model is not None:
        identity["hub"] = {"id": base_model, "commit": commit}
    other = difference(target, source=identity, options=options.stated()) if os.path.lexists(target) else ""
    tokenizer = None if other is None else read_tokenizer(folder, opened.config.vocab_size, options.reasoning_format)
    conversion = Conversion(
        opened,
        tokenizer,
        target,
        options,
        plan,
        identity,
        base_model,
        force=force,
        hash_source=hash_source,
        stream=hub,
        documents=documents,
        is_complete=other is None,
    )
    if other and not force:
        raise ConversionError(f"{target} exists, and {other}; name another folder, or replace it with --force")
    if not conversion.is_complete:
        there = partial_of(target).rglob("*")
        check_space(target, conversion.needed_bytes() - sum(path.lstat().st_size for path in there))
    return conversion


def converting(
    source: str | Path,
    target: str | Path,
    options: Options = DEFAULTS,
    *,
    layout: str | None = None,
    revision: str | None = None,
    force: bool = False,
    stream: bool = False,
    hash_source: bool = False,
) -> Generator[Progress, None, Summary]:
    """As ``convert_checkpoint``, but a generator: yields its progress and returns the summary."""
    conversion = prepare(
        source,
        target,
        options,
        layout=layout,
        revision=revision,
        force=force,
        stream=stream,
        hash_source=hash_source,
    )
    return (yield from conversion.run())


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    q_method: str = "round",
    recipe: str | None = None,
    layout: str | None = None,
    revision: str | None = None,
    tokenizer_json: bool = True,
    reasoning_format: ReasoningFormat | None = None,
    force: bool = False,
    stream: bool = False,
    hash_source: bool = False,
) -> Summary:
    """Convert a published checkpoint into a quantized one that every MLX runtime loads.

    Args:
        source: a folder with HF shards or Mistral's consolidated file, or a hub id. Packed by MLX already, it is
            dequantized, and rounded once more with a warning.
        target: a folder that does not exist yet. It appears complete or not at all, and grows beside it as
            ``TARGET.partial`` until then. Where it is the complete result of these very arguments already,
            nothing is done.
        q_bits: 2, 3, 4, 5, 6 or 8, or 16 to pack nothing; None for the recipe's, else 4, or the only one of ``q_mode``.
        q_group_size: 32, 64 or 128; None for 64, or the only one of ``q_mode``.
        q_mode: ``affine``, ``mxfp4``, ``nvfp4`` or ``mxfp8``.
        recipe: a name of ``recipes.RECIPES``, or a file as ``recipe_file.RecipeFile``: it sets the bits.
        layout: ``hf`` or ``consolidated`` for a source that has both; None takes the HF shards.
        tokenizer_json: whether to make tokenizer.json, which Swift and LM Studio need; takes the export extra.
        reasoning_format: ``text`` or ``control``, recorded with the checkpoint; None for what the source's files show.
        force: replace a checkpoint that is in the way, and give up an unfinished conversion of another kind.
        stream: fetch a hub id's weight files one at a time, check, convert and delete them, so that they are never
            all on the disk; the hub's cache is left alone.
        hash_source: hash the source's weight files whole, record that, and compare it with what the hub states.
    Raises:
        OptionError: an argument, or a combination, that does not exist.
        CheckpointError, TokenizerError, HubError: the source cannot be used or fetched.
        ConversionError: it cannot start, or could not be finished: then the same call goes on with it.
    """
    options = Options(q_bits, q_group_size, q_mode, q_method, recipe, tokenizer_json, reasoning_format)
    steps = converting(
        source,
        target,
        options,
        layout=layout,
        revision=revision,
        force=force,
        stream=stream,
        hash_source=hash_source,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            summary: Summary = end.value
            return summary
