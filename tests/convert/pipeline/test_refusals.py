"""Check that the converter refuses: exit 2, one clear message, nothing written."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import magistral_mlx.convert.pipeline.prepare
from magistral_mlx.convert.__main__ import main
from magistral_mlx.errors import ConversionError
from tests.support.sources import CONFIG, change_json, content, write_consolidated, write_hf
from tests.support.tekken import write_tekken
from tests.support.tiny import make_config, make_weights, raw_config, write_checkpoint

OVERFLOW = (
    json.dumps({"w": {"dtype": "F32", "shape": [2**32, 2**32, 1], "data_offsets": [0, 0]}})
    .ljust(150)
    .encode()
)
FIRST, EMBEDDING, NORM = (
    "model-00001-of-00002.safetensors",
    "model.embed_tokens.weight",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_hf(folder / "hf")
    write_consolidated(folder / "native")
    return folder


@pytest.fixture
def sources(pristine: Path, tmp_path: Path) -> Path:
    """Make a folder with a source in each layout, to damage."""
    shutil.copytree(pristine, tmp_path / "sources")
    return tmp_path / "sources"


def rewrite(path: Path, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(path), tensors, {"format": "pt"})


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "hf" / "model.safetensors.index.json"
        raw = json.loads(path.read_text())
        change(raw["weight_map"])
        path.write_text(json.dumps(raw))

    return write


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "hf" / "config.json", **changes)


def params(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "native" / "params.json", **changes)


def all_of(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def shards(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        for path in (folder / "hf").glob("*.safetensors"):
            rewrite(path, change)

    return apply


def tensor(name: str, new: Callable[[mx.array], mx.array]) -> Callable[[dict[str, mx.array]], None]:
    def change(tensors: dict[str, mx.array]) -> None:
        if name in tensors:
            tensors[name] = new(tensors[name])

    return change


def first_shard(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "hf" / FIRST, change)


def remove_hf(folder: Path) -> None:
    shutil.rmtree(folder / "hf")


def keep_only(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for path in (folder / "hf").iterdir():
            if path.name not in names:
                path.unlink()

    return remove


def native(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / "native" / "consolidated.safetensors", change)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def write_odd(folder: Path) -> None:
    odd = make_config(vocab_size=1500)  # feed-forward 96
    write_tekken(write_checkpoint(folder / "hf", odd, make_weights(odd, mx.bfloat16)), 1500)


def put_config_beside(**changes: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "native" / "config.json").write_text(json.dumps(raw_config(CONFIG) | changes))

    return write


HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing folder": (remove_hf, "no such folder"),
    "a file": (all_of(remove_hf, lambda f: (f / "hf").write_text("x")), "is a file"),
    "empty folder": (keep_only(), "is empty"),
    "not a checkpoint": (keep_only("tekken.json"), "has no config.json"),
    "neither layout": (keep_only("config.json", "tekken.json"), "no model*.safetensors"),
    "params.json alone": (
        all_of(keep_only(), lambda f: shutil.copy(f / "native" / "params.json", f / "hf")),
        "neither consolidated.safetensors nor model*.safetensors",
    ),
    "index names a missing file": (
        index(lambda m: m.update({NORM: "model-9.safetensors"})),
        "which is missing",
    ),
    "index with a path": (
        index(lambda m: m.update({NORM: "a/model.safetensors"})),
        "no plain .safetensors file name",
    ),
    "index with ..": (
        index(lambda m: m.update({NORM: "../model.safetensors"})),
        "no plain .safetensors file name",
    ),
    "index with an absolute path": (
        index(lambda m: m.update({NORM: "/m.safetensors"})),
        "no plain .safetensors",
    ),
    "stray shard": (
        lambda f: shutil.copy(
            f / "native" / "consolidated.safetensors", f / "hf" / "model-3.safetensors"
        ),
        "model-3.safetensors lies beside the weights",
    ),
    "tensor missing": (
        all_of(index(lambda m: m.pop(NORM)), shards(lambda t: t.pop(NORM, None))),
        "1 tensors are missing, first 'model.norm.weight'",
    ),
    "tensor not in the index": (first_shard(lambda t: t.update({"x": mx.zeros(3)})), "tensor 'x'"),
    "tensor extra": (
        all_of(
            first_shard(lambda t: t.update({"x": mx.zeros(3)})),
            index(lambda m: m.update({"x": FIRST})),
        ),
        "1 tensors do not belong to this model, first 'x'",
    ),
    "wrong shape": (shards(tensor(NORM, lambda a: a[1:])), "'model.norm.weight' is BF16 [127]"),
    "wrong dtype": (
        shards(tensor(NORM, lambda a: a.astype(mx.int32))),
        "'model.norm.weight' is I32 [128]",
    ),
    "NaN in a matrix": (
        shards(tensor(EMBEDDING, lambda a: a * mx.nan)),
        f"tensor {EMBEDDING!r} holds NaN or infinity",
    ),
    "infinity in a norm": (
        shards(tensor(NORM, lambda a: a * mx.inf)),
        f"tensor {NORM!r} holds NaN or infinity",
    ),
    "too large for float16": (
        all_of(config(torch_dtype="float16"), shards(tensor(NORM, lambda a: a * 1e6))),
        "'model.norm.weight' holds values too large for",
    ),
    "truncated shard": (
        lambda f: cut(f / "hf" / "model-00002-of-00002.safetensors"),
        "is cut short",
    ),
    "overflow header": (
        lambda f: (f / "hf" / FIRST).write_bytes(struct.pack("<Q", 150) + OVERFLOW),
        "model-00001-of-00002.safetensors",
    ),
    "unknown model_type": (config(model_type="qwen3"), "model_type is 'qwen3'"),
    "no rope_theta": (config(rope_theta=None), "rope_theta is missing"),
    "contradicting head_dim": (config(head_dim=32), "head_dim is 32"),
    "contradicting tie": (config(tie_word_embeddings=True), "tie_word_embeddings is True"),
    "odd torch_dtype": (
        config(torch_dtype="int8"),
        "torch_dtype is 'int8', expected one of bfloat16",
    ),
    "two types, none stated": (
        all_of(config(torch_dtype=None), shards(tensor(NORM, lambda a: a.astype(mx.float32)))),
        "tensors are BF16 and F32; name the",
    ),
    "groups do not divide": (
        all_of(remove_hf, write_odd),
        "'model.layers.0.mlp.down_proj.weight' has 96 columns",
    ),
    "no tekken.json": (lambda f: (f / "hf" / "tekken.json").unlink(), "tekken.json is missing"),
    "damaged tekken.json": (lambda f: cut(f / "hf" / "tekken.json"), "tekken.json"),
    "another vocabulary": (lambda f: write_tekken(f / "hf", 1600), "1600 ids, the model has 1500"),
}
NATIVE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no params.json": (lambda f: (f / "native" / "params.json").unlink(), "has no params.json"),
    "damaged params.json": (lambda f: cut(f / "native" / "params.json"), "params.json is damaged"),
    "no rope_theta in params.json": (params(rope_theta=None), "rope_theta is missing"),
    "no dim": (params(dim=None), "dim is missing"),
    "no context": (
        params(max_position_embeddings=None),
        "max_position_embeddings and max_seq_len are missing",
    ),
    "a mixture of experts": (params(moe={"num_experts": 8}), "has moe"),
    "sliding window": (params(sliding_window=4096), "sliding_window is 4096"),
    "contradicting tie flag": (params(tied_embeddings=True), "tie_word_embeddings is True"),
    "contradicting heads": (params(n_heads=8), "head_dim is 64 with 8 heads"),
    "too many layers": (
        params(n_layers=3),
        "9 tensors are missing, first 'layers.2.attention.wk.weight'",
    ),
    "absurdly many layers": (params(n_layers=10**12), "10"),
    "a layer too many": (params(n_layers=1), "9 tensors do not belong to this model"),
    "wrong native shape": (
        native(lambda t: t.update({"norm.weight": mx.zeros(7)})),
        "'norm.weight' is F32 [7]",
    ),
    "native truncated": (lambda f: cut(f / "native" / "consolidated.safetensors"), "is cut short"),
    "native NaN": (
        native(lambda t: t.update({"output.weight": t["output.weight"] * mx.nan})),
        "'lm_head.weight' holds",
    ),
    "config.json of another model": (
        put_config_beside(rope_theta=1e6),
        "rope_theta is 1000000000.0 by params.json",
    ),
    "config.json with another context": (
        put_config_beside(max_position_embeddings=99),
        "max_positions is 4096 by",
    ),
}


@pytest.mark.parametrize("case", [*HF, *NATIVE])
def test_bad_input_exits_2_and_writes_nothing(
    sources: Path, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    change, message = (HF | NATIVE)[case]
    change(sources)
    source = sources / ("hf" if case in HF else "native")
    target = sources.parent / "a" / "out"
    flags = ["--q-method", "round", "--no-tokenizer-json"]
    assert main(["--hf-path", str(source), "--mlx-path", str(target), *flags]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == err.splitlines()[-1:]  # what was read off the tensors may be said before
    assert message in errors[0]
    assert list(sources.parent.iterdir()) == [sources]


def run(source: Path, target: Path, *flags: str) -> int:
    return main(
        ["--hf-path", str(source), "--mlx-path", str(target), "--no-tokenizer-json", *flags]
    )


@pytest.mark.parametrize("flags", [(), ("--force",)], ids=["", "force"])
def test_targets_that_would_harm_are_refused(
    pristine: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    before = content(pristine / "hf")
    (tmp_path / "file").write_text("x")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love.txt").write_text("x")
    (tmp_path / "link").symlink_to(pristine / "hf")
    source = pristine / "hf"
    for target in (
        source,
        source / "out",
        tmp_path / "file",
        tmp_path / "letters",
        tmp_path / "link",
        pristine,
        "/",
    ):
        assert run(source, Path(target), *flags) == 2
        assert "name another folder" in capfd.readouterr().err
    assert content(pristine / "hf") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "letters", "link"]
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["love.txt"]


@pytest.mark.slow
def test_without_the_extra_nothing_begins(
    pristine: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise ConversionError(
            "tokenizer.json cannot be made; leave it out with --no-tokenizer-json"
        )

    monkeypatch.setattr(magistral_mlx.convert.pipeline.prepare, "require_export_extra", missing)
    assert main(["--hf-path", str(pristine / "hf"), "--mlx-path", str(tmp_path / "out")]) == 2
    assert "--no-tokenizer-json" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(pristine / "hf", tmp_path / "out") == 0
