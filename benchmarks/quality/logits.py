"""The logits of a checkpoint of any size, a layer at a time, so that it need not fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from magistral_mlx.convert.calibration.forward import EMBEDDING, visit_linears
from magistral_mlx.convert.calibration.statistics import PASS_BLOCK_BYTES
from magistral_mlx.convert.source.source import Source, open_source
from magistral_mlx.errors import NumericsError

ROWS = 256  # positions whose logits are in memory at once: 134 MB


@dataclass(slots=True)
class _Last:
    """A visitor that keeps the inputs ``[B, T, D]`` of lm_head."""

    source: Source
    inputs: mx.array = field(default_factory=lambda: mx.zeros(0))

    def see(self, modules: Sequence[str], x: mx.array) -> None:
        self.inputs = x

    def rows(self, module: str) -> Iterator[tuple[int, mx.array]]:
        return self.source.blocks(f"{module}.weight", PASS_BLOCK_BYTES)


def open_streamed(folder: Path) -> Source:
    """Open a checkpoint, packed or not, whose packed weights are read in float32."""
    return replace(open_source(folder), float_type="float32")


def layers_then_inputs(source: Source, ids: mx.array) -> Iterator[int | mx.array]:
    """Run ids ``[B, T]``: yield the layers done, and last the inputs ``[B, T, D]`` of lm_head.

    Raises:
        NumericsError: an activation is not finite.
    """
    visitor = _Last(source)
    for stage in visit_linears(source, ids, visitor):
        yield stage.layers
    if not mx.isfinite(visitor.inputs).all().item():
        raise NumericsError(
            f"{source.folder}: its logits are not numbers; verify or convert it again"
        )
    yield visitor.inputs


def logits_of(source: Source, inputs: mx.array) -> Iterator[mx.array]:
    """Yield logits ``[n, V]`` float32 of lm_head's inputs ``[N, D]``, ROWS at a time."""
    module = EMBEDDING if source.config.tie_word_embeddings else "lm_head"
    blocks = [rows for _, rows in source.blocks(f"{module}.weight", PASS_BLOCK_BYTES)]
    for start in range(0, len(inputs), ROWS):
        some = inputs[start : start + ROWS]
        logits = mx.concatenate([some @ rows.astype(mx.float32).T for rows in blocks], axis=-1)
        mx.eval(logits)
        yield logits
