"""The recipe ``auto``: bits for each matrix, so many in all, where the error that inputs see falls most by them."""

from collections.abc import Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import mlx.core as mx

from magistral_mlx.checkpoint.quant_format import AFFINE_BITS, QuantFormat
from magistral_mlx.convert.calibration.choose import Calibration
from magistral_mlx.convert.calibration.forward import MeanSquares
from magistral_mlx.convert.calibration.resumable_pass import ResumablePass
from magistral_mlx.convert.methods.error import OutputError
from magistral_mlx.convert.methods.search import quantize_weighted
from magistral_mlx.convert.packing import cast
from magistral_mlx.convert.recipe.layout import Plan, in_order, make_plan, packed_sizes
from magistral_mlx.convert.recipe.options import Options
from magistral_mlx.convert.source.source import FLOAT_TYPES, Source
from magistral_mlx.convert.threads import unordered
from magistral_mlx.errors import OptionError
from magistral_mlx.streams import Progress

SAMPLE_ROWS = 128  # of each matrix, by which its error is predicted

Table = Mapping[str, Mapping[int, float]]  # by module path and bits


def check_target(plan: Plan, target_bits: float, source: Source, options: Options) -> None:
    """Check, before any work, whether so many bits a weight can be spent.

    Raises:
        OptionError: they are fewer than ``plan`` takes, the least, or more than 8 bits everywhere do.
    """
    least = plan.bits_per_weight
    if not target_bits >= least:  # nor NaN
        raise OptionError(
            f"target_bits {target_bits:g} is out of reach: {min(plan.bits.values())} bit everywhere takes "
            f"{least:.3f} bits a weight, scales included; use at least {least + 0.005:.2f}, or a larger group size"
        )
    formats = dict.fromkeys(plan.formats, QuantFormat(max(AFFINE_BITS), group_size(plan)))
    most = make_plan(source.config, source.float_type, options, formats=formats).bits_per_weight
    if target_bits > most:
        raise OptionError(
            f"target_bits {target_bits:g} is out of reach: {max(AFFINE_BITS)} bit everywhere takes {most:.3f} bits a "
            f"weight; use the recipe {max(AFFINE_BITS)}bit instead of auto"
        )


def choose_bits(
    source: Source, plan: Plan, options: Options, calibration: Calibration, folder: Path
) -> Generator[Progress, None, tuple[Plan, MeanSquares]]:
    """Take one pass for the statistics, then spend the bits.

    Args:
        plan: with the least bits everywhere.
        folder: where the stages of the pass are kept.
    Returns:
        The plan to carry out, and the statistics.
    """
    assert options.target_bits is not None
    statistics = MeanSquares(source)
    staged = ResumablePass(folder, source, calibration.ids, statistics)
    steps = in_order(source.config)
    sizes = [sum(map(source.nbytes_of, names)) for names in steps]
    while staged.steps_done < len(steps):
        staged.advance()
        staged.keep()
        yield Progress(sum(sizes[: staged.steps_done]), sum(sizes), "statistics")
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
    """Bits of each matrix: from the least on, the step that saves most error a byte is taken while it fits.

    Args:
        errors: relative squared error of each matrix's outputs by its bits. Those of all count alike.
        sizes: bytes of the same.
        budget: bytes to spend beyond the least.
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
        best = max(
            steps, default=None, key=lambda step: step[0]
        )  # of equal ones the first in the model
        if best is None or best[0] <= 0:
            return bits
        _, module, more = best
        budget -= sizes[module][more] - sizes[module][bits[module]]
        bits[module] = more


def group_size(plan: Plan) -> int:
    """Of every matrix."""
    quant = next(iter(plan.formats.values()))
    assert quant is not None
    return quant.group_size


def _predicted(
    source: Source, module: str, importance: mx.array, plan: Plan
) -> tuple[str, dict[int, float]]:
    """The error of some rows from the middle, whole heads of them, by each number of bits."""
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
            errors = OutputError.weighted(
                rows, quantize_weighted(rows, importance, quant, name=name), quant, importance
            )
            found[bits] = errors.found / errors.signal if errors.signal else 0.0
    return module, found
