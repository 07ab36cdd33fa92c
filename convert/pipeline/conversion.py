"""A conversion that can begin: what is written where, all or nothing."""

import errno
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.manifest import MANIFEST, REASONING_FORMAT, Manifest
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.convert.calibration.choose import WINDOWS, Calibration
from magistral_mlx.convert.calibration.corpus import WINDOW
from magistral_mlx.convert.calibration.forward import EMBEDDING, MeanSquares
from magistral_mlx.convert.calibration.resumable_pass import ResumablePass
from magistral_mlx.convert.calibration.traces import FILE as TRACES
from magistral_mlx.convert.calibration.traces import ROUNDED, Traces
from magistral_mlx.convert.methods.auto import choose_bits
from magistral_mlx.convert.output.export import exports, json_text, make_config
from magistral_mlx.convert.output.manifest import difference, entry_of, make_manifest
from magistral_mlx.convert.output.report import Gain, gain_of, make_report
from magistral_mlx.convert.output.shards import Output
from magistral_mlx.convert.output.staging import Staging, discard_replaced
from magistral_mlx.convert.output.target import free_bytes
from magistral_mlx.convert.pipeline.layerwise import LayerwiseWork
from magistral_mlx.convert.pipeline.rowwise import LAYERS_AHEAD, WeightsWork
from magistral_mlx.convert.recipe.layout import Plan, in_order, make_plan, read_in_order
from magistral_mlx.convert.recipe.options import AUTO, Options
from magistral_mlx.convert.source.hub_stream import HubStream
from magistral_mlx.convert.source.source import Source
from magistral_mlx.convert.threads import unordered
from magistral_mlx.errors import CheckpointError, ConversionError, in_units
from magistral_mlx.files import discard, sha256_of, write_file
from magistral_mlx.streams import Progress
from magistral_mlx.tokenizer.tekken import Tokenizer

HASHES = ("size", "sha256")
SURVEY, PASS = (
    "survey",
    "pass",
)  # folders of stages: of the pass that the recipe auto takes first, and of the other


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion made, or found made."""

    target: Path
    bytes_in: int  # of the source's tensors
    bytes_out: int  # of the tensors written
    bits_per_weight: float
    already_complete: bool
    gain: Gain | None = None  # over rounding, predicted; None where that is what was done


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
    calibration: Calibration | Traces | None = None  # None: every weight is rounded
    statistics: MeanSquares | None = None  # where they are complete
    force: bool = False
    hash_source: bool = False
    stream: HubStream | None = None
    documents: TemporaryDirectory[str] | None = None  # of the stream
    is_complete: bool = False  # the target is there already

    @property
    def stated(self) -> dict[str, Any]:
        """The options as the provenance file keeps them."""
        return stated_with(self.options, self.calibration)

    def _summary(self, *, already: bool) -> Summary:
        """Of the complete target, by its own files."""
        manifest, checkpoint = Manifest.find(self.target), open_checkpoint(self.target)
        nbytes = checkpoint.nbytes
        assert manifest is not None
        gain = gain_of(manifest.raw)
        return Summary(
            self.target,
            self.source.nbytes,
            nbytes,
            nbytes * 8 / self.plan.num_parameters,
            already,
            gain,
        )

    def run(self) -> Generator[Progress, None, Summary]:
        """Write the target, unless it is complete already; goes on where an earlier run of the same ended.

        Raises:
            ConversionError, CheckpointError: it could not be finished. The target is as it was; what is done
                stays in the folder ``OUT.partial`` beside it.
        """
        if self.is_complete:
            discard_replaced(self.target)
            return self._summary(already=True)
        try:
            with Staging(
                self.target, self._record(), is_whole=self._is_whole, force=self.force
            ) as staging:
                if self._is_whole(self.target):  # another process was faster
                    discard(staging.folder)
                    return self._summary(already=True)
                if not staging.is_whole:
                    yield from self._hash_source()
                    documents: dict[str, bytes] = {}
                    ready = yield from self._written(staging)
                    decided = yield from ready._decided(staging)
                    yield from decided._work(
                        staging, lambda: documents.update(decided._documents())
                    ).run()
                    if isinstance(self.calibration, Traces):
                        documents[TRACES] = (staging.traces / TRACES).read_bytes()
                    decided._write_documents(staging, documents)
                    open_checkpoint(staging.folder)
                staging.publish(replace=self.force)
        except OSError as error:
            raise self._explain(error) from error
        return self._summary(already=False)

    def _decided(self, staging: Staging) -> Generator[Progress, None, "Conversion"]:
        """With the bits that the recipe auto gives each matrix."""
        if self.options.recipe != AUTO:
            return self
        assert isinstance(self.calibration, Calibration)
        folder = staging.calibration / SURVEY
        plan, statistics = yield from choose_bits(
            self.source, self.plan, self.options, self.calibration, folder
        )
        return replace(self, plan=plan, statistics=statistics)

    @property
    def most_tensor_bytes(self) -> int:
        """Of the tensors written: more than the plan's where bits are spent later."""
        target_bits = self.options.target_bits
        return (
            self.plan.tensor_bytes
            if target_bits is None
            else int(target_bits * self.plan.num_parameters / 8)
        )

    def needed_bytes(self) -> int:
        """Of the whole target, roughly: tokenizer.json is up to four times tekken.json. And of what is there for a
        while: what is streamed, a model that writes the calibration, and two stages of a pass."""
        documents = 5 * self.identity["files"]["tekken.json"]["size"] + 2**20
        writes = isinstance(self.calibration, Traces) and self.calibration.writer is None
        rounded = (
            make_plan(self.source.config, self.source.float_type, ROUNDED).file_bytes
            if writes
            else 0
        )
        more = self.most_tensor_bytes - self.plan.tensor_bytes
        tokens = 0 if self.calibration is None else WINDOWS[self.options.method] * WINDOW
        stage = 4 * tokens * self.source.config.hidden_size
        return self.plan.file_bytes + more + documents + self.fetched_bytes() + rounded + 2 * stage

    def fetched_bytes(self) -> int:
        """Most bytes of a streamed source that are there at once."""
        if self.stream is None:
            return 0
        steps = (in_order if self.calibration is None else read_in_order)(self.source.config)
        if self.options.method == "importance":  # the pass is so far ahead of the search
            steps = [
                [name for near in steps[i : i + 1 + LAYERS_AHEAD] for name in near]
                for i in range(len(steps))
            ]
        return self.stream.peak_bytes(
            [[stored for n in step for _, stored in self.source.places(n)] for step in steps]
        )

    def _written(self, staging: Staging) -> Generator[Progress, None, "Conversion"]:
        """With the ids to calibrate on, where the model is to write them first."""
        if not isinstance(self.calibration, Traces):
            return self
        traces, path, rounded = (
            self.calibration,
            staging.traces / TRACES,
            staging.traces / "rounded",
        )
        if (ids := traces.ids(traces.read(path))) is None:
            staging.traces.mkdir(exist_ok=True)
            writer = traces.writer
            if writer is None:
                plan = make_plan(self.source.config, self.source.float_type, ROUNDED)
                yield from Conversion(
                    self.source, self.tokenizer, rounded, ROUNDED, plan, self.identity, None
                ).run()
                writer = open_checkpoint(rounded)
            writing = traces.writing(writer, path)
            while ids is None:
                try:
                    yield Progress(0, self.source.nbytes, f"calibration: {next(writing)}")
                except StopIteration as end:
                    ids = end.value
        discard(rounded)
        return replace(self, calibration=Calibration("self", ids, traces.as_json()))

    def _work(self, staging: Staging, at_last: Callable[[], None]) -> WeightsWork | LayerwiseWork:
        source, stream = self.source, None
        if self.stream is not None:
            stream = self.stream.into(staging.fetched)
            shards = tuple(
                replace(shard, path=staging.fetched / shard.path.name) for shard in source.shards
            )
            source = replace(source, shards=shards)
        output = Output(self.plan, staging)
        if self.calibration is None:
            return WeightsWork(source, self.plan, output, stream, at_last)
        assert isinstance(self.calibration, Calibration)
        if self.options.method == "gptq":
            return LayerwiseWork(
                source,
                self.plan,
                output,
                staging.calibration / PASS,
                self.calibration.ids,
                stream=stream,
                at_last=at_last,
            )
        if self.statistics is not None:
            return WeightsWork(source, self.plan, output, stream, at_last, self.statistics)
        statistics = MeanSquares(source)
        staged = ResumablePass(staging.calibration / PASS, source, self.calibration.ids, statistics)
        return WeightsWork(source, self.plan, output, stream, at_last, statistics, staged)

    def _hash_source(self) -> Generator[Progress, None, None]:
        """Hash the weight files whole, where that was asked for, and compare with what the hub states of them."""
        if not self.hash_source or self.stream is not None:  # a stream hashes everything anyway
            return
        jobs = (partial(self._sha256_of, shard.path) for shard in self.source.shards)
        with closing(unordered(jobs)) as hashed:
            for file in hashed:
                yield Progress(0, self.source.nbytes, f"sha256 of {file}")

    def _sha256_of(self, path: Path) -> str:
        digest = sha256_of(path)
        if self.identity["files"][path.name].setdefault("sha256", digest) != digest:
            raise CheckpointError(
                f"{path} is damaged: its sha256 is not what the hub states; fetch it again"
            )
        return path.name

    def _record(self) -> dict[str, Any]:
        return make_manifest(source=self.identity, options=self.stated)

    def _is_whole(self, folder: Path) -> bool:
        return difference(folder, source=self.identity, options=self.stated) is None

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
            write_file(staging.folder / name, content)
        headers = {shard.file: {"header_sha256": shard.header_sha256} for shard in self.plan.shards}
        files = {
            file: {k: staging.finished[file][k] for k in HASHES} | headers[file] for file in headers
        }
        files |= {name: entry_of(content) for name, content in documents.items()}
        release = (
            {} if self.tokenizer is None else {REASONING_FORMAT: self.tokenizer.reasoning_format}
        )
        provenance = (
            self._record()
            | release
            | self._report(staging)
            | {"files": dict(sorted(files.items()))}
        )
        write_file(staging.folder / MANIFEST, json_text(provenance).encode())

    def _report(self, staging: Staging) -> dict[str, Any]:
        if self.calibration is None:
            return {}
        errors: dict[str, list[float]] = {}
        for shard in self.plan.shards:
            errors |= staging.finished[shard.file].get("errors", {})
        without_inputs = () if self.source.config.tie_word_embeddings else (EMBEDDING,)
        ordered = {module: errors[module] for module in self.plan.formats if module in errors}
        return {"report": make_report(self.options.method, ordered, without_inputs)}

    def _explain(self, error: OSError) -> ConversionError:
        again = "the same command then goes on where this ended"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return ConversionError(
                f"the disk of {self.target} is full: {in_units(self.needed_bytes())} are needed in all, "
                f"{in_units(free_bytes(self.target))} are free now; free some space, {again}"
            )
        return ConversionError(
            f"{self.target} could not be written ({error}); check the folder and the disk, {again}"
        )


def stated_with(options: Options, calibration: Calibration | Traces | None) -> dict[str, Any]:
    """Options, and what is calibrated on."""
    return options.as_json() | (
        {} if calibration is None else {"calibration": calibration.as_json()}
    )
