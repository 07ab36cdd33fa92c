"""Load a validated checkpoint into a Transformer, with the projections of one input fused."""

import logging
import re
from collections.abc import Generator, Mapping, Sequence

import mlx.core as mx
from mlx import nn

from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import CheckpointError
from magistral_mlx.model.device import check_temporary_folder
from magistral_mlx.model.transformer import FusedLinear, Transformer
from magistral_mlx.streams import Progress, streamed

log = logging.getLogger(__name__)

# The GPUs of M1 (g13) and M2 (g14) compute bfloat16 in float32. In float16, which they have,
# prefill was reported 34 % and decode 14 % faster.
GPUS_WITHOUT_BFLOAT16 = re.compile("applegpu_g1[34]")
PROBE_IDS = 64


class _HalfOverflowError(Exception):
    """A value that is stored as bfloat16, or computed from one, leaves the range of float16."""


@streamed
def load_model(checkpoint: Checkpoint) -> Generator[Progress, None, Transformer]:
    """Load layer by layer; a stream of the bytes loaded, whose result is the model.

    On a CPU, weights that are not packed become float32: MLX accumulates in the activations' type,
    and bf16 is slow and 9 % off. On a GPU they keep the checkpoint's type. On an M1 or M2, bfloat16
    becomes float16 if neither the weights nor a first pass overflow it. Only tensors that are being
    fused are in memory twice: gate and up, half a layer, less than lm_head, which comes later.

    Raises:
        CheckpointError: a scale, a bias or a norm's weight is not finite, or a file is changed
            meanwhile.
        OptionError: there is no temporary folder to compile a CPU's kernels in.
    """
    check_temporary_folder()
    if mx.default_device().type == mx.DeviceType.cpu:
        return (yield from _load(checkpoint, {mx.bfloat16: mx.float32, mx.float16: mx.float32}))
    device = mx.device_info()
    if GPUS_WITHOUT_BFLOAT16.match(str(device.get("architecture"))):
        try:
            model = yield from _load(checkpoint, {mx.bfloat16: mx.float16})
            log.info("%s: float16 instead of bfloat16, which this GPU lacks", device["device_name"])
            return model
        except _HalfOverflowError as error:
            log.warning("%s overflows float16; bfloat16 stays, though slower on this GPU", error)
    return (yield from _load(checkpoint, {}))


def _load(
    checkpoint: Checkpoint, dtypes: Mapping[mx.Dtype, mx.Dtype]
) -> Generator[Progress, None, Transformer]:
    """Load, and convert the types that are keys of ``dtypes``."""
    weights = _Weights(checkpoint, dtypes)
    model = Transformer(checkpoint.config)
    model.embed_tokens = weights.embedding("model.embed_tokens")
    yield weights.settle(model.embed_tokens)
    for i, layer in enumerate(model.layers):
        path = f"model.layers.{i}"
        layer.input_layernorm.weight = weights.take(f"{path}.input_layernorm.weight")
        layer.self_attn.qkv_proj = weights.fused([f"{path}.self_attn.{x}_proj" for x in "qkv"])
        layer.self_attn.o_proj = weights.linear([f"{path}.self_attn.o_proj"])
        layer.post_attention_layernorm.weight = weights.take(
            f"{path}.post_attention_layernorm.weight"
        )
        layer.mlp.gate_up_proj = weights.fused([f"{path}.mlp.{x}_proj" for x in ("gate", "up")])
        layer.mlp.down_proj = weights.linear([f"{path}.mlp.down_proj"])
        yield weights.settle(layer)
    model.norm.weight = weights.take("model.norm.weight")
    if not checkpoint.config.tie_word_embeddings:
        model.lm_head = weights.linear(["lm_head"])
    yield weights.settle(model)
    model.eval()
    if mx.float16 in dtypes.values():
        _probe(model, checkpoint.config.vocab_size)
    # The parts of fused weights are freed, in sizes that no pass can use again.
    mx.clear_cache()
    return model


def _probe(model: Transformer, vocab_size: int) -> None:
    """Run one pass over ids from the whole vocabulary.

    Activations are largest at a sequence's first position.

    Source: https://arxiv.org/abs/2402.17762 (massive activations).
    """
    ids = mx.arange(0, vocab_size, -(-vocab_size // PROBE_IDS))
    if not mx.isfinite(model(ids[None])).all().item():
        raise _HalfOverflowError("an activation")


class _Weights:
    """Tensors of the checkpoint, made into modules and freed when these are in memory."""

    def __init__(self, checkpoint: Checkpoint, dtypes: Mapping[mx.Dtype, mx.Dtype]) -> None:
        self.checkpoint = checkpoint
        self.is_half = mx.float16 in dtypes.values()
        self.tensors = {
            name: array.astype(dtypes.get(array.dtype, array.dtype))
            for name, array in checkpoint.tensors().items()
        }
        self.total = sum(array.nbytes for array in self.tensors.values())
        self.done = 0
        self.taken: dict[str, mx.array] = {}

    def take(self, name: str) -> mx.array:
        self.taken[name] = self.tensors.pop(name)
        return self.taken[name]

    def settle(self, module: nn.Module) -> Progress:
        """Bring a finished module into memory, check its tensors and free them."""
        try:
            mx.eval(module.parameters())
        except RuntimeError:
            # MLX says only that it could not read.
            self.checkpoint.check_unchanged()
            raise
        checks = {
            name: mx.isfinite(array).all()
            for name, array in self.taken.items()
            if mx.issubdtype(array.dtype, mx.floating)
            and (self.is_half or array.ndim == 1 or name.endswith((".scales", ".biases")))
        }
        mx.eval(checks)
        for name, is_finite in checks.items():
            if not is_finite.item():
                # If the file itself is damaged, loading it as it is will tell.
                if self.is_half:
                    raise _HalfOverflowError(f"tensor {name!r}")
                raise CheckpointError(
                    f"{self.checkpoint.folder}: tensor {name!r} holds NaN or infinity; the file "
                    "is damaged: download or convert it again"
                )
        self.done += sum(array.nbytes for array in self.taken.values())
        self.taken.clear()
        return Progress(self.done, self.total)

    def linear(self, modules: Sequence[str]) -> nn.Module:
        """Make one linear of the rows of ``modules``, which have one format."""
        quant = self.checkpoint.formats[modules[0]]
        if quant is None:
            layer: nn.Module = nn.Linear(1, 1, bias=False)
        else:
            layer = nn.QuantizedLinear(
                quant.group_size, 32, False, quant.group_size, quant.bits, quant.mode
            )
        return self.fill(layer, modules, quant)

    def embedding(self, module: str) -> nn.Module:
        quant = self.checkpoint.formats[module]
        if quant is None:
            layer: nn.Module = nn.Embedding(1, 1)
        else:
            layer = nn.QuantizedEmbedding(
                32, quant.group_size, quant.group_size, quant.bits, quant.mode
            )
        return self.fill(layer, [module], quant)

    def fill(
        self, layer: nn.Module, modules: Sequence[str], quant: QuantFormat | None
    ) -> nn.Module:
        """Replace a layer's placeholder arrays by the rows of ``modules``, one below the other."""
        for kind in ("weight",) if quant is None else quant.packed_shapes((0, 0)):
            parts = [self.take(f"{module}.{kind}") for module in modules]
            layer[kind] = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
        # At once: the plan may have no room for the parts of a whole layer beside it.
        self.settle(layer)
        return layer

    def fused(self, modules: Sequence[str]) -> FusedLinear:
        """Fuse projections of one input: one linear for each format among them."""
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
        return FusedLinear(linears, [places[module] for module in modules])
