"""The language model of a multimodal checkpoint such as 2509 equals a text one bit for bit."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.errors import CheckpointError
from magistral_mlx.model.loader import load_model
from tests.support.sources import (
    CONFIG,
    HF_VISION,
    VISION,
    VISION_ENCODER,
    change_json,
    content,
    convert_quickly,
    write_consolidated,
    write_hf,
    write_multimodal,
)
from tests.support.tiny import make_weights, raw_config

IDS = mx.array([[1, 700, 1499, 3, 20]])
Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_weights(CONFIG, mx.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_multimodal(tmp_path_factory.mktemp("source") / "2509")


def write_native(folder: Path, **params: object) -> Path:
    return write_consolidated(
        folder, beside=VISION, **({"vision_encoder": VISION_ENCODER} | params)
    )


def same(a: mx.array, b: mx.array) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bool(mx.array_equal(a.view(mx.uint8), b.view(mx.uint8)))
    )


def logits_here(folder: Path) -> mx.array:
    return load_model(open_checkpoint(folder)).result()(IDS)


def logits_of_mlx_lm(model: Any) -> mx.array:
    """Load in float32, as our loader does on a CPU."""
    from mlx.utils import tree_map

    def widened(array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map(widened, model.parameters()))
    return model(IDS)


# what is read


@pytest.mark.parametrize("transformers", [4, 5])
def test_its_tensors_have_the_names_of_a_text_model(
    tmp_path: Path, weights: Weights, transformers: int, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = open_checkpoint(write_multimodal(tmp_path, weights, transformers=transformers))
    assert checkpoint.config == CONFIG
    assert {name for shard in checkpoint.shards for name in shard.header} == set(weights)
    assert checkpoint.nbytes == sum(weight.nbytes for weight in weights.values())
    tensors = checkpoint.tensors()
    assert tensors.keys() == weights.keys()
    for name, weight in weights.items():
        assert same(tensors[name], weight)
        assert same(checkpoint.read(name), weight)
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.WARNING,
            f"{tmp_path}: the vision part, 6 tensors, is left out; the model takes text only",
        )
    ]


def test_a_file_of_vision_alone_is_none_of_the_language_models(
    tmp_path: Path, folder: Path
) -> None:
    checkpoint = open_checkpoint(folder)
    extra = tmp_path / "extra"
    extra.mkdir()
    for name in ("config.json", "tekken.json"):
        (extra / name).symlink_to(folder / name)
    prefixed = {f"language_model.{name}": array for name, array in checkpoint.tensors().items()}
    mx.save_safetensors(str(extra / "model-1.safetensors"), prefixed)
    mx.save_safetensors(str(extra / "model-2.safetensors"), {HF_VISION[0]: mx.zeros((8, 3, 2, 2))})
    assert [shard.path.name for shard in open_checkpoint(extra).shards] == ["model-1.safetensors"]
    assert list(open_source(extra).identity()["files"]) == [
        "config.json",
        "model-1.safetensors",
        "tekken.json",
    ]


def test_the_config_that_transformers_5_writes_is_read(tmp_path: Path) -> None:
    """Write theta in rope_parameters, dtype twice, and a true tie_word_embeddings outside."""
    from transformers import Mistral3Config

    text = raw_config(CONFIG)
    theirs = Mistral3Config(
        text_config=text | {"dtype": text.pop("torch_dtype"), "sliding_window": None}
    )
    theirs.dtype = "bfloat16"
    raw = theirs.to_dict()
    assert raw["text_config"]["rope_parameters"] == {"rope_theta": 1e9, "rope_type": "default"}
    assert "rope_theta" not in raw["text_config"]
    assert raw["tie_word_embeddings"] is not raw["text_config"]["tie_word_embeddings"]
    folder = write_multimodal(tmp_path, transformers=5)
    (folder / "config.json").write_text(json.dumps(raw))
    source = open_source(folder)
    assert source.config == CONFIG
    assert source.float_type == "bfloat16"


# one result


@pytest.mark.slow
def test_every_layout_converts_to_the_bytes_of_the_text_model(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [
        write_hf(tmp_path / "text"),
        folder,
        write_multimodal(tmp_path / "5", transformers=5),
        write_native(tmp_path / "native"),
        write_native(tmp_path / "both"),
    ]
    (sources[-1] / "config.json").write_bytes((folder / "config.json").read_bytes())
    results = []
    for i, source in enumerate(sources):
        caplog.clear()
        convert_quickly(source, tmp_path / f"out{i}", recipe="mixed_4_6")
        assert sum("6 tensors, is left out" in r.getMessage() for r in caplog.records) == (i > 0)
        assert len(caplog.records) == (i > 0)
        results.append(content(tmp_path / f"out{i}"))
        del results[-1]["magistral_mlx.json"]
    assert {"config.json", "model.safetensors", "model.safetensors.index.json", "README.md"} <= set(
        results[0]
    )
    assert json.loads(results[0]["config.json"])["model_type"] == "llama"
    assert all(result == results[0] for result in results)


def test_mlx_lm_reads_the_same_out_of_it(folder: Path) -> None:
    from mlx_lm.utils import load_model as load_theirs

    theirs, _ = load_theirs(folder)
    assert mx.allclose(logits_here(folder), logits_of_mlx_lm(theirs), rtol=1e-4, atol=1e-4)


def test_what_mlx_lm_quantizes_it_to_runs_here(tmp_path: Path, folder: Path) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model as load_theirs
    from mlx_lm.utils import quantize_model, save_config, save_model

    model, config = load_theirs(folder)
    choose = mixed_quant_predicate_builder("mixed_4_6", model)
    model, config = quantize_model(model, config, 64, 4, quant_predicate=choose)  # type: ignore[arg-type]
    save_model(tmp_path, model)
    save_config(config, tmp_path / "config.json")
    checkpoint = open_checkpoint(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["quantization"][
            "language_model.lm_head"
        ]["bits"]
        == 6
    )
    assert checkpoint.formats["lm_head"] == QuantFormat(6, 64)
    assert checkpoint.formats["model.embed_tokens"] == QuantFormat(4, 64)
    assert mx.allclose(logits_here(tmp_path), logits_of_mlx_lm(model), rtol=1e-4, atol=1e-4)


# what is refused


def text_config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = json.loads((folder / "config.json").read_text())["text_config"] | changes
        change_json(
            folder / "config.json", text_config={k: v for k, v in text.items() if v is not None}
        )

    return change


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


def extra(*names: str) -> Callable[[Path], None]:
    """Add tensors in a file of their own."""

    def add(folder: Path) -> None:
        (folder / "model.safetensors.index.json").unlink()
        mx.save_safetensors(
            str(folder / "model-9.safetensors"), {name: mx.zeros((128,)) for name in names}
        )

    return add


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no text_config": (
        config(text_config=None),
        "model_type is 'mistral3', but text_config is None; fetch",
    ),
    "text_config is text": (config(text_config="x"), "but text_config is 'x'"),
    "another language model": (text_config(model_type="ministral3"), "model_type is 'ministral3'"),
    "no theta": (
        text_config(rope_theta=None),
        "rope_theta is missing, and no value may be assumed",
    ),
    "theta outside alone": (
        lambda f: (text_config(rope_theta=None)(f), config(rope_theta=1e9)(f))[0],
        "rope_theta is 1000000000.0, and None in text_config",
    ),
    "another theta outside": (
        config(rope_theta=1e6),
        "rope_theta is 1000000.0, and 1000000000.0 in text_config",
    ),
    "another size outside": (
        config(hidden_size=64),
        "hidden_size is 64, and 128 in text_config; fetch",
    ),
    "another type inside": (
        text_config(torch_dtype="float16"),
        "torch_dtype is 'bfloat16', and 'float16' in text_c",
    ),
    "another quantization inside": (
        lambda f: (
            text_config(quantization={"bits": 8, "group_size": 64})(f),
            config(quantization={"bits": 4, "group_size": 64})(f),
        )[0],
        "quantization is {'bits': 4, 'group_size': 64}, and {'bits': 8",
    ),
    "a module under two names": (
        config(
            quantization={
                "bits": 4,
                "group_size": 64,
                "lm_head": False,
                "language_model.lm_head": {"bits": 6},
            }
        ),
        r"quantization 'lm_head' is there under two names; fetch the checkpoint again",
    ),
    "tied inside": (
        text_config(tie_word_embeddings=True),
        "tie_word_embeddings is True, but lm_head.weight is pres",
    ),
    "a text model": (config(model_type="mistral"), "num_hidden_layers is missing"),
    "a tensor twice": (
        extra(NORM),
        f"model-9.safetensors: tensor '{NORM}' is there under two names; fetch",
    ),
    "a tensor twice in a file": (
        extra("language_model.x", "x"),
        "model-9.safetensors: tensor 'x' is there under two names",
    ),
    "audio": (
        extra("audio_tower.conv.weight"),
        "do not belong to this model, first 'audio_tower.conv.weight'",
    ),
    "an adapter": (
        extra("language_model.model.norm.lora_a"),
        "do not belong to this model, first 'model.norm.lora_a'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_contradiction_is_refused(tmp_path: Path, case: str) -> None:
    damage, words = REFUSED[case]
    folder = write_multimodal(tmp_path / "2509")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    assert words in str(caught.value)


def test_vision_tensors_in_a_text_model_are_refused(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    extra(HF_VISION[0])(folder)
    with pytest.raises(
        CheckpointError, match=f"do not belong to this model, first '{HF_VISION[0]}'"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (
            {"vision_encoder": None},
            "6 tensors do not belong to this model, first 'patch_merger.merging_layer.weight'",
        ),
        ({"multimodal": {"whisper_model_args": {}}}, "has multimodal; name a checkpoint"),
        ({"moe": {"num_experts": 8}}, "has moe; name a checkpoint"),
    ],
)
def test_a_native_contradiction_is_refused(
    tmp_path: Path, params: dict[str, object], words: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(write_native(tmp_path / "native", **params))
    assert words in str(caught.value)


def test_a_multimodal_config_beside_mistrals_file_must_agree(tmp_path: Path, folder: Path) -> None:
    native = write_native(tmp_path / "native")
    (native / "config.json").write_bytes((folder / "config.json").read_bytes())
    text_config(rope_theta=1e6)(native)
    with pytest.raises(
        CheckpointError,
        match=r"rope_theta is 1000000000\.0 by params\.json and 1000000\.0 by config",
    ):
        open_source(native)
