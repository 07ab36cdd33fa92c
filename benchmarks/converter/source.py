"""A checkpoint as Mistral publishes it, of any shape, with random values: written as fast as the disk takes it."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic import raw_config
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import Shape
from magistral_mlx.tokenizer.messages import CARD_SYSTEM_PROMPT
from magistral_mlx.tokenizer.release import SYSTEM_PROMPT_FILE

SHARD_BYTES = 5 * 10**9  # of the published checkpoint: 40 layers make ten files
POOL_VALUES = 2**24 + 43  # prime: no tensor or row is the copy of another
SCALE = 0.02  # of a matrix's entries
ITEMSIZE = 2  # bytes of a bf16


class Pool:
    """Normally distributed bf16 values, 34 MB of them, repeated without end."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._values = np.empty(POOL_VALUES, np.uint16)
        for start in range(0, POOL_VALUES, 2**20):
            part = self._values[start : start + 2**20]
            part[:] = to_bf16(SCALE * rng.standard_normal(len(part), np.float32))
        self._next = 0

    def take(self, count: int) -> Iterator[NDArray[np.uint16]]:
        """The next ``count`` values, in pieces."""
        while count:
            piece = self._values[self._next : self._next + count]
            self._next = (self._next + len(piece)) % POOL_VALUES
            count -= len(piece)
            yield piece


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper half of each float32: its bf16, cut off rather than rounded."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def source_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors in bf16."""
    return ITEMSIZE * sum(math.prod(shape) for shape in config.shapes.values())


def write_source(
    folder: Path,
    config: ModelConfig,
    *,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Write bf16 shards with their index, config.json, tekken.json of 2506's kind and SYSTEM_PROMPT.txt.

    Whatever the size, memory holds the pool of values alone. ``folder`` must not exist; it appears whole or not
    at all.
    """
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    try:
        shards = _divide(config, shard_bytes)
        pool, norms = Pool(seed), np.random.default_rng(seed + 1)
        weight_map: dict[str, str] = {}
        for number, shapes in enumerate(shards, start=1):
            file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            with (partial / file_name).open("wb", buffering=0) as file:
                _write_shard(file, shapes, pool, norms)
            weight_map |= dict.fromkeys(shapes, file_name)
            report(f"wrote {file_name}, {number} of {len(shards)}")
        index = {"metadata": {"total_size": source_bytes(config)}, "weight_map": weight_map}
        (partial / "model.safetensors.index.json").write_text(json.dumps(index))
        (partial / "config.json").write_text(json.dumps(raw_config(config)))
        _write_tokenizer(partial, config.vocab_size)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _divide(config: ModelConfig, shard_bytes: int) -> list[dict[str, Shape]]:
    """The tensors in order, in as few files as hold ``shard_bytes`` at most."""
    shards: list[dict[str, Shape]] = []
    room = 0
    for name, shape in config.shapes.items():
        room -= ITEMSIZE * math.prod(shape)
        if room < 0:
            shards.append({})
            room = shard_bytes - ITEMSIZE * math.prod(shape)
        shards[-1][name] = shape
    return shards


def _write_shard(
    file: BinaryIO, shapes: dict[str, Shape], pool: Pool, norms: np.random.Generator
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + ITEMSIZE * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    _write(file, len(text).to_bytes(8, "little") + text)
    for shape in shapes.values():
        if len(shape) == 1:
            _write(file, to_bf16(1 + 0.1 * norms.standard_normal(shape, np.float32)).data)
            continue
        for piece in pool.take(math.prod(shape)):
            _write(file, piece.data)


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """All of it: a single write may take less."""
    unwritten = memoryview(data).cast("B")
    while unwritten:
        unwritten = unwritten[file.write(unwritten) :]


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tests.support.tekken import write_tekken  # it imports mistral_common

    write_tekken(folder, vocab_size)
    (folder / SYSTEM_PROMPT_FILE).write_text(CARD_SYSTEM_PROMPT)
