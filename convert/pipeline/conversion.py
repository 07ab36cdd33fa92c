"""Convert a checkpoint: choose the bits, write everything, publish all or nothing."""

from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.manifest import Manifest
from magistral_mlx.convert.calibration.forward import MeanSquares
from magistral_mlx.convert.calibration.resumable_pass import ResumablePass
from magistral_mlx.convert.calibration.traces import FILE as TRACES
from magistral_mlx.convert.calibration.traces import ROUNDED
from magistral_mlx.convert.methods.auto import choose_bits
from magistral_mlx.convert.output.report import Gain, gain_of
from magistral_mlx.convert.output.shards import ShardSet
from magistral_mlx.convert.output.staging import Staging, discard_replaced
from magistral_mlx.convert.pipeline.documents import build_documents, plan_record, write_documents
from magistral_mlx.convert.pipeline.layerwise import LayerwiseConversion
from magistral_mlx.convert.pipeline.prepare import Checked, check_conversion
from magistral_mlx.convert.pipeline.rowwise import RowwiseConversion
from magistral_mlx.convert.recipe.layout import Plan, make_plan
from magistral_mlx.convert.recipe.named import AUTO
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.threads import unordered
from magistral_mlx.disk_space import free_bytes, is_disk_full
from magistral_mlx.errors import CheckpointError, ConversionError, in_units
from magistral_mlx.files import discard, sha256_of
from magistral_mlx.options import takes_two_and_keywords_of
from magistral_mlx.streams import Progress, Stream, streamed

# Folders of saved pass states: the pass that chooses the bits (recipe auto), and the main pass.
SURVEY, PASS = "survey", "pass"


# The share of the weights after which the documents are built beside the rest. Any earlier, the
# tokenizer's files would be in memory during most of the pass.
DOCUMENTS_AT = 0.9


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a conversion, new or found complete."""

    target: Path
    bytes_in: int  # tensors of the source
    bytes_out: int  # tensors of the result
    bits_per_weight: float
    already_complete: bool
    gain: Gain | None = None  # None if every weight was rounded


@dataclass(frozen=True, slots=True)
class Planned:
    """A conversion whose output is fully determined."""

    checked: Checked
    plan: Plan
    ids: mx.array | None  # [B, T], for the forward pass
    statistics: MeanSquares | None  # None until a pass has collected them

    def start(self, staging: Staging) -> RowwiseConversion | LayerwiseConversion:
        """Make the conversion that writes the weights."""
        origin = self.checked.origin
        source, stream = origin.source, None
        if origin.stream is not None:
            stream = origin.stream.into(staging.fetched)
            shards = (replace(s, path=staging.fetched / s.path.name) for s in source.shards)
            source = replace(source, shards=tuple(shards))
        output = ShardSet(self.plan, staging)
        if self.ids is None:
            return RowwiseConversion(source, self.plan, output, stream)
        states = staging.calibration / PASS
        if self.checked.options.method == "gptq":
            return LayerwiseConversion(source, self.plan, output, states, self.ids, stream)
        if self.statistics is not None:
            return RowwiseConversion(source, self.plan, output, stream, self.statistics)
        statistics = MeanSquares(source)
        forward_pass = ResumablePass(states, source, self.ids, statistics)
        return RowwiseConversion(source, self.plan, output, stream, statistics, forward_pass)


@takes_two_and_keywords_of(ConvertOptions)
def convert_checkpoint(source: str | Path, target: str | Path, options: ConvertOptions) -> Summary:
    """Convert a published checkpoint into a quantized one that every MLX runtime loads.

    The keywords are the fields of ``ConvertOptions``.

    Args:
        source: a folder with HF shards or Mistral's consolidated file, or a hub id. A checkpoint
            that MLX packed is dequantized, and rounded once more with a warning.
        target: a folder that does not exist yet. It appears complete or not at all, and grows
            beside it as ``TARGET.partial`` until then. If it is the complete result of these
            arguments already, nothing is done.
        options: choices of the conversion.

    Raises:
        OptionError: an argument, or a combination, does not exist.
        CheckpointError, TokenizerError, HubError: the source cannot be used or fetched.
        ConversionError: it cannot start, or could not be finished. The same call resumes it.
    """
    return run_conversion(check_conversion(source, target, options)).result()


@takes_two_and_keywords_of(ConvertOptions)
def stream_conversion(
    source: str | Path, target: str | Path, options: ConvertOptions
) -> Stream[Progress, Summary]:
    """Convert as ``convert_checkpoint``, as a stream of progress in bytes of the source.

    Everything that can be checked before work is checked by the call itself.
    """
    return run_conversion(check_conversion(source, target, options))


@streamed
def run_conversion(checked: Checked) -> Generator[Progress, None, Summary]:
    """Write the target unless it is complete, resuming an earlier run of the same conversion.

    Raises:
        ConversionError, CheckpointError: it could not be finished. The target is unchanged, and
            the finished part stays in the folder ``TARGET.partial`` beside it.
    """
    target = checked.target
    if checked.is_complete:
        discard_replaced(target)
        return _summarize(checked, target, already=True)
    record = plan_record(checked, checked.origin.identity)
    try:
        with Staging(
            target,
            record,
            is_complete=checked.is_made_at,
            stamps=checked.origin.stamps,
            force=checked.options.force,
        ) as staging:
            if checked.is_made_at(target):  # another process was faster
                discard(staging.folder)
                return _summarize(checked, target, already=True)
            if not staging.awaits_publication:
                yield from _fill(checked, staging)
            summary = _summarize(checked, staging.folder, already=False)
            staging.publish(replace=checked.options.force)
            return summary
    except OSError as error:
        raise _disk_error(checked, error) from error


def _fill(checked: Checked, staging: Staging) -> Generator[Progress, None, None]:
    """Write everything into the partial folder."""
    identity = yield from _hash_source(checked)
    ids = yield from _write_calibration(checked, staging)
    planned = yield from _choose_bits(checked, ids, staging)
    with ThreadPoolExecutor(1, thread_name_prefix="documents") as executor:
        documents: Future[dict[str, bytes]] | None = None
        with closing(planned.start(staging).run()) as steps:
            for progress in steps:
                yield progress
                if documents is None and progress.done >= DOCUMENTS_AT * progress.total:
                    documents = executor.submit(build_documents, checked, planned.plan)
        built = (documents or executor.submit(build_documents, checked, planned.plan)).result()
    calibration = checked.calibration
    if calibration is not None and calibration.self_calibration is not None:
        built[TRACES] = (staging.traces / TRACES).read_bytes()
    write_documents(checked, planned.plan, staging, built, identity)


def _hash_source(checked: Checked) -> Generator[Progress, None, dict[str, Any]]:
    """Return the source's identity, with hashes of its weight files if the options ask for them.

    Raises:
        CheckpointError: a hash differs from the hub's.
    """
    identity, source = checked.origin.identity, checked.origin.source
    # A stream hashes every file anyway.
    if not checked.options.hash_source or checked.origin.stream is not None:
        return identity
    files = dict(identity["files"])
    jobs = (partial(_name_and_sha256, shard.path) for shard in source.shards)
    with closing(unordered(jobs)) as hashed:
        for path, sha256 in hashed:
            if files[path.name].get("sha256", sha256) != sha256:
                raise CheckpointError(
                    f"{path} is damaged: its sha256 differs from the hub's; fetch it again"
                )
            files[path.name] = files[path.name] | {"sha256": sha256}
            yield Progress(0, source.nbytes, f"sha256 of {path.name}")
    return identity | {"files": files}


def _name_and_sha256(path: Path) -> tuple[Path, str]:
    return path, sha256_of(path)


def _write_calibration(
    checked: Checked, staging: Staging
) -> Generator[Progress, None, mx.array | None]:
    """Return the calibration ids; if they are model replies, generate the missing ones first."""
    calibration, source = checked.calibration, checked.origin.source
    if calibration is None or calibration.self_calibration is None:
        return None if calibration is None else calibration.ids
    own, path = calibration.self_calibration, staging.traces / TRACES
    rounded = staging.traces / "rounded"
    ids = own.ids(own.read(path))
    if ids is None:
        staging.traces.mkdir(exist_ok=True)
        writer = own.writer
        if writer is None:
            yield from run_conversion(_rounded(checked, rounded))
            writer = open_checkpoint(rounded)
        replies = Stream(own.write_missing_replies(writer, path))
        for reply in replies:
            yield Progress(0, source.nbytes, f"calibration: {reply}")
        ids = replies.result()
    discard(rounded)
    return ids


def _rounded(checked: Checked, target: Path) -> Checked:
    """Plan the 4-bit conversion of the source that writes its own calibration."""
    origin = replace(checked.origin, hub_id=None)
    plan = make_plan(origin.source.config, origin.source.float_type, ROUNDED)
    return Checked(origin, target, ROUNDED, plan, checked.tokenizer)


def _choose_bits(
    checked: Checked, ids: mx.array | None, staging: Staging
) -> Generator[Progress, None, Planned]:
    """Choose the bits of each matrix; the recipe auto takes a forward pass to choose them."""
    if checked.options.recipe != AUTO:
        return Planned(checked, checked.plan, ids, None)
    assert ids is not None
    source, folder = checked.origin.source, staging.calibration / SURVEY
    plan, statistics = yield from choose_bits(source, checked.plan, checked.options, ids, folder)
    return Planned(checked, plan, ids, statistics)


def _summarize(checked: Checked, folder: Path, *, already: bool) -> Summary:
    """Summarize a complete result from its files."""
    manifest, nbytes = Manifest.find(folder), open_checkpoint(folder).nbytes
    assert manifest is not None
    return Summary(
        checked.target,
        checked.origin.source.nbytes,
        nbytes,
        nbytes * 8 / checked.plan.num_parameters,
        already,
        gain_of(manifest.raw),
    )


def _disk_error(checked: Checked, error: OSError) -> ConversionError:
    target, again = checked.target, "then run the same command to resume"
    if is_disk_full(error):
        return ConversionError(
            f"the disk of {target} is full: {in_units(checked.needed_bytes())} are needed in all, "
            f"{in_units(free_bytes(target))} are free now; free some space, {again}"
        )
    return ConversionError(
        f"{target} could not be written ({error}); check the folder and the disk, {again}"
    )
