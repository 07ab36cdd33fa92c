"""Train stages 3 and 4 of the embedded model in PyTorch, from the weights of train.py.

Run ``python -m magistral_mlx.training.demo.refine --out DIR --stage N``, where DIR holds the
checkpoint of the stage before. MLX has no bf16 kernels for a CPU: PyTorch takes a fourth of its
time. A stopped run goes on where it was last saved. Letters: B examples, T ids in each, H query
heads, K key/value heads, d head size.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch.nn import functional

from magistral_mlx.training.demo.examples import WITH_CALCULATOR, WITH_TOOLS, Examples, Mix
from magistral_mlx.training.demo.script import Example
from magistral_mlx.training.demo.train import CONFIG, save, tensors

Weights = dict[str, torch.Tensor]

STATE_FILE = "refine.pt"
SAVE_STEPS = 50
WARM_UP_STEPS = 50


@dataclass(frozen=True, slots=True)
class Plan:
    """A run of AdamW at a constant rate, which falls to zero in the last ``decay_steps``."""

    steps: int
    decay_steps: int
    rate: float
    batch: int
    mix: Mix

    def rate_at(self, step: int) -> float:
        return self.rate * min(
            1.0, step / WARM_UP_STEPS, (self.steps - step + 1) / self.decay_steps
        )


# New abilities first, then all of them while the rate falls.
PLANS = (
    Plan(steps=300, decay_steps=1, rate=8e-4, batch=24, mix=WITH_TOOLS),
    Plan(steps=1050, decay_steps=1000, rate=8e-4, batch=24, mix=WITH_CALCULATOR),
)


def load_weights(folder: Path) -> Weights:
    """Return a checkpoint's weights in float32 by their Hugging Face names."""
    found: dict[str, mx.array] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= mx.load(str(shard))  # type: ignore[arg-type]
    return {
        name: torch.from_numpy(np.array(array.astype(mx.float32))).requires_grad_()
        for name, array in sorted(found.items())
    }


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate heads [B, n, T, d] by their positions 0 to T - 1."""
    half = CONFIG.head_dim // 2
    frequencies = CONFIG.rope_theta ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[2])[:, None] * frequencies  # [T, d/2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend causally from q to k and v, all [B, H, T, d]; twice as fast as the fused kernel."""
    (B, H, T, d), bias = q.shape, torch.full(q.shape[2:3] * 2, -1e4).triu(1).to(q.dtype)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=d**-0.5)
    return (scores.softmax(-1).to(v.dtype) @ v.flatten(0, 1)).view(B, H, T, d)


def logits(weights: Weights, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, V] at the flat ``positions`` [n] of ids [B, T]."""
    H, K, d = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim

    def normalized(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], CONFIG.rms_norm_eps)

    def linear(x: torch.Tensor, *names: str) -> torch.Tensor:
        return functional.linear(x, torch.cat([weights[f"{name}.weight"] for name in names]))

    x = functional.embedding(ids, weights["model.embed_tokens.weight"])
    for i in range(CONFIG.num_layers):
        path = f"model.layers.{i}"
        y = normalized(x, f"{path}.input_layernorm")
        y = linear(y, *(f"{path}.self_attn.{p}_proj" for p in "qkv"))
        q, k, v = y.unflatten(-1, (-1, d)).transpose(1, 2).split([H, K, K], dim=1)
        qk = rotate(torch.cat([q, k], dim=1))
        q, k = qk[:, :H], qk[:, H:].repeat_interleave(H // K, 1)
        o = attend(q, k, v.repeat_interleave(H // K, 1))
        x = x + linear(o.transpose(1, 2).flatten(2), f"{path}.self_attn.o_proj")
        y = normalized(x, f"{path}.post_attention_layernorm")
        gate, up = linear(y, f"{path}.mlp.gate_proj", f"{path}.mlp.up_proj").chunk(2, dim=-1)
        x = x + linear(functional.silu(gate) * up, f"{path}.mlp.down_proj")
    return linear(normalized(x.flatten(0, 1)[positions], "model.norm"), "lm_head")


def loss_and_gradient(
    weights: Weights, examples: list[Example]
) -> tuple[float, int, tuple[torch.Tensor, ...]]:
    """Return the summed loss of the learned ids, their count, and the gradient of the sum."""
    ids, positions, targets = (torch.from_numpy(np.array(a)).long() for a in tensors(examples))
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(weights, ids, positions)
    loss = functional.cross_entropy(found.float(), targets, reduction="sum")
    return loss.item(), len(targets), torch.autograd.grad(loss, list(weights.values()))


def refine(out: Path, plan: Plan, seed: int) -> None:
    """Run a plan on the checkpoint in ``out``, or go on with it, and save there."""
    # A step has two halves, each on a thread of its own.
    torch.set_num_threads(1)
    weights = load_weights(out)
    parameters = list(weights.values())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    done, state = 0, out / STATE_FILE
    if state.exists():
        found = torch.load(state)
        done = found["step"]
        optimizer.load_state_dict(found["optimizer"])
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(found["weights"][name])
    examples = Examples(Tekkenizer.from_file(out / "tekken.json"), seed, plan.mix)
    batches: Iterator[list[list[Example]]] = islice(examples.batches(plan.batch), done, plan.steps)
    started, smoothed = time.time(), 0.0
    with ThreadPoolExecutor(2) as threads:
        for step, halves in enumerate(batches, start=done + 1):
            results = list(threads.map(lambda half: loss_and_gradient(weights, half), halves))
            count = sum(n for _, n, _ in results)
            for parameter, *parts in zip(parameters, *(g for *_, g in results), strict=True):
                parameter.grad = sum(parts[1:], parts[0]) / count
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = plan.rate_at(step)
            optimizer.step()
            value = sum(loss for loss, *_ in results) / count
            smoothed = 0.95 * smoothed + 0.05 * value if step > done + 1 else value
            if step % 10 == 0:
                pace = (time.time() - started) / (step - done)
                print(
                    f"step {step}/{plan.steps}  loss {smoothed:.4f}  {pace:.1f} s a step",
                    file=sys.stderr,
                    flush=True,
                )
            if step % SAVE_STEPS == 0 or step == plan.steps:
                kept = {name: weight.detach() for name, weight in weights.items()}
                part = state.with_suffix(".part")
                torch.save(
                    {"step": step, "weights": kept, "optimizer": optimizer.state_dict()}, part
                )
                part.replace(state)
    save(out, {n: mx.array(w.detach().numpy()).astype(mx.bfloat16) for n, w in weights.items()})
    state.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m magistral_mlx.training.demo.refine", description=__doc__
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the checkpoint, which is replaced"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--stage", type=int, choices=(3, 4), required=True, help="4 continues from stage 3"
    )
    options = parser.parse_args()
    refine(options.out, PLANS[options.stage - 3], options.seed + options.stage - 1)


if __name__ == "__main__":
    main()
