"""From a published checkpoint to one for MLX: checked and planned before any work, then written all or nothing."""

import logging
import os
from collections.abc import Generator
from pathlib import Path
from tempfile import TemporaryDirectory

from magistral_mlx.checkpoint.folder import resolve
from magistral_mlx.checkpoint.manifest import ReasoningFormat
from magistral_mlx.convert.calibration.choose import make_calibration
from magistral_mlx.convert.methods.auto import check_target
from magistral_mlx.convert.output.export import read_tokenizer, require_export_extra
from magistral_mlx.convert.output.manifest import difference
from magistral_mlx.convert.output.staging import begun_commit, partial_of
from magistral_mlx.convert.output.target import (
    check_apart,
    check_place,
    check_replaceable,
    check_space,
)
from magistral_mlx.convert.pipeline.conversion import Conversion, Summary, stated_with
from magistral_mlx.convert.recipe.layout import make_plan
from magistral_mlx.convert.recipe.options import AUTO, Options
from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.convert.source.source import checked_layout, open_source, warn_of_rounding_twice
from magistral_mlx.errors import ConversionError, OptionError, in_units
from magistral_mlx.streams import Progress

log = logging.getLogger(__name__)

DEFAULTS = Options()


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
    target = Path(
        os.path.abspath(os.path.expanduser(target))
    )  # unlike resolve, it does not follow a link at the end
    check_place(target)
    check_replaceable(target, force=force)
    base_model = None if os.path.isdir(os.path.expanduser(source)) else str(source)
    if base_model is not None and revision is None and not force:
        revision = begun_commit(target, base_model)
    hub = documents = None
    if stream:
        if options.recipe == AUTO:
            raise OptionError(
                "the recipe auto reads all weights before it can decide, and then again, which --stream would fetch "
                "twice; leave one of the two out"
            )
        if base_model is None:
            raise OptionError(
                f"{source} is a folder, all of which is there; --stream is for a hub id"
            )
        documents = TemporaryDirectory(prefix="magistral-")
        hub = HubStream.open(
            base_model, Path(documents.name), revision=revision, layout=wanted_layout
        )
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
    if options.target_bits is not None:
        check_target(plan, options.target_bits, opened, options)
    warn_of_rounding_twice(opened, plan.formats)
    if base_model is not None:
        identity["hub"] = {"id": base_model, "commit": commit}
    tokenizer = calibration = None
    if options.method != "round":
        tokenizer = read_tokenizer(folder, opened.config.vocab_size, options.reasoning_format)
        calibration = make_calibration(options, tokenizer, opened.config, stream=stream)
    stated = stated_with(options, calibration)
    other = difference(target, source=identity, options=stated) if os.path.lexists(target) else ""
    if tokenizer is None and other is not None:
        tokenizer = read_tokenizer(folder, opened.config.vocab_size, options.reasoning_format)
    conversion = Conversion(
        opened,
        tokenizer,
        target,
        options,
        plan,
        identity,
        base_model,
        calibration,
        force=force,
        hash_source=hash_source,
        stream=hub,
        documents=documents,
        is_complete=other is None,
    )
    if other and not force:
        raise ConversionError(
            f"{target} exists, and {other}; name another folder, or replace it with --force"
        )
    if not conversion.is_complete:
        _check_disk(conversion)
    return conversion


def _check_disk(conversion: Conversion) -> None:
    """Raises ConversionError where it has too little room; says where a stream would need much."""
    if 2 * (at_once := conversion.fetched_bytes()) > conversion.source.nbytes:
        log.warning(
            "the tensors of %s lie in such an order that %s of %s will be on the disk at once",
            conversion.base_model,
            in_units(at_once),
            in_units(conversion.source.nbytes),
        )
    there = sum(path.lstat().st_size for path in partial_of(conversion.target).rglob("*"))
    check_space(conversion.target, conversion.needed_bytes() - there)


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
    q_method: str | None = None,
    calibration: str | None = None,
    target_bits: float | None = None,
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
        q_method: ``round`` as ``mx.quantize`` does; ``importance``, scales and biases that lose least of what a
            forward pass weighs; or ``gptq``, by which columns to come make up for each column's error. All in the same
            format and size. None for importance where an affine format of 2 to 5 bits is written, else round. What
            is not affine is rounded by all three.
        calibration: a text file that the forward pass reads; ``self``, the source rounded to 4 bit writes replies to
            questions of ours first, and they are read; the folder of a checkpoint, which writes them instead; None for
            a small input of our own.
        target_bits: bits a weight in all, of the recipe ``auto``.
        recipe: a name of ``recipes.RECIPES``, a file as ``recipe_file.RecipeFile``, or ``auto``: it sets the bits.
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
    options = Options(
        q_bits,
        q_group_size,
        q_mode,
        q_method,
        recipe,
        tokenizer_json,
        reasoning_format,
        calibration,
        target_bits,
    )
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
