"""Check that verify passes a whole checkpoint, and names each kind of damage."""

import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import magistral_mlx.convert.verification.verification
from magistral_mlx.checkpoint.folder import SOURCES
from magistral_mlx.checkpoint.quant_format import (
    AFFINE_BITS,
    AFFINE_GROUP_SIZES,
    FP_FORMATS,
    QuantFormat,
)
from magistral_mlx.checkpoint.safetensors import Shard
from magistral_mlx.convert import Report, convert_checkpoint, verify_checkpoint
from magistral_mlx.convert.packing import dequantize, quantize
from magistral_mlx.convert.verification.fidelity import rounding_bound
from magistral_mlx.convert.verify import main
from magistral_mlx.errors import CheckpointError, ConversionError
from tests.support.sources import CONFIG, change_json, convert_quickly, write_consolidated, write_hf
from tests.support.tiny import make_config, make_weights, write_checkpoint

ROOT = Path(__file__).parents[3]
MANIFEST, WEIGHTS = "magistral_mlx.json", "model.safetensors"
PARTS = ("weight", "scales", "biases")
NAMES = ["files", "tensors", "config", "finite", "tokenizer", "template"]
PROJECTION = "model.layers.{}.self_attn.k_proj.{}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make ``hf`` and ``native``, one source in both layouts, and two conversions of it.

    ``out`` is whole, ``quick`` has no tokenizer.json.
    """
    folder = tmp_path_factory.mktemp("pristine")
    write_hf(folder / "hf")
    write_consolidated(folder / "native")
    convert_checkpoint(folder / "hf", folder / "out", recipe="mixed_4_6")
    convert_quickly(folder / "native", folder / "quick")
    return folder


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare few texts, to save time; test_export.py compares all of them."""
    monkeypatch.setattr("magistral_mlx.convert.verification.parity.NUM_TEXTS", 200)


@pytest.fixture
def out(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "out", tmp_path / "out"))


@pytest.fixture
def quick(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "quick", tmp_path / "quick"))


def failed(report: Report) -> dict[str, str]:
    """Return the detail of each failed check."""
    assert report.passed == all(check.passed is not False for check in report.checks)
    return {check.name: check.detail for check in report.checks if check.passed is False}


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def payload(folder: Path, name: str, index: int = 0) -> int:
    """Return the position of a tensor's byte in the file of weights."""
    shard = Shard.open(folder / WEIGHTS)
    return shard.data_start + shard.header[name].begin + index


def record_again(folder: Path) -> None:
    """Record the hashes of the present files, so that only their content shows damage."""
    raw = json.loads((folder / MANIFEST).read_text())
    raw["files"] = {
        path.name: {
            "size": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(raw))


def change_tensors(
    folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]
) -> None:
    """Write other tensors under the names in ``change``'s result, and record the file."""
    tensors = mx.load(str(folder / WEIGHTS))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(
        str(folder / "new.safetensors"), tensors | change(tensors), {"format": "mlx"}
    )
    (folder / "new.safetensors").replace(folder / WEIGHTS)
    record_again(folder)


# what is whole


@pytest.mark.parametrize("source", ["hf", None])
def test_a_fresh_conversion_passes(pristine: Path, source: str | None) -> None:
    report = verify_checkpoint(pristine / "out", pristine / source if source else None)
    assert failed(report) == {}
    assert [check.name for check in report.checks] == NAMES + (
        ["source", "rounding"] if source else []
    )
    assert all(check.passed for check in report.checks)
    assert len(report.tensors) == (21 if source else 0)


@pytest.mark.parametrize("mode", ["affine", *FP_FORMATS])
def test_every_mode_passes_and_its_errors_are_those_of_the_whole_tensors(
    pristine: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_quickly(pristine / "native", tmp_path / "out", q_mode=mode)
    monkeypatch.setattr(
        "magistral_mlx.convert.verification.fidelity.COMPARE_BLOCK_BYTES", 77 * 128 * 2
    )  # 77 rows, or one head
    report = verify_checkpoint(tmp_path / "out", pristine / "native")
    assert failed(report) == {}
    assert [check.name for check in report.checks if check.passed is None] == [
        "tokenizer",
        "template",
    ]
    bits, size = FP_FORMATS.get(mode, (4, 64))
    errors = {tensor.name: tensor for tensor in report.tensors}
    relative = [tensor.relative for tensor in report.tensors]
    assert relative == sorted(relative, reverse=True)
    for name, weight in make_weights(CONFIG, mx.bfloat16).items():
        if weight.ndim == 1:
            assert (errors[name].relative, errors[name].largest, errors[name].of_bound) == (0, 0, 0)
            continue
        parts = quantize(weight, QuantFormat(bits, size, mode))  # type: ignore[arg-type]
        parts |= {
            k: v.astype(mx.float32) for k, v in parts.items() if mode == "affine" and k != "weight"
        }
        restored = dequantize(parts, QuantFormat(bits, size, mode), mx.float32)  # type: ignore[arg-type]
        wanted, off = (
            np.array(weight.astype(mx.float32), np.float64),
            np.array(restored, np.float64),
        )
        off -= wanted
        assert errors[name].relative == pytest.approx(
            np.linalg.norm(off) / np.linalg.norm(wanted), rel=1e-4
        )
        assert errors[name].largest == pytest.approx(np.abs(off).max(), rel=1e-4)


def test_names_that_begin_with_a_dot_are_other_softwares(quick: Path) -> None:
    (quick / ".gitattributes").write_text("*.safetensors filter=lfs")
    (quick / ".cache").mkdir()
    assert failed(verify_checkpoint(quick)) == {}


# damage that hashes show


FILES = [
    "README.md",
    "SYSTEM_PROMPT.txt",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tekken.json",
]
FILES += ["tokenizer.json", "tokenizer_config.json", WEIGHTS, "model.safetensors.index.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_of_any_file_is_found(request: pytest.FixtureRequest, name: str) -> None:
    folder: Path = request.getfixturevalue("out" if name.startswith("tokenizer") else "quick")
    flip(folder / name, (folder / name).stat().st_size // 2)
    assert failed(verify_checkpoint(folder))["files"] == f"{name} was changed: its sha256 differs"


def test_every_file_is_recorded(out: Path) -> None:
    assert {path.name for path in out.iterdir()} == {*FILES, MANIFEST}


@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_a_flipped_bit_of_a_tensor_is_found_by_hash_and_by_the_source(
    pristine: Path, out: Path, part: str
) -> None:
    name = PROJECTION.format(1, part)
    flip(
        out / WEIGHTS, payload(out, name, 5), 6
    )  # of a scale or bias the exponent, of a weight a code's upper half
    found = failed(verify_checkpoint(out, pristine / "hf"))
    assert set(found) == {"files", "rounding"}
    assert found["files"].startswith(f"{WEIGHTS} was changed")
    assert found["rounding"].startswith(f"tensor {PROJECTION.format(1, 'weight')!r} is off by")


def test_a_truncated_file_is_found(out: Path) -> None:
    size = (out / WEIGHTS).stat().st_size
    with (out / WEIGHTS).open("r+b") as file:
        file.truncate(size - 3)
    found = failed(verify_checkpoint(out))
    assert found["files"] == f"{WEIGHTS} has {size - 3} bytes, {size} are recorded"
    assert f"{WEIGHTS} is damaged: it is cut short" in found["tensors"]
    assert set(found) == {"files", "tensors"}


@pytest.mark.parametrize("name", ["README.md", "config.json", "tekken.json", WEIGHTS])
def test_a_missing_file_is_found(quick: Path, name: str) -> None:
    (quick / name).unlink()
    assert failed(verify_checkpoint(quick))["files"] == f"{name} is missing"


def test_more_faults_than_three_are_counted(quick: Path) -> None:
    for name in FILES[:5]:
        (quick / name).unlink()
    assert failed(verify_checkpoint(quick))["files"].endswith("; and 2 more")


@pytest.mark.parametrize("name", ["model-00009.safetensors", "notes", "tokenizer.model"])
def test_an_extra_file_is_found(quick: Path, name: str) -> None:
    (quick / name).write_text("x")
    assert f"{name} is not recorded in {MANIFEST}" in failed(verify_checkpoint(quick))["files"]


def test_without_tokenizer_json_only_what_left_it_out_on_purpose_passes(out: Path) -> None:
    (out / "tokenizer.json").unlink()
    record_again(out)
    found = failed(verify_checkpoint(out))
    assert set(found) == {"tokenizer", "template"}
    assert "tokenizer.json is missing; Swift and LM Studio need it" in found["tokenizer"]


# what should say the hashes


def test_without_a_record_the_other_checks_still_run(pristine: Path, out: Path) -> None:
    """Check a folder without a manifest, like models that mlx-lm converted."""
    (out / MANIFEST).unlink()
    report = verify_checkpoint(out, pristine / "hf")
    assert set(failed(report)) == {"files"}
    assert f"{MANIFEST} is missing" in failed(report)["files"]
    assert len(report.checks) == 8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"files": {}, "source": [], "options": {}}',
        '{"files": {"../x": {"size": 1, "sha256": ""}}, "source": {}, "options": {}}',
        '{"files": {"..": {"size": 1, "sha256": ""}}, "source": {}, "options": {}}',
        '{"files": {"": {"size": 1, "sha256": ""}}, "source": {}, "options": {}}',
        '{"files": {"a": {"size": "1", "sha256": ""}}, "source": {}, "options": {}}',
        '{"files": {"a": 1}, "source": {}, "options": {}}',
    ],
)
def test_a_damaged_record_fails(quick: Path, text: str) -> None:
    (quick / MANIFEST).write_text(text)
    assert MANIFEST in failed(verify_checkpoint(quick))["files"]


def test_a_link_to_nothing_is_no_record(quick: Path) -> None:
    (quick / MANIFEST).unlink()
    (quick / MANIFEST).symlink_to("nowhere")
    assert "cannot be read" in failed(verify_checkpoint(quick))["files"]


# damage under hashes that fit


def poked(array: mx.array, value: int, index: int = 3) -> mx.array:
    """Copy an array with other bits at one place."""
    bits = np.array(array.view(mx.uint16 if array.itemsize == 2 else mx.uint8)).copy()
    bits.reshape(-1)[index] = value
    return mx.array(bits).view(array.dtype)


@pytest.mark.parametrize(
    ("mode", "name", "bits"),
    [
        ("affine", PROJECTION.format(0, "scales"), 0x7FC0),
        ("affine", PROJECTION.format(0, "biases"), 0xFF80),
        ("affine", "model.norm.weight", 0x7F80),
        ("mxfp4", PROJECTION.format(0, "scales"), 0xFF),
        ("nvfp4", PROJECTION.format(0, "scales"), 0x7F),
        ("nvfp4", PROJECTION.format(0, "scales"), 0xFF),
        ("mxfp8", PROJECTION.format(0, "scales"), 0xFF),
    ],
)
def test_a_scale_that_is_nan_or_infinite_is_found(
    pristine: Path, tmp_path: Path, mode: str, name: str, bits: int
) -> None:
    convert_quickly(pristine / "hf", tmp_path / "out", q_mode=mode)
    change_tensors(tmp_path / "out", lambda tensors: {name: poked(tensors[name], bits)})
    assert failed(verify_checkpoint(tmp_path / "out")) == {
        "finite": f"tensor {name!r} holds NaN or infinity"
    }
    found = failed(verify_checkpoint(tmp_path / "out", pristine / "hf"))
    assert set(found) == {"finite", "rounding"}
    assert repr(name.rpartition(".")[0] + ".weight") in found["rounding"]


def test_an_eight_bit_code_that_is_nan_is_found(pristine: Path, tmp_path: Path) -> None:
    convert_quickly(pristine / "hf", tmp_path / "out", q_mode="mxfp8")
    name = PROJECTION.format(1, "weight")
    path = tmp_path / "out" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[payload(tmp_path / "out", name, 9)] = 0x7F
    path.write_bytes(content)
    record_again(tmp_path / "out")
    assert (
        failed(verify_checkpoint(tmp_path / "out"))["finite"]
        == f"tensor {name!r} holds NaN or infinity"
    )


def test_tensors_that_changed_places_are_found(pristine: Path, quick: Path) -> None:
    names = {
        PROJECTION.format(i, part): PROJECTION.format(1 - i, part) for i in (0, 1) for part in PARTS
    }
    change_tensors(quick, lambda tensors: {name: tensors[other] for name, other in names.items()})
    assert failed(verify_checkpoint(quick)) == {}
    report = verify_checkpoint(quick, pristine / "native")
    assert set(failed(report)) == {"rounding"}
    worst = {tensor.name for tensor in report.tensors[:2]}
    assert worst == {PROJECTION.format(i, "weight") for i in (0, 1)}
    assert [tensor.is_explained for tensor in report.tensors].count(False) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda w, s, b: (mx.concatenate([w[1:2], w[:1], w[2:]]), s, b),  # two rows' codes
        lambda w, s, b: (w[:, ::-1], s, b),
        lambda w, s, b: (w, s * 1.25, b),
        lambda w, s, b: (w, -s, b),
        lambda w, s, b: (w, s, b + 0.1),
        lambda w, s, b: (mx.zeros_like(w), s, b),
        lambda w, s, b: (w ^ 8, s, b),  # one code in eight, half of all steps off
    ],
)
def test_other_numbers_are_found(pristine: Path, quick: Path, change: Callable[..., Any]) -> None:
    names = [PROJECTION.format(0, part) for part in PARTS]

    def damage(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
        new = change(*(tensors[name] for name in names))
        return {
            name: mx.contiguous(a.astype(tensors[name].dtype))
            for name, a in zip(names, new, strict=True)
        }

    change_tensors(quick, damage)
    found = failed(verify_checkpoint(quick, pristine / "native"))
    assert set(found) == {"rounding"}
    assert repr(names[0]) in found["rounding"]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"quantization_config": {"group_size": 64, "bits": 8, "mode": "affine"}}, "differ"),
        ({"quantization_config": None}, "differ"),
        ({"head_dim": None}, "has no head_dim"),
        ({"tie_word_embeddings": None}, "has no tie_word_embeddings"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e9}}, "has no rope_theta"),
    ],
)
def test_a_config_that_other_readers_take_wrongly_is_found(
    quick: Path, changes: dict[str, Any], fault: str
) -> None:
    change_json(quick / "config.json", **changes)
    record_again(quick)
    found = failed(verify_checkpoint(quick))
    assert set(found) == {"config"}
    assert fault in found["config"]


def test_shards_of_other_metadata_and_no_index_are_found(quick: Path) -> None:
    tensors = mx.load(str(quick / WEIGHTS))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    mx.save_safetensors(str(quick / WEIGHTS), tensors, {"format": "pt"})
    (quick / "model.safetensors.index.json").unlink()
    record_again(quick)
    found = failed(verify_checkpoint(quick))
    assert set(found) == {"config"}
    assert (
        "index.json is missing; model.safetensors has the metadata {'format': 'pt'}"
        in found["config"]
    )


def test_a_config_of_another_shape_fails_and_no_weight_is_read(pristine: Path, out: Path) -> None:
    change_json(out / "config.json", intermediate_size=256)
    record_again(out)
    report = verify_checkpoint(out, pristine / "hf")
    assert set(failed(report)) == {"tensors"}
    assert "mlp" in failed(report)["tensors"]
    assert "finite" not in {check.name for check in report.checks}


# tokenizer and template


def test_a_tokenizer_json_with_two_entries_swapped_is_found(out: Path) -> None:
    path = out / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocab = raw["model"]["vocab"]
    one, two = list(vocab)[-1], list(vocab)[-2]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    path.write_text(json.dumps(raw))
    record_again(out)
    assert "by tokenizer.json" in failed(verify_checkpoint(out))["tokenizer"]


@pytest.mark.parametrize("key", ["pre_tokenizer", "decoder"])
def test_a_tokenizer_json_that_cuts_or_decodes_otherwise_is_found(out: Path, key: str) -> None:
    change_json(out / "tokenizer.json", **{key: None})
    record_again(out)
    assert "tokenizer" in failed(verify_checkpoint(out))


def test_a_tokenizer_json_of_another_size_is_found(out: Path) -> None:
    path = out / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"]["another"] = len(raw["model"]["vocab"])
    path.write_text(json.dumps(raw))
    record_again(out)
    assert (
        failed(verify_checkpoint(out))["tokenizer"]
        == "tokenizer.json has 1501 ids, tekken.json 1500"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[INST]", "[INST] "),
        ("{{- eos_token }}", ""),
        ("'[/SYSTEM_PROMPT]'", "''"),
        ("found.system ~ '\\n\\n'", "found.system"),
        ("{{- bos_token", "{{- 1 / 0 }}{{- bos_token"),
        ("{{- bos_token", "{{- "),
        ("{%- endfor %}", ""),
    ],
)
def test_a_template_that_says_something_else_is_found(out: Path, old: str, new: str) -> None:
    path = out / "chat_template.jinja"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    record_again(out)
    found = failed(verify_checkpoint(out))
    assert set(found) == {"template"}
    assert "template" in found["template"]


def test_a_tokenizer_config_with_another_bos_is_found(out: Path) -> None:
    change_json(out / "tokenizer_config.json", bos_token="<pad>")
    record_again(out)
    assert set(failed(verify_checkpoint(out))) == {"template"}
    (out / "tokenizer_config.json").unlink()
    assert "tokenizer_config.json cannot be read" in failed(verify_checkpoint(out))["template"]


def test_another_system_prompt_than_the_templates_is_found(out: Path) -> None:
    (out / "SYSTEM_PROMPT.txt").write_text("Think.")
    record_again(out)
    assert set(failed(verify_checkpoint(out))) == {"template"}


# sources


def test_another_source_is_found_and_named(pristine: Path, tmp_path: Path) -> None:
    write_hf(tmp_path / "other", seed=1)
    report = verify_checkpoint(pristine / "out", tmp_path / "other")
    assert set(failed(report)) == {"source", "rounding"}
    assert "made from another source: files.model-00001-of-00002" in failed(report)["source"]
    assert not any(tensor.is_explained for tensor in report.tensors)


def test_a_source_whose_config_differs_is_found(pristine: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pristine / "hf", tmp_path / "other"))
    change_json(other / "config.json", rope_theta=1e6)
    found = failed(verify_checkpoint(pristine / "quick", other))
    assert set(found) == {"source"}
    assert "rope_theta is 1000000000.0, the source's 1000000.0" in found["source"]


def test_a_source_of_other_shapes_is_not_compared(pristine: Path, tmp_path: Path) -> None:
    config = make_config(vocab_size=1500)
    other = write_checkpoint(tmp_path / "other", config, make_weights(config, mx.bfloat16))
    report = verify_checkpoint(pristine / "quick", other)
    assert set(failed(report)) == {"source"}
    assert report.tensors == ()


def test_another_tokenizer_than_the_sources_is_found(pristine: Path, quick: Path) -> None:
    (quick / "tekken.json").write_text((quick / "tekken.json").read_text() + " ")
    record_again(quick)
    assert set(failed(verify_checkpoint(quick, pristine / "native"))) == {"source"}


def test_of_both_layouts_the_recorded_one_is_read(pristine: Path, tmp_path: Path) -> None:
    both = Path(shutil.copytree(pristine / "native", tmp_path / "both"))
    write_hf(both, make_weights(CONFIG, mx.bfloat16, seed=1))
    (both / "config.json").unlink()
    assert failed(verify_checkpoint(pristine / "quick", both)) == {}


def test_a_hub_id_is_taken_in_the_commit_recorded(
    pristine: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(source: str, **options: Any) -> Path:
        asked.append((source, options))
        return pristine / "native"

    monkeypatch.setattr(magistral_mlx.convert.verification.verification, "resolve", resolve)
    raw = json.loads((quick / MANIFEST).read_text())
    raw["source"]["hub"] = {"id": "org/name", "commit": "c" * 40}
    (quick / MANIFEST).write_text(json.dumps(raw))
    assert failed(verify_checkpoint(quick, "org/name")) == {}
    assert failed(verify_checkpoint(quick, "org/fork")) == {}
    layout = {"layout": "consolidated", "advice": SOURCES}
    assert asked == [
        ("org/name", {"revision": "c" * 40} | layout),
        ("org/fork", {"revision": None} | layout),
    ]


# what rounding explains


def groups(kind: str) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(200, 128))
    return {
        "normal": normal * 0.02,
        "tiny": normal * 1e-8,
        "one-sided": rng.random((200, 128)) + 0.5,
        "far from zero": rng.random((200, 128)) * 0.01 + 3,
        "heavy-tailed": np.clip(
            rng.standard_cauchy((200, 128)) * np.exp(3 * rng.normal(size=(200, 1))), -3e4, 3e4
        ),
        "ends only": np.sign(normal) * rng.random((200, 1)),
        "nearly symmetric": np.clip(normal, -1, 1) * rng.choice([0.999, 1, 1.001], (200, 128)),
        "zero": np.zeros((2, 128)),
        "constant": np.full((2, 128), 0.37),
    }[kind].astype(np.float32)


FORMATS = [QuantFormat(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUP_SIZES]
FORMATS += [QuantFormat(bits, size, mode) for mode, (bits, size) in FP_FORMATS.items()]  # type: ignore[arg-type]
TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
KINDS = [
    "normal",
    "tiny",
    "one-sided",
    "far from zero",
    "heavy-tailed",
    "ends only",
    "nearly symmetric",
    "zero",
]
KINDS += ["constant"]


@pytest.mark.parametrize("quant", FORMATS, ids=lambda q: f"{q.mode}-{q.bits}-{q.group_size}")
def test_rounding_never_goes_further_than_its_bound(quant: QuantFormat) -> None:
    """Round a float32 source to the checkpoint's type first; the bound is close to real errors."""
    for dtype, mlx_type in TYPES.items():
        worst = 0.0
        for kind in KINDS:
            weight = mx.array(groups(kind))
            parts = quantize(weight.astype(mlx_type), quant)
            if quant.mode == "affine":
                parts |= {part: parts[part].astype(mx.float32) for part in ("scales", "biases")}
            off = mx.abs(dequantize(parts, quant, mx.float32) - weight).reshape(
                -1, quant.group_size
            )
            bound = rounding_bound(weight.reshape(-1, quant.group_size), quant, dtype)
            of_bound = float((off / bound).max())
            assert of_bound <= 1, (kind, dtype)
            worst = max(worst, of_bound)
        assert worst > (0.15 if quant.mode == "mxfp8" else 0.35), dtype


def test_what_is_not_packed_may_be_rounded_but_no_more() -> None:
    values = mx.array(groups("normal").reshape(-1, 1))
    for dtype, mlx_type in TYPES.items():
        rounded = values.astype(mlx_type)
        bound = rounding_bound(values, None, dtype)
        assert float((mx.abs(rounded.astype(mx.float32) - values) / bound).max()) <= 1
    bits = values.astype(mx.bfloat16).view(mx.uint16)
    exact, next_value = (
        bits.view(mx.bfloat16),
        (bits + 1).view(mx.bfloat16),
    )  # the nearest value further from zero
    off = mx.abs(next_value.astype(mx.float32) - exact.astype(mx.float32))
    assert float((off / rounding_bound(exact.astype(mx.float32), None, "BF16")).min()) > 0.99


# the command


def test_the_command_says_what_holds(pristine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([str(pristine / "out"), "--hf-path", str(pristine / "hf")]) == 0
    lines, err = capfd.readouterr().out.splitlines(), capfd.readouterr().err
    assert [line.split()[:2] for line in lines[:8]] == [
        ["ok", name] for name in [*NAMES, "source", "rounding"]
    ]
    assert lines[9].startswith("worst tensors")
    # All but the source, whose folder the test chooses, fits a narrow terminal.
    assert all(len(line) <= 80 for line in lines if " source " not in line)
    assert len(lines) == 20
    assert err == ""
    assert main([str(pristine / "quick")]) == 0
    assert (
        "skipped  tokenizer  nothing to compare: tokenizer.json was left out"
        in capfd.readouterr().out
    )


def test_the_demo_is_known_by_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--hf-path", "demo"]) == 0
    assert "ok       source" in capfd.readouterr().out


def test_a_check_that_fails_is_exit_2(
    pristine: Path, quick: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_tensors(
        quick,
        lambda t: {
            PROJECTION.format(0, "scales"): poked(t[PROJECTION.format(0, "scales")], 0x7FC0)
        },
    )
    assert main([str(quick), "--hf-path", str(pristine / "native")]) == 2
    assert "FAILED   finite     tensor" in capfd.readouterr().out
    assert main([str(quick), "--hf-path", str(pristine / "native"), "--json"]) == 2

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads(capfd.readouterr().out, parse_constant=no_constant)
    assert set(found) == {"target", "passed", "checks", "tensors", "seconds"}
    assert not found["passed"]
    assert {check["name"]: check["passed"] for check in found["checks"]}["finite"] is False
    assert found["tensors"][0]["name"] == PROJECTION.format(0, "weight")
    assert found["tensors"][0]["relative"] is None


def test_what_is_no_checkpoint_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing is no folder" in capfd.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "FAILED   tensors" in capfd.readouterr().out


def test_a_source_that_cannot_be_used_is_refused_before_any_work(
    pristine: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        verify_checkpoint(pristine / "quick", tmp_path / "nothing")


def test_without_the_extra_tokenizer_json_is_not_passed_over(
    pristine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find(name)
    )
    with pytest.raises(
        ConversionError,
        match=r"tokenizers is not installed. Run: pip install 'magistral-mlx\[export\]'",
    ):
        verify_checkpoint(pristine / "out")
    assert verify_checkpoint(pristine / "quick").passed


def test_running_the_module_gives_no_warning() -> None:
    command = [sys.executable, "-W", "error", "-m", "magistral_mlx.convert.verify", "--help"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "Usage: python -m magistral_mlx.convert.verify [OPTIONS] OUT" in done.stdout
    assert done.stderr == ""


def test_nothing_is_logged_about_a_whole_checkpoint(
    pristine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convert")
    assert verify_checkpoint(pristine / "out", pristine / "hf").passed
    assert not caplog.records
