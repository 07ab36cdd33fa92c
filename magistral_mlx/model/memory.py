"""Plan of a model's memory: the largest context and chunk that fit."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from magistral_mlx.checkpoint.config import ModelConfig
from magistral_mlx.checkpoint.folder import Checkpoint
from magistral_mlx.checkpoint.quant_format import QuantFormat
from magistral_mlx.errors import ContextError, MemoryLimitError, in_units, named
from magistral_mlx.model.device import budget_bytes, on_gpu
from magistral_mlx.model.footprint import (
    activation_bytes,
    draft_bytes,
    kv_bytes,
    loaded_bytes,
    packed_bytes,
    workspace_bytes,
)
from magistral_mlx.model.kv_format import KVFormat
from magistral_mlx.model.load_options import DEFAULTS, LoadOptions
from magistral_mlx.options import refused

# The model card advises no more.
DEFAULT_CONTEXT = 40_960
# Prompt ids a prefill pass; beyond 2048 nothing gets faster.
CHUNKS = (2048, 1024, 512, 256, 128, 64)
# On a CPU a row costs the same in any pass, and a longer pass has larger scores.
CPU_CHUNKS = (256, 128, 64)
# Positions that a prompt leaves for a reply whose length was not asked for.
REPLY_ROOM = 256
# A default context is a multiple of this.
CONTEXT_STEP = 256
LARGER_CONTEXT = f"or load with a larger context ({named('max_kv_size')}), if the model has it"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a loaded model needs at most, and the bytes that may be used.

    Attributes:
        kv_bytes: of the cache of a full context.
        workspace_bytes: of one prefill pass.
        context: positions, prompt and reply together.
        kv_bits: 8, 4, or None for a cache that is not quantized.
        prefill_chunk: prompt ids a pass.
        draft_bytes: of a draft model: its weights, and a cache for the same context.
    """

    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    budget_bytes: int
    context: int
    kv_bits: int | None
    prefill_chunk: int
    draft_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes + self.draft_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that stay from pass to pass: weights and caches."""
        return self.total_bytes - self.workspace_bytes

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.budget_bytes

    def reply_tokens(self, prompt_tokens: int, asked: int | None) -> int:
        """Return the tokens that a reply may take: ``asked``, or at most the card's 40,960.

        A reply whose length is not asked for must have room for 256 tokens: a trace that is cut off
        before its answer is of no use.

        Raises:
            ContextError: the prompt, or what was asked for beside it, does not fit.
        """
        room = self.context - prompt_tokens
        if asked is None and 1 <= room < REPLY_ROOM:
            raise ContextError(
                f"the prompt with its system prompt and earlier turns is {prompt_tokens} tokens, "
                f"which leaves {room} of the context of {self.context} for the reply; a reply of "
                f"no given length needs {REPLY_ROOM}. Ask for at most {room} "
                f"({named('max_tokens', room)}), {LARGER_CONTEXT}"
            )
        if room < (asked or 1):
            wanted = "" if asked is None else f"{named('max_tokens')} is {asked}, but "
            less = f"ask for at most {room}" if room > 0 else "shorten it"
            raise ContextError(
                f"{wanted}the prompt with its system prompt and earlier turns is {prompt_tokens} "
                f"tokens, which leaves {max(room, 0)} of the context of {self.context} for the "
                f"reply; {less}, {LARGER_CONTEXT}"
            )
        return min(DEFAULT_CONTEXT, room) if asked is None else asked


def plan_for(
    checkpoint: Checkpoint,
    options: LoadOptions = DEFAULTS,
    *,
    draft: Checkpoint | None = None,
    on_mac: bool = False,
) -> MemoryPlan:
    """Plan for a checkpoint, and for a draft model beside it; see ``make_plan``.

    The plan is for this device, or with ``on_mac`` for a Mac's GPU.
    """
    gpu = on_mac or on_gpu()
    return make_plan(
        checkpoint.config,
        loaded_bytes(checkpoint, on_gpu=gpu),
        options,
        itemsize=activation_bytes(checkpoint, on_gpu=gpu),
        on_gpu=gpu,
        draft_bytes=None if draft is None else partial(draft_bytes, draft, on_gpu=gpu),
    )


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
        config: of the model.
        weights_bytes: bytes of the loaded weights.
        options: a context that they do not ask for is at most 40,960.
        itemsize: bytes of the activations' type.
        on_gpu: the model runs on a GPU.
        draft_bytes: returns the bytes of a draft model for a context.

    Raises:
        MemoryLimitError: nothing fits, or not the context asked for; the message names what fits.
        OptionError: the model has no such context, or its head size allows no quantized cache.
    """
    context = options.max_kv_size
    if context is not None and not (type(context) is int and 1 <= context <= config.max_positions):
        raise refused("max_kv_size", context, f"1 to {config.max_positions:,}, as the model allows")
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
        """Find the largest context that fits, by bisection: all bytes grow with it."""
        most = min(config.max_positions, DEFAULT_CONTEXT)
        lengths = [most, *range((most - 1) // CONTEXT_STEP * CONTEXT_STEP, 0, -CONTEXT_STEP)]
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
    wanted = plan(context or min(CONTEXT_STEP, config.max_positions), chunks[-1], kv_bits)
    ways = [] if context is None else [(kv_bits, largest(kv_bits))]
    if config.head_dim % 32 == 0:
        ways += [(bits, largest(bits)) for bits in (8, 4) if kv_bits is None or bits < kv_bits]
    raise MemoryLimitError(_refusal(wanted, ways, _recipe_that_fits(config, wanted)))


def _first_that_fits(plans: Iterable[MemoryPlan]) -> MemoryPlan | None:
    return next((plan for plan in plans if plan.fits), None)


def _recipe_that_fits(config: ModelConfig, wanted: MemoryPlan) -> int | None:
    """Return the most bits a weight with which the rest of the plan fits, if any."""
    free = wanted.budget_bytes - (wanted.total_bytes - wanted.weights_bytes)
    sizes = {bits: packed_bytes(config, QuantFormat(bits, 64)) for bits in (8, 6, 5, 4, 3, 2)}
    return next(
        (bits for bits, size in sizes.items() if size <= free and size < wanted.weights_bytes), None
    )


def _refusal(
    wanted: MemoryPlan, ways: Sequence[tuple[int | None, MemoryPlan | None]], recipe: int | None
) -> str:
    """Return the message that names what does not fit, and what does."""
    draft = f", draft model {in_units(wanted.draft_bytes)}" if wanted.draft_bytes else ""
    message = (
        f"a context of {wanted.context:,} needs {in_units(wanted.total_bytes)} (weights "
        f"{in_units(wanted.weights_bytes)}, KV cache {in_units(wanted.kv_bytes)}, workspace "
        f"{in_units(wanted.workspace_bytes)}{draft}), and {in_units(wanted.budget_bytes)} may be "
        "used; "
    )
    fitting = [
        f"a context of {plan.context:,} ({named('max_kv_size', plan.context)})"
        + (
            f" with {'an' if bits == 8 else 'a'} {bits}-bit cache ({named('kv_bits', bits)})"
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
            message + "no context fits beside these weights and a draft model: "
            f"leave {named('draft_model')} out"
        )
    return (
        message
        + "no context fits beside these weights, nor beside 2-bit ones: it takes a larger machine"
    )
