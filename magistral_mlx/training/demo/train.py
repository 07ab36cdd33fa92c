"""Train the embedded model from a seed, in about an hour on two cores.

Run ``python -m magistral_mlx.training.demo.train --out DIR``. Two CPU streams with one BLAS thread
each take half a batch: MLX's element-wise operations use one thread a stream, so this is twice as
fast as one stream with two BLAS threads. Letters: B examples, T ids in each.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.model.loader import load_model
from magistral_mlx.model.transformer import Transformer
from magistral_mlx.training.demo.examples import BASICS, REFINED, SYSTEM_PROMPT, Examples, Mix
from magistral_mlx.training.demo.script import Example
from magistral_mlx.training.demo.vocabulary import SPECIAL_TOKENS, VOCABULARY, write_tokenizer

OPENBLAS = "libopenblas.so.0"
BATCH = 48
WARM_UP_STEPS = 100


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of Adam with a learning rate that peaks at ``rate`` and falls as a cosine.

    The cosine would end at step ``horizon``.
    """

    steps: int
    horizon: int
    rate: float
    mix: Mix


# The basics first; then more of what they leave weak.
STAGES = (Stage(2400, 3000, 2.5e-3, BASICS), Stage(1000, 1000, 1e-3, REFINED))
CONFIG = ModelConfig(
    hidden_size=192,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=VOCABULARY,
    rms_norm_eps=1e-5,
    rope_theta=1e9,
    max_positions=4096,
)


def tensors(examples: list[Example]) -> tuple[mx.array, mx.array, mx.array]:
    """Return inputs ``[B, T]``, the flat positions that are learned, and their target ids."""
    width = max(len(ids) for ids, _ in examples) - 1
    pad = SPECIAL_TOKENS.index("<pad>")
    inputs, positions, targets = [], [], []
    for row, (ids, learned) in enumerate(examples):
        inputs.append(ids[:-1] + [pad] * (width - len(ids) + 1))
        where = [i for i in range(len(ids) - 1) if learned[i + 1]]
        positions += [row * width + i for i in where]
        targets += [ids[i + 1] for i in where]
    return mx.array(inputs), mx.array(positions), mx.array(targets)


def initialize(model: Transformer, num_layers: int, seed: int) -> None:
    """Draw weights with deviation 0.02, or less if they write into the residual stream."""
    key = mx.random.key(seed)
    drawn = []
    parameters: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    for name, weight in parameters:
        if weight.ndim == 2:
            key, own = mx.random.split(key)
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 0.02 / (2 * num_layers) ** 0.5 if is_residual else 0.02
            drawn.append((name, scale * mx.random.normal(weight.shape, key=own)))
    model.load_weights(drawn, strict=False)


def train(out: Path, stage: Stage, model: Transformer, seed: int) -> None:
    """Run one stage and save its checkpoint in ``out``."""
    examples = Examples(Tekkenizer.from_file(out / "tekken.json"), seed, stage.mix)
    rate, steps = stage.rate, stage.steps
    rise = optim.linear_schedule(0, rate, WARM_UP_STEPS)
    fall = optim.cosine_decay(rate, stage.horizon - WARM_UP_STEPS, 0.01 * rate)
    schedule = optim.join_schedules([rise, fall], [WARM_UP_STEPS])
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.01)
    streams = [mx.new_stream(mx.default_device()) for _ in range(2)]

    def loss(inputs: mx.array, positions: mx.array, targets: mx.array) -> mx.array:
        hidden = model.hidden(inputs).flatten(0, 1)[positions]
        return nn.losses.cross_entropy(model.logits(hidden), targets, reduction="sum")

    loss_and_gradient = nn.value_and_grad(model, loss)
    mx.eval(model.parameters())
    started, smoothed = time.time(), None
    for step, halves in zip(range(1, steps + 1), examples.batches(BATCH), strict=False):
        arrays = [tensors(half) for half in halves]
        mx.eval(arrays)
        count = sum(targets.size for *_, targets in arrays)
        results = []
        for stream, half in zip(streams, arrays, strict=True):
            with mx.stream(stream):
                results.append(loss_and_gradient(*half))
        gradient = tree_map(lambda a, b, n=count: (a + b) / n, results[0][1], results[1][1])
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        value = (results[0][0] + results[1][0]) / count
        mx.eval(value, model.parameters(), optimizer.state)
        smoothed = value.item() if smoothed is None else 0.95 * smoothed + 0.05 * value.item()
        if step % 20 == 0:
            left = (time.time() - started) / step * (steps - step)
            print(
                f"step {step}/{steps}  loss {smoothed:.4f}  {left / 60:.1f} minutes left",
                file=sys.stderr,
                flush=True,
            )
        if step % 200 == 0 or step == steps:
            save(out, published(model, CONFIG))


def published(model: Transformer, config: ModelConfig) -> dict[str, mx.array]:
    """Return a model's weights in bf16 by their Hugging Face names."""
    weights: dict[str, mx.array] = {"model.embed_tokens.weight": model.embed_tokens.weight}
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for i, layer in enumerate(model.layers):
        path = f"model.layers.{i}"
        rows = mx.split(layer.self_attn.qkv_proj.parts[0].weight, [q, q + kv])
        weights |= {
            f"{path}.self_attn.{x}_proj.weight": w for x, w in zip("qkv", rows, strict=True)
        }
        gate, up = mx.split(layer.mlp.gate_up_proj.parts[0].weight, 2)
        weights |= {f"{path}.mlp.gate_proj.weight": gate, f"{path}.mlp.up_proj.weight": up}
        weights[f"{path}.self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight
        weights[f"{path}.mlp.down_proj.weight"] = layer.mlp.down_proj.weight
        weights[f"{path}.input_layernorm.weight"] = layer.input_layernorm.weight
        weights[f"{path}.post_attention_layernorm.weight"] = layer.post_attention_layernorm.weight
    weights |= {"model.norm.weight": model.norm.weight, "lm_head.weight": model.lm_head.weight}
    return {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}


def save(out: Path, weights: dict[str, mx.array]) -> None:
    """Write a checkpoint in the published layout: two shards and an index."""
    weight_map: dict[str, str] = {}
    first = [n for n in weights if re.match(r"model\.(embed|layers\.[01]\.)", n)]
    for number, names in enumerate((first, [n for n in weights if n not in first]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(
            str(out / shard), {n: weights[n] for n in sorted(names)}, {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, shard)
    total = sum(w.nbytes for w in weights.values())
    _write_json(
        out / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **ids,
        "head_dim": CONFIG.head_dim,
        "hidden_act": "silu",
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "max_position_embeddings": CONFIG.max_positions,
        "num_attention_heads": CONFIG.num_heads,
        "num_hidden_layers": CONFIG.num_layers,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "rope_theta": CONFIG.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": CONFIG.vocab_size,
    }
    _write_json(out / "config.json", config)
    _write_json(
        out / "generation_config.json",
        {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.95},
    )
    (out / "SYSTEM_PROMPT.txt").write_text(SYSTEM_PROMPT)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def use_openblas(module: str) -> None:
    """Start a module again with OpenBLAS loaded before MLX.

    MLX's Linux wheel links a BLAS that is 15 times slower.
    """
    if platform.system() != "Linux" or OPENBLAS in os.environ.get("LD_PRELOAD", ""):
        return
    try:
        ctypes.CDLL(OPENBLAS)
    except OSError:
        sys.exit(
            "error: training needs OpenBLAS, or it takes a day: apt install libopenblas0-pthread"
        )
    os.environ |= {"LD_PRELOAD": OPENBLAS, "OPENBLAS_NUM_THREADS": "1"}
    os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m magistral_mlx.training.demo.train", description=__doc__
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[2] / "demo",
        help="folder for the checkpoint (default: the embedded one)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stage",
        type=int,
        choices=(1, 2),
        default=1,
        help="2: continue from the checkpoint of stage 1",
    )
    options = parser.parse_args()
    use_openblas("magistral_mlx.training.demo.train")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(out / "tekken.json")
    if options.stage == 1:
        model = Transformer(CONFIG)
        initialize(model, CONFIG.num_layers, options.seed)
        train(out, STAGES[0], model, options.seed)
    # Load the saved checkpoint, rounded to bf16, so that starting at stage 2 gives the same.
    model = load_model(open_checkpoint(out)).result()
    model.set_dtype(mx.float32)
    train(out, STAGES[1], model, options.seed + 1)


if __name__ == "__main__":
    main()
