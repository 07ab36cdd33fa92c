"""Primitives and kernels of one decode step, and how they are counted."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from benchmarks.__main__ import main
from benchmarks.measure import OURS
from benchmarks.runtime.graph import compare_graphs, nodes, opaque
from benchmarks.synthetic import NARROW, write_slice


def test_primitives_are_counted_once_and_leaves_not_at_all() -> None:
    x = mx.ones((2, 3))
    mx.eval(x)
    assert nodes([x]) == {}
    doubled = x + x
    assert nodes([mx.exp(doubled), mx.sin(doubled), doubled]) == {"Add": 1, "Exp": 1, "Sin": 1}


def test_a_fused_call_is_one_kernel_and_what_leads_to_it_is_counted() -> None:
    x, weight = mx.zeros((2, 64)), mx.ones(64)
    mx.eval(x, weight)
    with opaque() as (calls, inputs):
        y = mx.fast.rms_norm(mx.exp(x), weight, 1e-5) * 2
        codes, _, _ = mx.quantize(mx.sin(x))
    assert (y.shape, codes.shape) == ((2, 64), (2, 8))
    assert calls == {"rms_norm": 1, "quantize": 1}
    counted = nodes([y, *inputs])
    assert {name: counted[name] for name in ("Exp", "Sin", "Multiply", "Rsqrt")} == {
        "Exp": 1,
        "Sin": 1,
        "Multiply": 1,
        "Rsqrt": 0,
    }


@pytest.mark.slow
def test_a_decode_step_has_at_most_three_quarters_of_mlx_lms(tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm")
    write_slice(tmp_path, replace(NARROW, num_layers=40))
    comparison = compare_graphs("40 layers", tmp_path, peer=True)
    primitives, kernels = comparison.ratios("mlx-lm")
    assert primitives <= 0.5
    assert kernels <= 0.75
    graph = comparison.graphs[OURS]
    # A layer: 2 norms, 4 matmuls, 1 rotation, 1 write, 1 attention, SwiGLU, 2 sums. Besides: the
    # embedding's rows, scales and biases, their dequantization, the last norm, the head.
    assert graph.kernels.total() == 40 * 12 + 6
    assert (
        graph.kernels["SliceUpdate"],
        graph.kernels["rotate_heads"],
        graph.kernels["QuantizedMatmul"],
    ) == (40, 40, 161)


def test_the_command_writes_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "graph.json"
    assert main(["graph", "--layers", "1", "--json", str(file)]) == 0
    (graph,) = json.loads(file.read_text())["graph"]
    assert graph["contenders"][OURS]["gpu_kernels"] == 12 + 6
    assert "18" in capsys.readouterr().out
