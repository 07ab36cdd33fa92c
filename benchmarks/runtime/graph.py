"""What one decode step launches, ours and mlx-lm's: primitives on a CPU, kernels on a GPU, counted, not timed."""

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
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.model import transformer as model
from magistral_mlx.model.kv_cache import KVCache
from magistral_mlx.model.loader import load_model

PROMPT = mx.array([[1, 5, 9, 13]])
NEXT = mx.array([[7]])

# One kernel each on Metal and CUDA; MLX's CPU backend takes them apart into what they are made of. The model's own
# two are compiled calls of the first two, whose insides cannot be replaced once they were traced.
FUSED = {
    "rms_norm": mx.fast,
    "rope": mx.fast,
    "scaled_dot_product_attention": mx.fast,
    "quantize": mx,
    "dequantize": mx,
    "normalize": model,
    "rotate_heads": model,
}
# No kernel: for one position they only look at memory in another way.
VIEWS = {
    "Broadcast",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unflatten",
}

Step = Callable[[], list[mx.array]]  # appends one id; all that this computes, not yet evaluated


@dataclass(frozen=True, slots=True)
class Graph:
    """One decode step, from the id to its logits and the cache, by name of primitive."""

    layers: int
    primitives: Counter[str]  # as the CPU backend runs them
    kernels: Counter[str]  # as a GPU backend launches them

    @property
    def kernels_per_layer(self) -> float:
        """What stands outside the layers is shared out among them."""
        return self.kernels.total() / self.layers


@dataclass(frozen=True, slots=True)
class GraphComparison:
    """The graphs of all contenders on one model."""

    title: str
    graphs: dict[str, Graph]

    def ratios(self, name: str) -> tuple[float, float]:
        """Ours over theirs: primitives on a CPU, kernels on a GPU."""
        ours, theirs = self.graphs[OURS], self.graphs[name]
        return (
            ours.primitives.total() / theirs.primitives.total(),
            ours.kernels.total() / theirs.kernels.total(),
        )

    def as_dict(self) -> dict[str, Any]:
        contenders = {
            name: {
                "cpu_primitives": graph.primitives.total(),
                "gpu_kernels": graph.kernels.total(),
                "gpu_kernels_per_layer": graph.kernels_per_layer,
                "cpu_primitives_by_name": dict(graph.primitives.most_common()),
                "gpu_kernels_by_name": dict(graph.kernels.most_common()),
            }
            for name, graph in self.graphs.items()
        }
        ratios = {name: self.ratios(name) for name in self.graphs if name != OURS}
        return {
            "title": self.title,
            "contenders": contenders,
            "ours_over": {
                name: {"cpu_primitives": cpu, "gpu_kernels": gpu}
                for name, (cpu, gpu) in ratios.items()
            },
        }


def compare_graphs(title: str, folder: Path, *, peer: bool) -> GraphComparison:
    """One step after a short prompt, of the checkpoint in ``folder``."""
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
    kernels = calls + Counter(
        {n: c for n, c in nodes([*outputs, *inputs]).items() if n not in VIEWS}
    )
    return Graph(layers, primitives, kernels)


def nodes(arrays: Sequence[mx.array]) -> Counter[str]:
    """The primitives that ``arrays`` wait for, each once, by name."""
    drawing = io.StringIO()
    mx.export_to_dot(drawing, *arrays)
    return Counter(re.findall(r'\[label ="(\w+)", shape=rectangle\]', drawing.getvalue()))


@contextmanager
def opaque() -> Iterator[tuple[Counter[str], list[mx.array]]]:
    """Within it a fused operation is one call, counted, whose result waits for nothing.

    Gives the calls and what was given to them: the graphs in between hang on that.
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
    transformer = load_model(checkpoint := open_checkpoint(folder)).result()

    cache = KVCache(checkpoint.config, limit=64)
    mx.eval(transformer(PROMPT, cache.layers), cache.arrays)

    def step() -> list[mx.array]:
        return [transformer(NEXT, cache.layers), *cache.arrays]

    return step


def _mlx_lm(folder: Path) -> Step:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as load_theirs

    theirs, _ = load_theirs(folder)
    if mx.default_device().type == mx.DeviceType.cpu:
        theirs.set_dtype(
            mx.float32
        )  # as ours is there; else it would be charged with its casts too
    cache = make_prompt_cache(theirs)
    mx.eval(theirs(PROMPT, cache=cache), [array for layer in cache for array in layer.state])

    def step() -> list[mx.array]:
        logits = theirs(NEXT, cache=cache)
        return [logits, *(array for layer in cache for array in (layer.keys, layer.values))]

    return step
