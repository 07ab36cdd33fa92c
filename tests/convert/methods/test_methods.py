"""Conversions by importance and GPTQ: rounding's files with better numbers, also resumed."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.convert import ConvertOptions, stream_conversion, verify_checkpoint
from magistral_mlx.convert.__main__ import main
from magistral_mlx.convert.calibration.corpus import built_in
from magistral_mlx.convert.packing import dequantize
from magistral_mlx.convert.verification.checks import Check
from magistral_mlx.model.loader import load_model
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.convert.pipeline.test_convert import mlx_lm_logits
from tests.support.sources import content, convert_quickly
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, write_checkpoint

pytestmark = pytest.mark.usefixtures("small_pieces")
Array = NDArray[np.float64]
METHODS = ("importance", "gptq")
ONE_IS_SLOW = ("importance", pytest.param("gptq", marks=pytest.mark.slow))
# Documents that differ from those of rounding.
DOCUMENTS = {"magistral_mlx.json"}


def weight(folder: Path, module: str) -> mx.array:
    checkpoint = open_checkpoint(folder)
    quant = checkpoint.formats[module]
    assert quant is not None
    parts = {"weight": checkpoint.read(f"{module}.weight", slice(None))}
    for kind in ("scales", "biases"):
        parts[kind] = checkpoint.read(f"{module}.{kind}", slice(None)).astype(mx.float32)
    return dequantize(parts, quant, mx.float32)


@pytest.mark.parametrize("method", METHODS)
def test_files_are_those_of_rounding_in_names_sizes_and_headers(
    made: dict[str, Path], method: str
) -> None:
    ours, rounded = content(made[method]), content(made["round"])
    assert {n: len(c) for n, c in ours.items() if n not in DOCUMENTS} == {
        n: len(c) for n, c in rounded.items() if n not in DOCUMENTS
    }
    weights = {name for name in ours if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert all(ours[name] != rounded[name] for name in weights)
    assert all(ours[name] == rounded[name] for name in ours.keys() - weights - DOCUMENTS)
    assert [(s.path.name, s.header_sha256) for s in open_checkpoint(made[method]).shards] == [
        (s.path.name, s.header_sha256) for s in open_checkpoint(made["round"]).shards
    ]


def test_importance_is_the_default_up_to_5_bits(
    tmp_path: Path, source: Path, made: dict[str, Path]
) -> None:
    convert_quickly(source, tmp_path / "out", q_method=None)
    assert content(tmp_path / "out") == content(made["importance"])
    assert [ConvertOptions(q_bits=bits).method for bits in (2, 3, 4, 5, 6, 8, 16)] == [
        "importance"
    ] * 4 + ["round"] * 3
    assert ConvertOptions(q_mode="mxfp4").method == "round"
    assert ConvertOptions(recipe="8bit").method == "round"
    assert ConvertOptions(recipe="mixed_4_6").method == "importance"


def inputs_of_layer_0(source: Path, windows: int) -> Array:
    """Return the input of q, k and v of the first layer, ``[tokens, columns]``, in float64."""
    read = open_checkpoint(source).read
    embedding, norm = (
        np.array(read(f"{name}.weight", slice(None)).astype(mx.float32)).astype(np.float64)
        for name in ("model.embed_tokens", "model.layers.0.input_layernorm")
    )
    rows = embedding[np.array(built_in(Tokenizer.from_folder(source), windows=windows)).reshape(-1)]
    x: Array = rows / np.sqrt(np.square(rows).mean(axis=1, keepdims=True) + 1e-5) * norm
    return x


def off(source: Path, folder: Path, module: str) -> Array:
    wanted = np.array(
        open_checkpoint(source).read(f"{module}.weight", slice(None)).astype(mx.float32)
    )
    return np.array(weight(folder, module)).astype(np.float64) - wanted


def test_the_report_has_the_errors_that_the_files_have(source: Path, made: dict[str, Path]) -> None:
    record = json.loads((made["importance"] / "magistral_mlx.json").read_text())
    report = record["report"]
    assert report["tensors"].keys() == {
        m for m, q in open_checkpoint(made["importance"]).formats.items() if q
    }
    squares = np.square(inputs_of_layer_0(source, 4)).mean(axis=0)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"):
        w = np.array(
            open_checkpoint(source).read(f"{module}.weight", slice(None)).astype(mx.float32)
        )
        errors = [
            (np.square(off(source, made[way], module)) @ squares).sum()
            for way in ("round", "importance")
        ]
        found = report["tensors"][module]
        signal = (np.square(w.astype(np.float64)) @ squares).sum()
        assert [found["error_rounded"], found["error"]] == pytest.approx(
            [e / signal for e in errors], rel=2e-3
        )
        assert found["outlier_ratio"] == pytest.approx(squares.max() / squares.mean(), rel=1e-3)
    # An embedding has no inputs.
    assert "outlier_ratio" not in report["tensors"]["model.embed_tokens"]
    ratios = [t["error"] / t["error_rounded"] for t in report["tensors"].values()]
    assert min(ratios) <= report["predicted_error_ratio"] <= max(ratios) < 1
    rounded = json.loads((made["round"] / "magistral_mlx.json").read_text())
    assert "report" not in rounded
    assert "calibration" not in rounded["options"]


def test_the_report_of_gptq_is_measured_with_inputs(source: Path, made: dict[str, Path]) -> None:
    report = json.loads((made["gptq"] / "magistral_mlx.json").read_text())["report"]
    assert "256 tokens" in report["error_is"]
    # These inputs come from an embedding that is not quantized yet.
    x, module = inputs_of_layer_0(source, 16), "model.layers.0.self_attn.v_proj"
    errors = [np.square(x @ off(source, made[way], module).T).sum() for way in ("round", "gptq")]
    found = report["tensors"][module]
    assert found["error"] / found["error_rounded"] == pytest.approx(errors[1] / errors[0], rel=0.25)


def test_the_command_prints_the_gain(
    tmp_path: Path, source: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--no-tokenizer-json"]
    assert main(flags) == 0
    assert re.search(
        r"predicted error: 0\.\d\d of rounding's\n  largest outliers: \d+ times .* at \S+\n",
        capfd.readouterr().out,
    )
    assert main([*flags, "--json"]) == 0
    gain = json.loads(capfd.readouterr().out)["gain"]
    assert 0 < gain["error_ratio"] < 1
    assert gain["outliers_at"] in open_checkpoint(tmp_path / "out").formats.keys() - {
        "model.embed_tokens"
    }


@pytest.mark.parametrize("method", METHODS)
def test_verify_accepts_the_output_and_finds_a_wrong_code(
    tmp_path: Path, source: Path, made: dict[str, Path], method: str
) -> None:
    def rounding(folder: Path) -> Check:
        return next(
            check for check in verify_checkpoint(folder, source).checks if check.name == "rounding"
        )

    assert rounding(made[method]).passed
    shutil.copytree(made[method], tmp_path / "out")
    path = next(
        path
        for path in sorted((tmp_path / "out").glob("*.safetensors"))
        if b"layers.1" in path.read_bytes()
    )
    damaged = bytearray(path.read_bytes())
    kind, step = ("weight", 0x40) if method == "importance" else ("scales", 0x40)
    entry = Shard.open(path).header[f"model.layers.1.mlp.up_proj.{kind}"]
    at = int.from_bytes(damaged[:8], "little") + 8 + entry.begin + 1001
    damaged[at] ^= step
    path.write_bytes(damaged)
    found = rounding(tmp_path / "out")
    assert not found.passed
    assert "model.layers.1.mlp.up_proj.weight" in found.detail
    assert {"importance": "the search", "gptq": "GPTQ"}[method] in found.detail


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *(
            ("importance", {"q_bits": bits, "q_group_size": size})
            for bits, size in ((2, 32), (3, 128), (5, 64), (8, 32))
        ),
        pytest.param("gptq", {"q_bits": 6, "q_group_size": 128}, marks=pytest.mark.slow),
        pytest.param("gptq", {"recipe": "4bit-kv6"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_outputs_come_nearer_in_every_format(
    tmp_path: Path, source: Path, method: str, options: dict[str, object]
) -> None:
    convert_quickly(source, tmp_path / "out", q_method=method, **options)
    convert_quickly(source, tmp_path / "round", **options)
    x, module = inputs_of_layer_0(source, 16), "model.layers.0.self_attn.v_proj"
    found = [
        np.square(x @ off(source, tmp_path / way, module).T).mean() for way in ("out", "round")
    ]
    assert found[0] < 0.97 * found[1]


AWKWARD = {
    "tied, D=192, d=80": make_config(
        hidden_size=192,
        intermediate_size=320,
        head_dim=80,
        num_layers=2,
        vocab_size=1500,
        tie_word_embeddings=True,
    ),
    "d=32, one layer": make_config(
        hidden_size=64, intermediate_size=192, num_layers=1, vocab_size=1500
    ),
}


@pytest.mark.parametrize("method", ONE_IS_SLOW)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, id=name, marks=[] if "tied" in name else pytest.mark.slow)
        for name, c in AWKWARD.items()
    ],
)
@pytest.mark.slow
def test_any_shape_of_this_architecture_is_converted_and_goes_on(
    tmp_path: Path, config: ModelConfig, method: str
) -> None:
    folder = write_checkpoint(tmp_path / "hf", config, make_weights(config, mx.bfloat16))
    write_tekken(folder, config.vocab_size)
    convert_quickly(folder, tmp_path / "whole", q_method=method)
    options: dict[str, Any] = {"q_method": method, "tokenizer_json": False}
    steps = stream_conversion(folder, tmp_path / "out", **options)
    for _ in range(2):
        next(steps)
    steps.close()
    convert_quickly(folder, tmp_path / "out", q_method=method)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    convert_quickly(folder, tmp_path / "round")
    # Windows that the calibration did not use.
    ids = built_in(Tokenizer.from_folder(folder), windows=20)[16:]
    wanted, rounded, found = (
        load_model(open_checkpoint(tmp_path / name)).result()(ids)
        for name in ("hf", "round", "out")
    )
    assert mx.square(found - wanted).mean() < mx.square(rounded - wanted).mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"q_method": "importance"}, {"q_method": "gptq", "recipe": "4bit-kv6"}], ids=str
)
def test_mlx_lm_loads_it_and_computes_the_same(
    tmp_path: Path, source: Path, options: dict[str, Any]
) -> None:
    from mlx_lm.utils import load_model as load_in_mlx_lm

    convert_quickly(source, tmp_path / "out", **options)
    ids = mx.array([[1, 50, 7, 300, 901, 12]])
    theirs = mlx_lm_logits(load_in_mlx_lm(tmp_path / "out")[0], ids)
    ours = load_model(open_checkpoint(tmp_path / "out")).result()(ids)
    assert mx.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ONE_IS_SLOW)
@pytest.mark.parametrize(
    "embedding", [{"bits": 16}, {"mode": "mxfp4"}, {"bits": 6, "group_size": 32}], ids=str
)
def test_formats_that_are_not_affine_are_rounded(
    tmp_path: Path, source: Path, method: str, embedding: dict[str, Any]
) -> None:
    rules = [{"match": "model.embed_tokens", **embedding}, {"match": "*.o_proj", "bits": 16}]
    rules += [{"match": "*.0.mlp.*", "mode": "mxfp8"}, {"match": "lm_head", "bits": 8}]
    (tmp_path / "recipe.json").write_text(json.dumps({"default": {"bits": 3}, "rules": rules}))
    for way in ("round", method):
        convert_quickly(source, tmp_path / way, q_method=way, recipe=str(tmp_path / "recipe.json"))
    made, rounded = (open_checkpoint(tmp_path / way) for way in (method, "round"))
    reported = json.loads((made.folder / "magistral_mlx.json").read_text())["report"]["tensors"]
    for module, quant in made.formats.items():
        is_searched = quant is not None and quant.mode == "affine"
        same = mx.array_equal(
            *(each.read(f"{module}.weight", slice(None)) for each in (made, rounded))
        )
        assert same != is_searched, module
        assert (module in reported) == is_searched
    assert verify_checkpoint(made.folder, source).checks[-1].passed
