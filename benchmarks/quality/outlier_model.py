"""Train a model with outlier channels: ``python -m benchmarks.quality.outlier_model OUT``.

In large models a few channels of the inputs of q, k and v have hundreds of times the mean square of
the others, and weighted quantization gains there. A short training makes none, so this model begins
with them: a few channels of every norm have a large weight, and of every embedding a large mean.
All weights then learn around them. The text is on every machine with this project: Python's own
sources, and the descriptions of the packages beside MLX.
"""

import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn

from benchmarks.measure import report
from benchmarks.synthetic import raw_config
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.examples import SYSTEM_PROMPT
from magistral_mlx.training.demo.train import initialize, published, use_openblas
from magistral_mlx.training.demo.vocabulary import VOCABULARY, write_tokenizer

CONFIG = ModelConfig(
    hidden_size=320,  # a multiple of 64, but not of 128
    intermediate_size=896,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=VOCABULARY,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    max_positions=4096,
)
NORMS = {9: 80.0, 90: -24.0, 203: 18.0, 290: 14.0}  # channel -> first weight in every norm
MEANS = {9: 0.03, 90: 0.06, 203: -0.06}  # channel -> first mean over the embeddings
WINDOW, BATCH = 256, 8  # ids of a sequence, sequences of a step
RATE, WARM_UP, STEPS = 1.5e-3, 60, 700
TEXT_BYTES = 12_000_000
LEARNED_BYTES = 400_000  # kept beside the checkpoint
HELD_OUT = 16  # one file in so many is not learned from


def files() -> list[Path]:
    """Return the texts that are on this machine."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    sources = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    return sorted(sources) + sorted(packages.glob("*.dist-info/METADATA"))


def texts(seed: int) -> tuple[str, str]:
    """Return the text to learn and the text held out, whole files in a random order."""
    chosen = files()
    random.Random(seed).shuffle(chosen)
    parts: tuple[list[str], list[str]] = ([], [])
    size = 0
    for path in chosen:
        text = path.read_text(encoding="utf-8", errors="replace")
        name = path.name if path.name != "METADATA" else path.parent.name
        parts[crc32(name.encode()) % HELD_OUT == 0].append(text)
        size += len(text)
        if size > TEXT_BYTES:
            break
    return "\n".join(parts[0]), "\n".join(parts[1])


def windows(ids: np.ndarray, bos: int, seed: int) -> Iterator[mx.array]:
    """Yield batches ``[BATCH, WINDOW + 1]`` from random places, bos before each."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - WINDOW, BATCH)
        yield mx.array([[bos, *ids[start : start + WINDOW].tolist()] for start in starts])


def make_model(seed: int) -> Transformer:
    """Return the model before it learns."""
    model = Transformer(CONFIG)
    initialize(model, CONFIG.num_layers, seed)
    norm = mx.ones(CONFIG.hidden_size)
    for channel, weight in NORMS.items():
        norm[channel] = weight
    for layer in model.layers:
        layer.input_layernorm.weight = layer.post_attention_layernorm.weight = norm
    for channel, mean in MEANS.items():
        model.embed_tokens.weight[:, channel] += mean
    return model


def train(model: Transformer, batches: Iterator[mx.array], steps: int) -> None:
    decay = optim.cosine_decay(RATE, max(1, steps - WARM_UP), 0.02 * RATE)
    schedule = optim.join_schedules([optim.linear_schedule(0, RATE, WARM_UP), decay], [WARM_UP])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)

    def loss(ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    loss_and_gradient = nn.value_and_grad(model, loss)
    for step, ids in zip(range(1, steps + 1), batches, strict=False):
        value, gradient = loss_and_gradient(ids)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(value, model.parameters(), optimizer.state)
        if step % 20 == 0:
            report(f"step {step}/{steps}  loss {value.item():.3f}")


def save(out: Path, model: Transformer) -> None:
    weights = published(model, CONFIG)
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(weight.nbytes for weight in weights.values())},
        "weight_map": dict.fromkeys(sorted(weights), "model.safetensors"),
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (out / "config.json").write_text(json.dumps(raw_config(CONFIG) | ids, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(ids) + "\n")
    (out / "SYSTEM_PROMPT.txt").write_text(SYSTEM_PROMPT)


def main(out: Path, seed: int = 0) -> None:
    use_openblas("benchmarks.quality.outlier_model")
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "tekken.json")
    learned, held_out = texts(seed)
    (out / "learned.txt").write_text(learned[:LEARNED_BYTES])
    (out / "held-out.txt").write_text(held_out)
    model = make_model(seed)
    save(out, model)
    tokenizer = Tokenizer.from_folder(out)
    ids = np.array(tokenizer.encode(learned), np.int32)
    report(f"{len(ids)} ids to learn from")
    train(model, windows(ids, tokenizer.bos_id, seed), STEPS)
    save(out, model)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
