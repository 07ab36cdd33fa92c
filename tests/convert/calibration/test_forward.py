"""The streamed pass against float64, against the whole model, and against itself resumed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.calibration import forward as calibrate
from magistral_mlx.convert.calibration.forward import MeanSquares, PassState, visit_linears
from magistral_mlx.convert.calibration.statistics import (
    from_file,
    hessian,
    mean_squares,
    outlier_ratio,
    runs,
    to_bytes,
)
from magistral_mlx.convert.methods.sequential import Parts, Sequential
from magistral_mlx.convert.packing import dequantize
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.errors import CheckpointError, NumericsError
from magistral_mlx.model.transformer import Transformer
from tests.support import reference, sources
from tests.support.tiny import fill, make_config, make_weights

Write = Callable[..., Path]
IDS = np.random.default_rng(0).integers(3, 320, size=(3, 19))
CONFIGS = {
    "d=32": make_config(),
    "tied": make_config(tie_word_embeddings=True, num_layers=2),
    "D=192, d=80": make_config(
        hidden_size=192, intermediate_size=320, head_dim=80, num_kv_heads=1, num_layers=2
    ),
}


def squares_of(folder: Path, ids: np.ndarray = IDS) -> dict[str, mx.array]:
    visitor = MeanSquares(open_source(folder))
    for _ in visit_linears(visitor.source, mx.array(ids), visitor):
        pass
    return visitor.squares


def inputs_in_float64(
    weights: dict[str, mx.array], config: ModelConfig
) -> dict[str, reference.Array]:
    """Return the input of each linear, ``[tokens of all sequences, columns]``."""
    floats = {name: np.array(weight.astype(mx.float32)) for name, weight in weights.items()}
    found: list[dict[str, reference.Array]] = []
    for ids in IDS:
        found.append({})
        reference.forward(floats, config, list(ids), found[-1])
    return {name: np.concatenate([inputs[name] for inputs in found]) for name in found[0]}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_mean_squares_are_those_in_float64(config: ModelConfig, checkpoint_folder: Write) -> None:
    weights = make_weights(config, mx.bfloat16)
    found = squares_of(checkpoint_folder(config, weights))
    # A separate embedding has no inputs.
    if not config.tie_word_embeddings:
        del found["model.embed_tokens"]
    wanted = {name: np.mean(x**2, axis=0) for name, x in inputs_in_float64(weights, config).items()}
    assert found.keys() == wanted.keys()
    for name, squares in wanted.items():
        assert found[name].dtype == mx.float32
        assert np.allclose(np.array(found[name]), squares, rtol=1e-5, atol=1e-5 * squares.mean()), (
            name
        )


def test_embedding_columns_weigh_by_their_effect_on_the_first_layer(
    checkpoint_folder: Write,
) -> None:
    config = make_config(num_layers=2)
    weights = make_weights(config, mx.bfloat16)
    found = squares_of(checkpoint_folder(config, weights))["model.embed_tokens"]
    w = {name: np.array(weight.astype(mx.float32), np.float64) for name, weight in weights.items()}
    expected = np.zeros(64)
    for norm, linears in (
        ("input", ("self_attn.q", "self_attn.k", "self_attn.v")),
        ("post_attention", ("mlp.gate", "mlp.up")),
    ):
        # Errors of one column each.
        errors = np.eye(64) * w[f"model.layers.0.{norm}_layernorm.weight"]
        for linear in linears:
            expected += np.square(errors @ w[f"model.layers.0.{linear}_proj.weight"].T).sum(axis=1)
    assert np.allclose(np.array(found), expected, rtol=1e-5)


class Recorder(nn.Module):
    def __init__(self, inner: nn.Module, seen: list[mx.array]) -> None:
        super().__init__()
        self.inner, self._seen = inner, seen

    def __call__(self, x: mx.array) -> mx.array:
        self._seen.append(x)
        return self.inner(x)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_mean_squares_are_those_of_the_whole_model(
    config: ModelConfig, checkpoint_folder: Write
) -> None:
    weights = make_weights(config, mx.bfloat16)
    found = squares_of(checkpoint_folder(config, weights))
    model = fill(
        Transformer(config), config, {name: w.astype(mx.float32) for name, w in weights.items()}
    )
    seen: dict[str, list[mx.array]] = {}
    for i, layer in enumerate(model.layers):
        for part, joint, names in (
            (layer.self_attn, "qkv_proj", "qkv"),
            (layer.mlp, "gate_up_proj", ("gate", "up")),
        ):
            inside = "self_attn" if joint == "qkv_proj" else "mlp"
            inputs: list[mx.array] = []
            part[joint] = Recorder(part[joint], inputs)
            seen |= {f"model.layers.{i}.{inside}.{name}_proj": inputs for name in names}
        for part, inside, name in (
            (layer.self_attn, "self_attn", "o_proj"),
            (layer.mlp, "mlp", "down_proj"),
        ):
            seen[f"model.layers.{i}.{inside}.{name}"] = inputs = []
            part[name] = Recorder(part[name], inputs)
    hidden = model.norm(model.hidden(mx.array(IDS)))
    seen["model.embed_tokens" if config.tie_word_embeddings else "lm_head"] = [hidden]
    assert found.keys() == seen.keys() | {"model.embed_tokens"}
    for name, (x,) in seen.items():
        squares = np.array(mx.square(x).mean(axis=(0, 1)))
        assert np.allclose(np.array(found[name]), squares, rtol=1e-5, atol=1e-5 * squares.mean()), (
            name
        )


@pytest.mark.slow
def test_both_layouts_and_every_block_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = IDS % sources.CONFIG.vocab_size
    plain = squares_of(sources.write_hf(tmp_path / "hf"), ids)
    monkeypatch.setattr(calibrate, "PASS_BLOCK_BYTES", 20_000)
    native = squares_of(sources.write_consolidated(tmp_path / "native"), ids)
    assert plain.keys() == native.keys()
    for name, squares in plain.items():
        assert np.allclose(np.array(native[name]), np.array(squares), rtol=1e-5, atol=0), name


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_pass_resumes_from_a_state_to_the_same_bits(
    layers: int, checkpoint_folder: Write, tmp_path: Path
) -> None:
    source = open_source(checkpoint_folder(make_config()))
    whole = MeanSquares(source)
    stages = list(visit_linears(source, mx.array(IDS), whole))
    assert [stage.layers for stage in stages] == [0, 1, 2, 3]
    (tmp_path / "stage").write_bytes(to_bytes({"stream": stages[layers].stream}))
    rest = MeanSquares(source)
    resumed = list(
        visit_linears(
            source, mx.array(IDS), rest, PassState(layers, from_file(tmp_path / "stage")["stream"])
        )
    )
    assert [stage.layers for stage in resumed] == list(range(layers + 1, 4))
    done = {
        name
        for name in whole.squares
        if any(name.startswith(f"model.layers.{i}.") for i in range(layers))
    }
    done.add("model.embed_tokens")
    assert rest.squares.keys() == whole.squares.keys() - done
    assert all(
        mx.array_equal(squares, whole.squares[name]) for name, squares in rest.squares.items()
    )


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj"])
def test_inputs_that_are_not_finite_name_the_linear_they_reach(
    name: str, checkpoint_folder: Write
) -> None:
    config = make_config()
    weights = make_weights(config, mx.bfloat16)
    weights[f"{name}.weight"] = mx.full(weights[f"{name}.weight"].shape, 3e38, mx.bfloat16)
    reached = {"model.layers.1.mlp.up_proj": r"model\.layers\.1\.mlp\.down_proj"}.get(
        name, r"model\.layers\.2\.mlp\.gate_proj and model\.layers\.2\.mlp\.up_proj"
    )
    with pytest.raises(NumericsError, match=f"input of {reached} holds NaN or infinity"):
        squares_of(checkpoint_folder(config, weights))


@pytest.mark.parametrize("cuts", [([7, 3], [10]), ([1, 4, 5], [4, 4, 2]), ([10], [10])])
def test_gate_and_up_meet_row_by_row_however_they_are_cut(
    cuts: tuple[list[int], list[int]],
) -> None:
    def blocks(weight: np.ndarray, lengths: list[int]) -> Iterator[tuple[int, mx.array]]:
        ends = np.cumsum(lengths)
        return (
            (int(end) - n, mx.array(weight[end - n : end]))
            for n, end in zip(lengths, ends, strict=True)
        )

    one, other = np.arange(30).reshape(10, 3), np.arange(30, 60).reshape(10, 3)
    pairs = list(calibrate._side_by_side(blocks(one, cuts[0]), blocks(other, cuts[1])))
    for i, whole in enumerate((one, other)):
        assert np.array_equal(np.concatenate([np.array(pair[i]) for pair in pairs]), whole)
    assert all(len(a) == len(b) > 0 for a, b in pairs)


def test_hessians_are_the_mean_products_of_inputs() -> None:
    x = np.random.default_rng(1).normal(size=(3, 7, 10))
    flat = x.reshape(-1, 10)
    found = hessian(mx.array(x.astype(np.float32)), slice(2, 9))
    assert np.allclose(np.array(found), (flat.T @ flat / 21)[2:9, 2:9], atol=1e-6)
    squares = mean_squares(["x"], mx.array(x.astype(np.float32)))
    assert np.allclose(np.array(squares), (flat**2).mean(axis=0), atol=1e-6)
    assert outlier_ratio(mx.array([1.0, 1.0, 10.0])) == pytest.approx(2.5)
    assert outlier_ratio(mx.zeros(4)) == 0


@pytest.mark.parametrize("columns", [64, 5120, 6208, 14336, 32768])
def test_wide_hessians_are_blocks_of_whole_groups(columns: int) -> None:
    found = runs(columns)
    assert [j for run in found for j in range(run.start, run.stop)] == list(range(columns))
    assert all(run.start % 128 == 0 and run.stop - run.start <= 6144 for run in found)
    assert len(runs(32768)) == 8


def test_statistics_outlive_a_file(tmp_path: Path) -> None:
    arrays = {
        "b": mx.random.normal((3, 5)),
        "a": mx.array([1.0, 2.5]),
        "c": mx.array([[7]], mx.uint32),
    }
    content = to_bytes(arrays)
    assert content == to_bytes(dict(reversed(arrays.items())))
    (tmp_path / "statistics").write_bytes(content)
    found = from_file(tmp_path / "statistics")
    assert found.keys() == arrays.keys()
    assert all(mx.array_equal(found[name], array) for name, array in arrays.items())
    (tmp_path / "statistics").write_bytes(content[:-3])
    with pytest.raises(CheckpointError):
        from_file(tmp_path / "statistics")


@pytest.mark.parametrize(
    "config",
    [make_config(num_layers=2), make_config(num_layers=2, tie_word_embeddings=True)],
    ids=["untied", "tied"],
)
def test_each_linear_is_quantized_on_the_outputs_of_quantized_ones(
    config: ModelConfig, checkpoint_folder: Write
) -> None:
    """Check that the finished model has the inputs that were seen while it was made."""
    weights = make_weights(config, mx.bfloat16)
    source = open_source(checkpoint_folder(config, weights))
    formats: dict[str, QuantFormat | None] = {
        name.removesuffix(".weight"): QuantFormat(4, 32)
        for name, shape in source.config.shapes.items()
        if len(shape) == 2
    }
    formats["model.layers.0.self_attn.v_proj"] = QuantFormat(6, 64)
    formats["model.layers.1.self_attn.o_proj"] = None
    formats["model.layers.1.mlp.gate_proj"] = QuantFormat(4, 32, "mxfp4")
    emitted: dict[str, dict[int, Parts]] = {}
    visitor = Sequential(
        source,
        formats,
        lambda module, row, parts, _: emitted.setdefault(module, {}).update({row: parts}),
    )
    for _ in visit_linears(source, mx.array(IDS), visitor):
        pass
    assert emitted.keys() == {module for module, quant in formats.items() if quant is not None}
    for module, blocks in emitted.items():
        quant = formats[module]
        assert quant is not None
        parts = {
            kind: mx.concatenate([blocks[row][kind] for row in sorted(blocks)])
            for kind in blocks[0]
        }
        name = f"{module}.weight"
        assert {kind: part.shape for kind, part in parts.items()} == quant.packed_shapes(
            weights[name].shape
        )
        floats = {
            kind: part.astype(mx.float32)
            for kind, part in parts.items()
            if part.dtype == mx.bfloat16
        }
        if module != "model.embed_tokens" or not config.tie_word_embeddings:
            weights[name] = dequantize(parts | floats, quant, mx.float32)
    found = squares_of(checkpoint_folder(config, weights, "made"))
    for name, squares in visitor.squares.items():
        if name != "model.embed_tokens" or config.tie_word_embeddings:
            assert np.allclose(np.array(squares), np.array(found[name]), rtol=1e-4), name
    assert visitor.squares.keys() == found.keys()
