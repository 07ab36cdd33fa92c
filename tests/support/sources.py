"""Source checkpoints for the converter's tests, in both published layouts, with a tokenizer."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.convert import Summary, convert_checkpoint
from magistral_mlx.convert.source.consolidated import is_rotated, native_name
from tests.support.tekken import write_tekken
from tests.support.tiny import (
    make_config,
    make_weights,
    quantize_weights,
    raw_config,
    write_checkpoint,
)

CONFIG = make_config(
    hidden_size=128, intermediate_size=384, head_dim=64, num_layers=2, vocab_size=1500
)
PARAMS = {
    "dim": 128,
    "n_layers": 2,
    "head_dim": 64,
    "hidden_dim": 384,
    "n_heads": 4,
    "n_kv_heads": 2,
    "rope_theta": 1e9,
    "norm_eps": 1e-5,
    "vocab_size": 1500,
    "max_position_embeddings": 4096,
}


# Shapes of 2509's vision tensors, by Mistral's names.
VISION = {
    "vision_encoder.patch_conv.weight": (8, 3, 2, 2),
    "vision_encoder.ln_pre.weight": (8,),
    "vision_encoder.transformer.layers.0.attention.wq.weight": (8, 8),
    "vision_language_adapter.w_in.weight": (128, 8),
    "patch_merger.merging_layer.weight": (8, 32),
    "pre_mm_projector_norm.weight": (8,),
}
# The names of transformers 4 for them, in the same order.
HF_VISION = (
    "vision_tower.patch_conv.weight",
    "vision_tower.ln_pre.weight",
    "vision_tower.transformer.layers.0.attention.q_proj.weight",
    "multi_modal_projector.linear_1.weight",
    "multi_modal_projector.patch_merger.merging_layer.weight",
    "multi_modal_projector.norm.weight",
)
NAMING = {
    4: ("language_model.model", "language_model.", ""),
    5: ("model.language_model", "", "model."),
}
# The table of params.json.
VISION_ENCODER = {
    "hidden_size": 8,
    "patch_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
PARTS = ("weight", "scales", "biases")
MODULES = [name.removesuffix(".weight") for name, shape in CONFIG.shapes.items() if len(shape) == 2]
Weights = dict[str, mx.array]


def write_hf(folder: Path, weights: Mapping[str, mx.array] | None = None, *, seed: int = 0) -> Path:
    """Write the published layout: shards, index, config.json, tekken.json."""
    tensors = dict(weights) if weights is not None else make_weights(CONFIG, mx.bfloat16, seed)
    return write_tekken(write_checkpoint(folder, CONFIG, tensors), CONFIG.vocab_size)


def write_consolidated(
    folder: Path,
    weights: Mapping[str, mx.array] | None = None,
    *,
    beside: Iterable[str] = (),
    **params: object,
) -> Path:
    """Write Mistral's own layout, with the tensors in an unusual order.

    Args:
        folder: made if missing.
        weights: by their Hugging Face names.
        beside: names of 2509's vision tensors to add.
        **params: change params.json; None removes a key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights if weights is not None else make_weights(CONFIG, mx.bfloat16)
    native = {
        native_name(n): pairs_from_halves(w, 64) if is_rotated(n) else w for n, w in tensors.items()
    }
    native |= vision_tensors(beside) if beside else {}
    shuffled = dict(sorted(native.items(), key=lambda item: item[0][::-1]))
    mx.save_safetensors(str(folder / "consolidated.safetensors"), shuffled, {"format": "pt"})
    (folder / "params.json").write_text(json.dumps(PARAMS))
    change_json(folder / "params.json", **params)
    return write_tekken(folder, CONFIG.vocab_size)


def vision_tensors(names: Iterable[str]) -> dict[str, mx.array]:
    return {
        name: mx.ones(shape, mx.bfloat16)
        for name, shape in zip(names, VISION.values(), strict=True)
    }


def write_multimodal(
    folder: Path,
    weights: Mapping[str, mx.array] | None = None,
    *,
    transformers: int = 4,
    **config: object,
) -> Path:
    """Write 2509's layout, with the tensor names of transformers 4 or 5.

    ``config`` changes config.json; None removes a key.
    """
    tensors = dict(weights) if weights is not None else make_weights(CONFIG, mx.bfloat16)
    inner, head, before = NAMING[transformers]
    stored = {
        n.replace("model", inner, 1) if n.startswith("model.") else head + n: w
        for n, w in tensors.items()
    }
    write_checkpoint(folder, CONFIG, stored | vision_tensors(before + name for name in HF_VISION))
    text = raw_config(CONFIG)
    outer = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "torch_dtype": text.pop("torch_dtype"),
    }
    outer |= {"text_config": text, "vision_config": {"model_type": "pixtral", "hidden_size": 8}}
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral3"} | outer))
    change_json(folder / "config.json", **config)
    return write_tekken(folder, CONFIG.vocab_size)


def pairs_from_halves(weight: mx.array, head_dim: int) -> mx.array:
    """Reorder rows by the definition.

    In Mistral's order, channel i of the first half is 2i, and of the second half 2i + 1.
    """
    order = []
    for start in range(0, weight.shape[0], head_dim):
        for i in range(head_dim // 2):
            order += [start + i, start + head_dim // 2 + i]
    return weight[mx.array(order)]


def change_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def content(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def convert_quickly(source: Path, target: Path, **options: object) -> Summary:
    """Convert by rounding and without tokenizer.json, which takes longest."""
    plain: dict[str, object] = {"tokenizer_json": False, "q_method": "round"}
    return convert_checkpoint(source, target, **(plain | options))  # type: ignore[arg-type]


def write_packed(
    folder: Path, weights: Weights, default: QuantFormat, **overrides: QuantFormat | None
) -> Path:
    """Write a packed checkpoint like mlx-lm."""
    tensors, block = quantize_weights(
        weights, default, {name.replace("/", "."): q for name, q in overrides.items()}
    )
    return write_tekken(write_checkpoint(folder, CONFIG, tensors, block), CONFIG.vocab_size)


def rounded(weight: mx.array, quant: QuantFormat | None) -> dict[str, mx.array]:
    if quant is None:
        return {"weight": weight}
    packed = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    return dict(zip(PARTS, packed, strict=False))


def restored(weight: mx.array, quant: QuantFormat | None) -> mx.array:
    if quant is None:
        return weight
    parts = mx.quantize(weight, quant.group_size, quant.bits, quant.mode)
    return mx.dequantize(*parts, group_size=quant.group_size, bits=quant.bits, mode=quant.mode)


def assert_is(found: Weights, weights: Weights, formats: dict[str, QuantFormat | None]) -> None:
    """Check that ``found`` is ``weights`` rounded by MLX, bit for bit."""
    expected = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected |= {
            f"{module}.{part}": array
            for part, array in rounded(weight, formats.get(module)).items()
        }
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name].view(mx.uint8), array.view(mx.uint8)), name


def read_by_mlx_lm(folder: Path) -> Weights:
    """Load with mlx-lm, which refuses tensors that config.json does not announce."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]
