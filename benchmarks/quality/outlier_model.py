"""Train a small model with outlier channels like a large one's: `python -m benchmarks.quality.outlier_model --out DIR`.

In large models a few channels of what comes into q, k and v have hundreds of times the mean square of the others,
and that is where weighted quantization gains. A short training makes none, so this one begins with them: a few
channels of every norm have a large weight, and of every token's embedding a large mean. All weights then learn
around them; nothing is rescaled afterwards. The text is what every machine with this project has: Python's own
sources, and the descriptions of the packages beside MLX.
"""

import argparse
import json
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx import nn

from benchmarks.synthetic import raw_config
from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.tokenizer.tekken import Tokenizer
from magistral_mlx.training.demo.examples import SYSTEM_PROMPT, VOCABULARY, write_tokenizer
from magistral_mlx.training.demo.train import initialize, published, use_openblas

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
NORMS = {
    9: 80.0,
    90: -24.0,
    203: 18.0,
    290: 14.0,
}  # channel -> weight of every norm in it, to begin with
MEANS = {9: 0.03, 90: 0.06, 203: -0.06}  # channel -> mean over all tokens of the embedding
WINDOW, BATCH = 256, 8  # ids of a sequence, sequences of a step
RATE, WARM_UP = 1.5e-3, 60
TEXT_BYTES = 12_000_000
HELD_OUT = 16  # one file in so many is not learned from


def files() -> list[Path]:
    """Texts that are on this machine."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    sources = [path for path in library.rglob("*.py") if "site-packages" not in path.parts]
    return sorted(sources) + sorted(packages.glob("*.dist-info/METADATA"))


def texts(seed: int) -> tuple[str, str]:
    """What is learned and what is held out, whole files in a random order."""
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
    """Batches ``[BATCH, WINDOW + 1]`` from random places, bos before each."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, len(ids) - WINDOW, BATCH)
        yield mx.array([[bos, *ids[start : start + WINDOW].tolist()] for start in starts])


def make_model(seed: int) -> Transformer:
    """The model before it learns."""
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


def train(model: Transformer, batches: Iterator[mx.array], steps: int, out: Path) -> None:
    """Leave the checkpoint in ``out``, now and then an unfinished one."""
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0, RATE, WARM_UP),
            optim.cosine_decay(RATE, max(1, steps - WARM_UP), 0.02 * RATE),
        ],
        [WARM_UP],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)

    def loss(ids: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    loss_and_gradient = nn.value_and_grad(model, loss)
    started, smoothed = time.time(), None
    for step, ids in zip(range(1, steps + 1), batches, strict=False):
        value, gradient = loss_and_gradient(ids)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(value, model.parameters(), optimizer.state)
        smoothed = value.item() if smoothed is None else 0.95 * smoothed + 0.05 * value.item()
        if step % 20 == 0:
            left = (time.time() - started) / step * (steps - step) / 60
            print(
                f"step {step}/{steps}  loss {smoothed:.3f}  {left:.1f} minutes left",
                file=sys.stderr,
                flush=True,
            )
        if step % 200 == 0 or step == steps:
            save(out, model)


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


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.outlier_model", description=__doc__
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the checkpoint, and for its texts beside it",
    )
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    use_openblas("benchmarks.quality.outlier_model")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "tekken.json")
    (out / "SYSTEM_PROMPT.txt").write_text(SYSTEM_PROMPT)
    learned, held_out = texts(options.seed)
    (out / "learned.txt").write_text(learned[:400_000])
    (out / "held-out.txt").write_text(held_out)
    tokenizer = Tokenizer.from_folder(out)
    ids = np.array(tokenizer.encode(learned), np.int32)
    print(f"{len(ids)} ids to learn from", file=sys.stderr)
    model = make_model(options.seed)
    train(model, windows(ids, tokenizer.bos_id, options.seed), options.steps, out)


if __name__ == "__main__":
    main()
