"""The recipe ``auto``: spend bits on the matrices where they lower the error most.

Each matrix's error is predicted for each number of bits from some of its rows. Then bits are
raised step by step where a step saves most error a byte (a greedy knapsack).
"""

from collections.abc import Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import AFFINE_BITS, QuantFormat
from magistral_mlx.convert.calibration.forward import MeanSquares
from magistral_mlx.convert.calibration.resumable_pass import ResumablePass
from magistral_mlx.convert.methods.error import OutputError
from magistral_mlx.convert.methods.search import quantize_weighted
from magistral_mlx.convert.packing import cast
from magistral_mlx.convert.recipe.layout import Plan, in_order, make_plan, packed_sizes
from magistral_mlx.convert.recipe.options import ConvertOptions
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source
from magistral_mlx.convert.threads import unordered
from magistral_mlx.errors import OptionError
from magistral_mlx.streams import Progress

# Rows of each matrix that its error is predicted from.
SAMPLE_ROWS = 128

# By module path, then by bits.
Table = Mapping[str, Mapping[int, float]]


def check_target(plan: Plan, target_bits: float, source: Source, options: ConvertOptions) -> None:
    """Raise OptionError if ``target_bits`` is below ``plan``'s bits or above 8 bits everywhere."""
    least = plan.bits_per_weight
    # This form refuses NaN as well.
    if not target_bits >= least:
        raise OptionError(
            f"target_bits {target_bits:g} is out of reach: {min(plan.bits.values())} bit "
            f"everywhere takes {least:.3f} bits a weight, scales included; use at least "
            f"{least + 0.005:.2f}, or a larger group size"
        )
    formats = dict.fromkeys(plan.formats, QuantFormat(max(AFFINE_BITS), group_size(plan)))
    most = make_plan(source.config, source.float_type, options, formats=formats).bits_per_weight
    if target_bits > most:
        raise OptionError(
            f"target_bits {target_bits:g} is out of reach: {max(AFFINE_BITS)} bit everywhere "
            f"takes {most:.3f} bits a weight; use the recipe {max(AFFINE_BITS)}bit instead of auto"
        )


def choose_bits(
    source: Source, plan: Plan, options: ConvertOptions, ids: mx.array, folder: Path
) -> Generator[Progress, None, tuple[Plan, MeanSquares]]:
    """Collect statistics in one forward pass, then choose the bits of each matrix.

    Args:
        source: the checkpoint to convert.
        plan: the plan with the fewest bits everywhere.
        options: with ``target_bits``.
        ids: ``[B, T]``, for the pass.
        folder: for the saved states of the pass.

    Returns:
        The plan to carry out, and the statistics.
    """
    assert options.target_bits is not None
    statistics = MeanSquares(source)
    forward = ResumablePass(folder, source, ids, statistics)
    steps = in_order(source.config)
    sizes = [sum(map(source.nbytes_of, names)) for names in steps]
    while forward.steps_done < len(steps):
        forward.advance()
        forward.keep()
        yield Progress(sum(sizes[: forward.steps_done]), sum(sizes), "statistics")
    errors: dict[str, dict[int, float]] = {}
    jobs = (
        partial(_predicted, source, module, statistics.squares[module], plan)
        for module in plan.formats
    )
    with closing(unordered(jobs)) as done:
        for module, predicted in done:
            errors[module] = predicted
            yield Progress(sum(sizes), sum(sizes), f"prediction for {module}")
    ordered = {module: errors[module] for module in plan.formats}
    budget = int(options.target_bits * plan.num_parameters / 8) - plan.tensor_bytes
    bits = allocate_bits(
        ordered,
        {module: packed_sizes(source, module, group_size(plan)) for module in ordered},
        budget,
    )
    formats = {module: QuantFormat(bits[module], group_size(plan)) for module in plan.formats}
    return make_plan(source.config, source.float_type, options, formats=formats), statistics


def allocate_bits(
    errors: Table, sizes: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Raise bits from the fewest, each time by the step that saves most error a byte.

    Args:
        errors: relative squared error of each matrix's outputs by its bits; all count alike.
        sizes: bytes of each matrix by its bits.
        budget: bytes to spend beyond the fewest bits.

    Returns:
        Bits by module path.
    """
    bits = {module: min(table) for module, table in errors.items()}

    def gain(module: str, more: int) -> float:
        saved = errors[module][bits[module]] - errors[module][more]
        return saved / (sizes[module][more] - sizes[module][bits[module]])

    while True:
        steps = [
            (gain(module, more), module, more)
            for module, table in errors.items()
            for more in table
            if more > bits[module] and sizes[module][more] - sizes[module][bits[module]] <= budget
        ]
        # Among equal steps, the first in the model wins.
        best = max(steps, default=None, key=lambda step: step[0])
        if best is None or best[0] <= 0:
            return bits
        _, module, more = best
        budget -= sizes[module][more] - sizes[module][bits[module]]
        bits[module] = more


def group_size(plan: Plan) -> int:
    """Return the group size that all matrices share."""
    quant = next(iter(plan.formats.values()))
    assert quant is not None
    return quant.group_size


def _predicted(
    source: Source, module: str, importance: mx.array, plan: Plan
) -> tuple[str, dict[int, float]]:
    """Predict a matrix's relative error by bits from whole heads of rows in its middle."""
    name, least = f"{module}.weight", plan.bits[module]
    count, head = source.config.shapes[name][0], source.config.head_dim
    step = -(-SAMPLE_ROWS // head) * head
    start = count // 2 // step * step
    with mx.stream(mx.cpu):
        rows = cast(
            name,
            source.read(name, slice(start, min(start + step, count))),
            FLOAT_TYPES[plan.float_type][1],
        )
        found = {}
        for bits in (bits for bits in sorted(AFFINE_BITS) if bits >= least):
            quant = QuantFormat(bits, group_size(plan))
            searched = quantize_weighted(rows, importance, quant, name=name)
            error = OutputError.weighted(rows, *searched, quant, importance)
            found[bits] = error.found / error.signal if error.signal else 0.0
    return module, found
