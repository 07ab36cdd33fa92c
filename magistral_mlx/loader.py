"""A validated checkpoint -> a Transformer holding its weights, projections of one input joined."""

from collections.abc import Generator, Sequence

import mlx.core as mx
from mlx import nn

from magistral_mlx.checkpoint import Checkpoint
from magistral_mlx.config import QuantFormat
from magistral_mlx.errors import CheckpointError
from magistral_mlx.model import Joint, Transformer


def load_model(checkpoint: Checkpoint) -> Generator[tuple[int, int], None, Transformer]:
    """Load layer by layer; yields (bytes loaded, bytes in all) and returns the model.

    What is not packed becomes float32 on a CPU, where MLX accumulates in the activations' type and bf16
    is both slow and 9 % off; on a GPU it keeps the checkpoint's own type. At most one layer's weights
    are in memory twice, while its projections are joined.

    Raises:
        CheckpointError: a scale, a bias or a norm's weight is not finite.
    """
    weights = _Weights(checkpoint)
    model = Transformer(checkpoint.config)
    model.embed_tokens = weights.embedding("model.embed_tokens")
    yield weights.settle(model.embed_tokens)
    for i, layer in enumerate(model.layers):
        path = f"model.layers.{i}"
        layer.input_layernorm.weight = weights.take(f"{path}.input_layernorm.weight")
        layer.self_attn.qkv_proj = weights.joint([f"{path}.self_attn.{x}_proj" for x in "qkv"])
        layer.self_attn.o_proj = weights.linear([f"{path}.self_attn.o_proj"])
        layer.post_attention_layernorm.weight = weights.take(f"{path}.post_attention_layernorm.weight")
        layer.mlp.gate_up_proj = weights.joint([f"{path}.mlp.{x}_proj" for x in ("gate", "up")])
        layer.mlp.down_proj = weights.linear([f"{path}.mlp.down_proj"])
        yield weights.settle(layer)
    model.norm.weight = weights.take("model.norm.weight")
    if not checkpoint.config.tie_word_embeddings:
        model.lm_head = weights.linear(["lm_head"])
        yield weights.settle(model.lm_head)
    model.eval()
    return model


class _Weights:
    """The checkpoint's tensors, handed out as modules and let go once these are in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        self.checkpoint = checkpoint
        self.tensors = {
            name: array.astype(mx.float32) if on_cpu and mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in checkpoint.tensors().items()
        }
        self.total = sum(array.nbytes for array in self.tensors.values())
        self.done = 0
        self.taken: dict[str, mx.array] = {}

    def take(self, name: str) -> mx.array:
        self.taken[name] = self.tensors.pop(name)
        return self.taken[name]

    def settle(self, module: nn.Module) -> tuple[int, int]:
        """Bring a finished module into memory, check what was taken for it and let that go."""
        mx.eval(module.parameters())
        checks = {
            name: mx.isfinite(array).all()
            for name, array in self.taken.items()
            if mx.issubdtype(array.dtype, mx.floating) and (array.ndim == 1 or name.endswith((".scales", ".biases")))
        }
        mx.eval(checks)
        for name, is_finite in checks.items():
            if not is_finite.item():
                raise CheckpointError(
                    f"{self.checkpoint.folder}: tensor {name!r} holds NaN or infinity; the file is damaged: "
                    "download or convert it again"
                )
        self.done += sum(array.nbytes for array in self.taken.values())
        self.taken.clear()
        return self.done, self.total

    def linear(self, modules: Sequence[str]) -> nn.Module:
        """One linear of the rows of ``modules``, which have one format."""
        quant = self.checkpoint.formats[modules[0]]
        if quant is None:
            layer: nn.Module = nn.Linear(1, 1, bias=False)
        else:
            layer = nn.QuantizedLinear(quant.group_size, 32, False, quant.group_size, quant.bits, quant.mode)
        return self.fill(layer, modules, quant)

    def embedding(self, module: str) -> nn.Module:
        quant = self.checkpoint.formats[module]
        if quant is None:
            layer: nn.Module = nn.Embedding(1, 1)
        else:
            layer = nn.QuantizedEmbedding(32, quant.group_size, quant.group_size, quant.bits, quant.mode)
        return self.fill(layer, [module], quant)

    def fill(self, layer: nn.Module, modules: Sequence[str], quant: QuantFormat | None) -> nn.Module:
        """Replace a layer's placeholder arrays; packed rows of several modules lie one below the other."""
        for kind in ("weight",) if quant is None else quant.packed_shapes((0, 0)):
            parts = [self.take(f"{module}.{kind}") for module in modules]
            layer[kind] = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        return layer

    def joint(self, modules: Sequence[str]) -> Joint:
        """Projections of one input: one linear for each format among them."""
        groups: dict[QuantFormat | None, list[str]] = {}
        for module in modules:
            groups.setdefault(self.checkpoint.formats[module], []).append(module)
        rows = {module: self.tensors[f"{module}.weight"].shape[0] for module in modules}
        linears = [self.linear(group) for group in groups.values()]
        places: dict[str, tuple[int, int, int]] = {}
        for part, group in enumerate(groups.values()):
            start = 0
            for module in group:
                places[module] = (part, start, start + rows[module])
                start += rows[module]
        return Joint(linears, [places[module] for module in modules])
