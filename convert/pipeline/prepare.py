"""Check and plan a conversion before any work."""

import logging
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from magistral_mlx.checkpoint.folder import DEMO, SOURCES, resolve
from magistral_mlx.checkpoint.safetensors import Stamp
from magistral_mlx.convert.calibration.choose import WINDOWS, Calibration, make_calibration
from magistral_mlx.convert.calibration.corpus import WINDOW
from magistral_mlx.convert.calibration.traces import ROUNDED
from magistral_mlx.convert.methods.auto import check_target
from magistral_mlx.convert.output.export import require_export_extra
from magistral_mlx.convert.output.manifest import difference
from magistral_mlx.convert.output.staging import begun_commit, partial_of
from magistral_mlx.convert.output.target import (
    check_apart,
    check_place,
    check_replaceable,
    check_space,
    folder_bytes,
)
from magistral_mlx.convert.pipeline.rowwise import LAYERS_AHEAD
from magistral_mlx.convert.recipe.layout import Plan, in_order, make_plan, read_in_order
from magistral_mlx.convert.recipe.named import AUTO
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.convert.source.source import (
    Source,
    open_source,
    warn_of_rounding_twice,
    with_document,
)
from magistral_mlx.errors import ConversionError, OptionError, in_units, named
from magistral_mlx.model.device import check_temporary_folder
from magistral_mlx.tokenizer.agreement import check_before_weights
from magistral_mlx.tokenizer.tekken import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint to convert, and how the manifest identifies it."""

    source: Source
    identity: dict[str, Any]
    hub_id: str | None = None
    stream: HubStream | None = None
    # The stream's documents, which are deleted with this value.
    documents: TemporaryDirectory[str] | None = None

    @property
    def stamps(self) -> dict[str, Stamp]:
        """Size and time of change of the weight files that the identity has no whole hash of."""
        return {
            shard.path.name: shard.stamp
            for shard in self.source.shards
            if shard.stamp is not None and "sha256" not in self.identity["files"][shard.path.name]
        }


@dataclass(frozen=True, slots=True)
class Checked:
    """A conversion that can begin: everything is checked and nothing is written."""

    origin: Origin
    target: Path
    options: ConvertOptions
    plan: Plan  # with the recipe auto: the fewest bits everywhere
    tokenizer: Tokenizer
    calibration: Calibration | None = None  # None: every weight is rounded
    is_complete: bool = False  # the target is there already

    @property
    def recorded_options(self) -> dict[str, Any]:
        """The options as the manifest records them."""
        return _recorded(self.options, self.calibration)

    @property
    def most_tensor_bytes(self) -> int:
        """The most bytes that the written tensors can have."""
        if self.options.target_bits is None:
            return self.plan.tensor_bytes
        return int(self.options.target_bits * self.plan.num_parameters / 8)

    def is_made_at(self, folder: Path) -> bool:
        """Tell whether a folder is the complete result of this conversion."""
        identity = self.origin.identity
        return difference(folder, source=identity, options=self.recorded_options) is None

    def needed_bytes(self) -> int:
        """Estimate the disk space of the conversion, the target included.

        Temporary files count: streamed files, a model that writes the calibration and two saved
        states of a pass. tokenizer.json is up to four times as large as tekken.json.
        """
        source = self.origin.source
        documents = 5 * self.origin.identity["files"]["tekken.json"]["size"] + 2**20
        more = self.most_tensor_bytes - self.plan.tensor_bytes
        needed = self.plan.file_bytes + more + documents + self.fetched_bytes()
        if self.calibration is None:
            return needed
        if (
            self.calibration.self_calibration is not None
            and self.calibration.self_calibration.writer is None
        ):
            needed += make_plan(source.config, source.float_type, ROUNDED).file_bytes
        state = 4 * WINDOWS[self.options.method] * WINDOW * source.config.hidden_size
        return needed + 2 * state

    def fetched_bytes(self) -> int:
        """Return the most bytes of a streamed source that are on the disk at once."""
        if self.origin.stream is None:
            return 0
        source = self.origin.source
        steps = (in_order if self.calibration is None else read_in_order)(source.config)
        if self.options.method == "importance":
            # The pass may be this far ahead of the search.
            steps = [
                [name for near in steps[i : i + 1 + LAYERS_AHEAD] for name in near]
                for i in range(len(steps))
            ]
        return self.origin.stream.peak_bytes(
            [[stored for name in step for _, stored in source.places(name)] for step in steps]
        )


def check_conversion(source: str | Path, target: str | Path, options: ConvertOptions) -> Checked:
    """Check everything that can be checked before work, and plan it.

    Raises:
        MagistralError: as ``convert_checkpoint``.
    """
    if options.tokenizer_json:
        require_export_extra()
    # Unlike resolve, this does not follow a link at the end.
    target = Path(os.path.abspath(os.path.expanduser(target)))
    check_place(target)
    check_replaceable(target, force=options.force)
    origin = _open_origin(source, target, options)
    opened = origin.source
    plan = make_plan(opened.config, opened.float_type, options)
    if options.target_bits is not None:
        check_target(plan, options.target_bits, opened, options)
    warn_of_rounding_twice(opened, plan.formats)
    tokenizer = Tokenizer.of_model(
        opened.folder, opened.config.vocab_size, options.reasoning_format, given=options.tokenizer
    )
    origin = replace(origin, identity=with_document(origin.identity, tokenizer.path))
    calibration = make_calibration(options, tokenizer, opened.config)
    if calibration is not None:
        check_temporary_folder()
    other = _other_target(target, origin, options, calibration)
    if other is None:
        return Checked(origin, target, options, plan, tokenizer, calibration, is_complete=True)
    checked = Checked(origin, target, options, plan, tokenizer, calibration)
    _check_disk(checked)
    return checked


def _open_origin(source: str | Path, target: Path, options: ConvertOptions) -> Origin:
    """Open a folder, or a hub id from the cache or as a stream."""
    is_folder = source == DEMO or os.path.isdir(os.path.expanduser(source))
    hub_id = None if is_folder else str(source)
    revision = options.revision
    if hub_id is not None and revision is None and not options.force:
        revision = begun_commit(target, hub_id)
    if options.stream:
        return _open_stream(source, hub_id, revision, options)
    check = partial(check_before_weights, given=options.tokenizer)
    folder = resolve(source, revision=revision, layout=options.layout, advice=SOURCES, check=check)
    check_apart(folder, target)
    opened = open_source(folder, options.layout)
    return Origin(opened, _with_hub(opened.identity(), hub_id, folder.name), hub_id)


def _open_stream(
    source: str | Path, hub_id: str | None, revision: str | None, options: ConvertOptions
) -> Origin:
    if options.recipe == AUTO:
        raise OptionError(
            "the recipe auto reads all weights twice, so "
            f"{named('stream')} would fetch "
            "them twice; leave one of the two out"
        )
    if hub_id is None:
        raise OptionError(f"{source} is a folder here; {named('stream')} is for a hub id")
    documents = TemporaryDirectory(prefix="magistral-")
    hub = HubStream.open(hub_id, Path(documents.name), revision=revision, layout=options.layout)
    opened = open_source(hub.folder, hub.layout, hub.shards)
    identity = _with_hub(opened.identity(hub.files), hub_id, hub.commit)
    return Origin(opened, identity, hub_id, hub, documents)


def _with_hub(identity: dict[str, Any], hub_id: str | None, commit: str) -> dict[str, Any]:
    return identity if hub_id is None else identity | {"hub": {"id": hub_id, "commit": commit}}


def _recorded(options: ConvertOptions, calibration: Calibration | None) -> dict[str, Any]:
    return options.as_json() | ({} if calibration is None else {"calibration": calibration.entry})


def _other_target(
    target: Path, origin: Origin, options: ConvertOptions, calibration: Calibration | None
) -> str | None:
    """Name the difference of an existing target: None if complete, empty if there is none."""
    if not os.path.lexists(target):
        return ""
    recorded = _recorded(options, calibration)
    other = difference(target, source=origin.identity, options=recorded)
    if other is not None and not options.force:
        raise ConversionError(
            f"{target} exists, and {other}; name another folder, or replace it with "
            f"{named('force')}"
        )
    return other


def _check_disk(checked: Checked) -> None:
    """Check the disk's free space; warn if a stream needs much of the source at once."""
    source = checked.origin.source
    if 2 * (at_once := checked.fetched_bytes()) > source.nbytes:
        log.warning(
            "the tensors of %s lie in such an order that %s of %s will be on the disk at once",
            checked.origin.hub_id,
            in_units(at_once),
            in_units(source.nbytes),
        )
    check_space(checked.target, checked.needed_bytes() - folder_bytes(partial_of(checked.target)))
