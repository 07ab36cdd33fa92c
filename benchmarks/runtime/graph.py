"""The graph of one decode step, ours and mlx-lm's: primitives on a CPU, kernels on a GPU."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.measure import OURS
from benchmarks.runtime.contenders import load_mlx_lm, load_ours
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.model import transformer as model
from magistral_mlx.model.kv_cache import KVCache

PROMPT = mx.array([[1, 5, 9, 13]])
NEXT = mx.array([[7]])

# One kernel each on Metal and CUDA, several primitives on the CPU. The model's own two are compiled
# calls of the first two, whose insides cannot be replaced after tracing.
FUSED = {
    "rms_norm": mx.fast,
    "rope": mx.fast,
    "scaled_dot_product_attention": mx.fast,
    "quantize": mx,
    "dequantize": mx,
    "normalize": model,
    "rotate_heads": model,
}
# These launch no kernel: for one position they only look at memory in another way.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split"}
VIEWS |= {"Squeeze", "Transpose", "Unflatten"}

Step = Callable[[], list[mx.array]]  # appends one id and returns all arrays, not yet evaluated


@dataclass(frozen=True, slots=True)
class Graph:
    """One decode step by names of primitives: on the CPU backend, and kernels on a GPU."""

    layers: int
    primitives: Counter[str]
    kernels: Counter[str]

    @property
    def kernels_per_layer(self) -> float:
        """Kernels over layers, with those outside the layers shared out."""
        return self.kernels.total() / self.layers

    def as_dict(self) -> dict[str, Any]:
        return {
            "cpu_primitives": self.primitives.total(),
            "gpu_kernels": self.kernels.total(),
            "gpu_kernels_per_layer": self.kernels_per_layer,
            "cpu_primitives_by_name": dict(self.primitives.most_common()),
            "gpu_kernels_by_name": dict(self.kernels.most_common()),
        }


@dataclass(frozen=True, slots=True)
class GraphComparison:
    """The graphs of all contenders on one model."""

    title: str
    graphs: dict[str, Graph]

    def ratios(self, name: str) -> tuple[float, float]:
        """Return ours over theirs: primitives on a CPU, kernels on a GPU."""
        ours, theirs = self.graphs[OURS], self.graphs[name]
        return (
            ours.primitives.total() / theirs.primitives.total(),
            ours.kernels.total() / theirs.kernels.total(),
        )

    def as_dict(self) -> dict[str, Any]:
        ratios = {name: self.ratios(name) for name in self.graphs if name != OURS}
        return {
            "title": self.title,
            "contenders": {name: graph.as_dict() for name, graph in self.graphs.items()},
            "ours_over": {
                name: {"cpu_primitives": cpu, "gpu_kernels": gpu}
                for name, (cpu, gpu) in ratios.items()
            },
        }


def compare_graphs(title: str, folder: Path, *, peer: bool) -> GraphComparison:
    """Count one step after a short prompt, of the checkpoint in ``folder``."""
    layers = open_checkpoint(folder).config.num_layers
    graphs = {OURS: graph_of(layers, _ours(folder))}
    if peer:
        graphs["mlx-lm"] = graph_of(layers, _mlx_lm(folder))
    return GraphComparison(title, graphs)


def graph_of(layers: int, step: Step) -> Graph:
    outputs = step()
    primitives = nodes(outputs)
    mx.eval(outputs)
    with opaque() as (calls, inputs):
        outputs = step()
    rest = {n: c for n, c in nodes([*outputs, *inputs]).items() if n not in VIEWS}
    return Graph(layers, primitives, calls + Counter(rest))


def nodes(arrays: Sequence[mx.array]) -> Counter[str]:
    """Count the primitives that ``arrays`` depend on, each once, by name."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *arrays)
    return Counter(re.findall(r'\[label ="(\w+)", shape=rectangle\]', drawing.getvalue()))


@contextmanager
def opaque() -> Iterator[tuple[Counter[str], list[mx.array]]]:
    """Replace each fused operation by a counted call whose result depends on nothing.

    Yields the calls and their inputs, which hold the graphs in between.
    """
    calls: Counter[str] = Counter()
    inputs: list[mx.array] = []

    def counted(name: str, operation: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*values: Any, **options: Any) -> mx.array:
            calls[name] += 1
            inputs.extend(v for v in (*values, *options.values()) if isinstance(v, mx.array))
            shaped = operation(*values, **options)
            several = shaped if isinstance(shaped, list | tuple) else [shaped]
            leaves = [mx.zeros(a.shape, a.dtype) for a in several]
            mx.eval(leaves)
            return leaves if isinstance(shaped, list | tuple) else leaves[0]

        return call

    originals = {name: getattr(owner, name) for name, owner in FUSED.items()}
    try:
        for name, owner in FUSED.items():
            setattr(owner, name, counted(name, originals[name]))
        yield calls, inputs
    finally:
        for name, owner in FUSED.items():
            setattr(owner, name, originals[name])


def _ours(folder: Path) -> Step:
    checkpoint = open_checkpoint(folder)
    transformer, cache = load_ours(checkpoint), KVCache(checkpoint.config, limit=64)
    mx.eval(transformer(PROMPT, cache.layers), cache.arrays)
    return lambda: [transformer(NEXT, cache.layers), *cache.arrays]


def _mlx_lm(folder: Path) -> Step:
    from mlx_lm.models.cache import make_prompt_cache

    # float32 as ours has on a CPU, or its casts would be counted too.
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    theirs = load_mlx_lm(folder, mx.float32 if on_cpu else None)
    cache = make_prompt_cache(theirs)
    mx.eval(theirs(PROMPT, cache=cache), [array for layer in cache for array in layer.state])

    def step() -> list[mx.array]:
        logits = theirs(NEXT, cache=cache)
        return [logits, *(array for layer in cache for array in (layer.keys, layer.values))]

    return step
