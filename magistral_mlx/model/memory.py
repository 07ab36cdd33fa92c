"""What a model needs in memory, and the largest context and chunk that fit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.checkpoint.safetensors_header import FLOATS, itemsize
from magistral_mlx.errors import ContextError, MemoryLimitError, OptionError, in_units, quoted
from magistral_mlx.model.device import budget_bytes, on_gpu
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.load_options import DEFAULTS, LoadOptions

DEFAULT_CONTEXT = 40_960  # the model card advises no more
CHUNKS = (
    2048,
    1024,
    512,
    256,
    128,
    64,
)  # prompt ids a prefill pass; beyond 2048 nothing gets faster
CPU_CHUNKS = (
    256,
    128,
    64,
)  # there a row costs the same in any pass, and a longer one has larger scores
REPLY_ROOM = (
    256  # positions that a prompt leaves for its reply, unless the reply's length was asked for
)
STEP = 256  # a context that we choose is a multiple of this
FUSED_HEAD_DIMS = (
    64,
    80,
    128,
)  # those MLX's Metal attention kernel takes; others build a score matrix


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a loaded model will need at most, in bytes, and what there is."""

    weights_bytes: int
    kv_bytes: int  # of a full context
    workspace_bytes: int  # of one prefill pass
    budget_bytes: int
    context: int  # positions, prompt and reply together
    kv_bits: int | None
    prefill_chunk: int  # prompt ids a pass
    draft_bytes: int = 0  # of a draft model: weights, and a cache for the same context

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.draft_bytes

    @property
    def held_bytes(self) -> int:
        """What stays from pass to pass: weights and caches."""
        return self.total_bytes - self.workspace_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.budget_bytes

    def reply_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """What a reply may take: as asked, or the card's 40,960, beside its prompt in the context.

        Not asked for, it must be 256 at least: a trace cut off before its answer is of no use.

        Raises:
            ContextError: the prompt, or what was asked for beside it, does not fit.
        """
        room = self.context - prompt_tokens
        if room < (REPLY_ROOM if asked is None else 1):
            least = "" if room < 1 else f", ask for a reply of at most {room} (--max-tokens)"
            raise ContextError(
                f"the prompt is {prompt_tokens} tokens and the context {self.context}, which "
                f"leaves {max(room, 0)} for the reply; shorten it{least}, or load with a larger "
                "context (--max-kv-size), if the model has it"
            )
        if asked is not None and asked > room:
            raise ContextError(
                f"max_tokens is {asked}, but beside a prompt of {prompt_tokens} tokens the "
                f"context of {self.context} has room for {room}; ask for less, or load with a "
                "larger context (--max-kv-size), if the model has it"
            )
        return min(DEFAULT_CONTEXT, room) if asked is None else asked


def kv_bytes(
    config: ModelConfig, tokens: int, *, kv_bits: int | None = None, itemsize: int = 2
) -> int:
    """Bytes the KV cache holds for ``tokens`` positions.

    Keys and values of ``[L, K, tokens, d]``: 160 KiB a token for Magistral Small in bf16. Packed ones
    have a scale and a bias of ``itemsize`` bytes for each group of 64 (32 where 64 does not divide d).

    Raises:
        OptionError: ``tokens`` is over ``config.max_positions``, or ``kv_bits`` is not 8, 4 or None.
    Source: https://arxiv.org/abs/2305.13245 (grouped-query attention).
    """
    if tokens > config.max_positions:
        raise OptionError(f"{tokens} positions are asked for; the model has {config.max_positions}")
    row = KVFormat.of(kv_bits, config.head_dim).row_bytes(config.head_dim, itemsize)
    return 2 * config.num_layers * config.num_kv_heads * row * tokens


def workspace_bytes(
    config: ModelConfig,
    chunk: int,
    context: int,
    *,
    itemsize: int,
    on_gpu: bool,
    kv_bits: int | None = None,
) -> int:
    """Bytes beside weights and cache while a chunk of ``chunk`` ids is read at the end of ``context`` positions.

    MLX runs about ten operations ahead of the device, and what they write is held together: most of one layer's
    activations, whose share of each width was measured on a CPU, in models of four layers and more (of two they are
    less: the last reads few positions); of a packed cache, almost two layers' keys and values unpacked; and where
    attention is not fused, as on a CPU, its float32 scores [H, chunk, context].
    Sampling comes after, and holds a few times the logits. A cache that grows holds one layer twice, between passes.
    """
    D, F, H, K, d = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )
    activations = int(chunk * (7 * D + 3 * F + 7.4 * (H + K) * d) * itemsize)
    unpacked = 0 if kv_bits is None else int(1.85 * 2 * K * context * d * itemsize)
    is_fused = on_gpu and d in FUSED_HEAD_DIMS
    scores = 0 if is_fused else (4 * H + 1) * chunk * context  # and a mask of one byte
    logits = 48 * config.vocab_size
    layer = kv_bytes(config, context, kv_bits=kv_bits, itemsize=itemsize) // config.num_layers
    return max(activations + unpacked + scores, logits, layer)


def resident_bytes(checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Bytes the weights take once loaded: as stored on a GPU; on a CPU what is not packed becomes float32."""
    return sum(
        entry.nbytes
        if on_gpu or entry.dtype not in FLOATS
        else entry.nbytes // itemsize(entry.dtype) * 4
        for shard in checkpoint.shards
        for entry in shard.header.values()
    )


def packed_bytes(config: ModelConfig, quant: QuantFormat) -> int:
    """Bytes of a checkpoint whose matrices are all packed as ``quant`` (affine), the rest in bf16."""
    total = 0
    for shape in config.shapes.values():
        if len(shape) == 1:
            total += 2 * shape[0]
            continue
        for kind, (rows, columns) in quant.packed_shapes(shape).items():
            total += rows * columns * (4 if kind == "weight" else 2)
    return total


def plan_for(
    checkpoint: Checkpoint, options: LoadOptions = DEFAULTS, *, draft: Checkpoint | None = None
) -> MemoryPlan:
    """Plan for a checkpoint on this device, and for a draft model beside it; see ``make_plan``."""
    gpu = on_gpu()
    return make_plan(
        checkpoint.config,
        resident_bytes(checkpoint, on_gpu=gpu),
        options,
        itemsize=_itemsize(checkpoint, on_gpu=gpu),
        on_gpu=gpu,
        draft_bytes=None if draft is None else partial(draft_bytes, draft, on_gpu=gpu),
    )


def draft_bytes(draft: Checkpoint, tokens: int, *, on_gpu: bool) -> int:
    """Bytes a draft model takes: its weights, and a cache for ``tokens`` positions, as far as its context goes."""
    positions = min(tokens, draft.config.max_positions)
    cache = kv_bytes(draft.config, positions, itemsize=_itemsize(draft, on_gpu=on_gpu))
    return resident_bytes(draft, on_gpu=on_gpu) + cache


def _itemsize(checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Bytes of the activations' type."""
    stored = {entry.dtype for shard in checkpoint.shards for entry in shard.header.values()}
    return max(map(itemsize, stored & FLOATS)) if on_gpu else 4


def make_plan(
    config: ModelConfig,
    weights_bytes: int,
    options: LoadOptions = DEFAULTS,
    *,
    itemsize: int = 2,
    on_gpu: bool = True,
    draft_bytes: Callable[[int], int] | None = None,
) -> MemoryPlan:
    """Find the largest context that fits, and for it the largest chunk.

    Args:
        weights_bytes: the weights once loaded.
        options: what was asked for; a context that was not asked for is at most 40,960.
        itemsize: bytes of the activations' type.
        draft_bytes: the bytes that a draft model takes for a context.
    Raises:
        MemoryLimitError: nothing fits, or not the context asked for; the message names what would.
        OptionError: the model has no such context, or its head size allows no quantized cache.
    """
    context = options.max_kv_size
    if context is not None and not (type(context) is int and 1 <= context <= config.max_positions):
        raise OptionError(
            f"the context is {quoted(context)}; this model has from 1 to {config.max_positions} "
            "positions"
        )
    kv_bits = KVFormat.of(options.kv_bits, config.head_dim).bits
    budget = budget_bytes(options.memory_gb)
    step = options.prefill_step_size
    chunks = (CHUNKS if on_gpu else CPU_CHUNKS) if step is None else (step,)

    def plan(tokens: int, chunk: int, bits: int | None) -> MemoryPlan:
        rows = min(chunk, tokens)
        workspace = workspace_bytes(
            config, rows, tokens, itemsize=itemsize, on_gpu=on_gpu, kv_bits=bits
        )
        cache = kv_bytes(config, tokens, kv_bits=bits, itemsize=itemsize)
        beside = 0 if draft_bytes is None else draft_bytes(tokens)
        return MemoryPlan(weights_bytes, cache, workspace, budget, tokens, bits, chunk, beside)

    def largest(bits: int | None) -> MemoryPlan | None:
        """The largest context that fits, or None; every byte grows with it, so it can be searched by halves."""
        most = min(config.max_positions, DEFAULT_CONTEXT)
        lengths = [most, *range((most - 1) // STEP * STEP, 0, -STEP)]
        low, high = 0, len(lengths)
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (low, middle)
                if plan(lengths[middle], chunks[-1], bits).fits
                else (middle + 1, high)
            )
        return (
            None
            if low == len(lengths)
            else _first_that_fits(plan(lengths[low], chunk, bits) for chunk in chunks)
        )

    found = (
        largest(kv_bits)
        if context is None
        else _first_that_fits(plan(context, c, kv_bits) for c in chunks)
    )
    if found is not None:
        return found
    wanted = plan(context or min(STEP, config.max_positions), chunks[-1], kv_bits)
    ways = [] if context is None else [(kv_bits, largest(kv_bits))]
    if config.head_dim % 32 == 0:
        ways += [(bits, largest(bits)) for bits in (8, 4) if kv_bits is None or bits < kv_bits]
    raise MemoryLimitError(_refusal(wanted, ways, _recipe_that_fits(config, wanted)))


def _first_that_fits(plans: Iterable[MemoryPlan]) -> MemoryPlan | None:
    return next((plan for plan in plans if plan.fits), None)


def _recipe_that_fits(config: ModelConfig, wanted: MemoryPlan) -> int | None:
    """The most bits a weight, below those it has, with which everything else would fit as it is."""
    room = wanted.budget_bytes - (wanted.total_bytes - wanted.weights_bytes)
    sizes = {bits: packed_bytes(config, QuantFormat(bits, 64)) for bits in (8, 6, 5, 4, 3, 2)}
    return next(
        (bits for bits, size in sizes.items() if size <= room and size < wanted.weights_bytes), None
    )


def _refusal(
    wanted: MemoryPlan,
    ways: Sequence[tuple[int | None, MemoryPlan | None]],
    recipe: int | None,
) -> str:
    """What does not fit, and what would."""
    draft = f", draft model {in_units(wanted.draft_bytes)}" if wanted.draft_bytes else ""
    message = (
        f"a context of {wanted.context:,} needs {in_units(wanted.total_bytes)} (weights "
        f"{in_units(wanted.weights_bytes)}, KV cache {in_units(wanted.kv_bytes)}, workspace "
        f"{in_units(wanted.workspace_bytes)}{draft}), and {in_units(wanted.budget_bytes)} may be "
        "used; "
    )
    fitting = [
        f"a context of {plan.context:,} (--max-kv-size {plan.context})"
        + (
            f" with {'an' if bits == 8 else 'a'} {bits}-bit cache (--kv-bits {bits})"
            if bits
            else ""
        )
        for bits, plan in ways
        if plan is not None
    ]
    if recipe is not None:
        fitting.append(
            f"this context with weights of {recipe} bits (magistral convert --q-bits {recipe})"
        )
    if fitting:
        return message + "what fits: " + ", or ".join(fitting)
    if wanted.draft_bytes:
        return (
            message
            + "no context fits beside these weights and a draft model: leave --draft-model out"
        )
    return (
        message
        + "no context fits beside these weights, nor beside 2-bit ones: it takes a larger machine"
    )
