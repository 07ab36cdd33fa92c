"""Say what fits: ``python -m magistral_mlx.plan --model demo``. Reads headers, no weights."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import click
from click.core import ParameterSource

from magistral_mlx.engine.load import plan_model
from magistral_mlx.errors import MemoryLimitError
from magistral_mlx.model.device import budget_bytes
from magistral_mlx.model.footprint import bytes_per_token, kv_bytes
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.mac import MAC_GB, Mac, this_mac
from magistral_mlx.model.mac_table import (
    CACHES,
    FORMATS,
    SPEED_CONTEXT,
    Forecast,
    forecasts,
    plan_small,
)
from magistral_mlx.model.memory import MemoryPlan
from magistral_mlx.terminal import command_line, forecast_tables, shared_flags
from magistral_mlx.terminal.asking.model_name import optional_model_option
from magistral_mlx.terminal.flags_from_options import click_options
from magistral_mlx.terminal.table import show_table

# The options of LoadOptions that change a plan, or say which model it is for.
OF_MODEL = ("revision", "draft_model", "tokenizer", "reasoning_format")
PLANNED = ("max_kv_size", "kv_bits", "memory_gb", *OF_MODEL)
# Formats in the table of all Macs.
SHOWN = ("3", "4", "6", "8")
# A model whose speed is predicted has at least so many bytes of weights.
LEAST_BYTES = 1e9

EPILOG = """\b
Examples:
  magistral plan
  magistral plan --mac "M4 Pro 24GB"
  magistral plan --memory 24GB --bits 4 --context 30000 --kv-bits 8
  magistral plan magistral-4bit
  magistral plan magistral-4bit --memory 16GB

A context is prompt plus reply. Without a model the plan is for Magistral Small, calculated from
shapes before any download.

\b
Exit codes: 0 it fits, 2 it does not fit, or something else to change,
130 interrupted, 1 a bug."""


@click.command("plan", cls=shared_flags.Command, epilog=EPILOG)
@optional_model_option
@click.option(
    "--mac", metavar="MAC", help='Plan for a Mac by chip and memory, such as "M4 Pro 24GB".'
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Plan for a Mac with this memory, such as 24GB. Its GPU may use a part of it; "
    "--memory-gb says the part.",
)
@click.option(
    "--bits",
    type=click.Choice(list(FORMATS)),
    help="Bits of Magistral Small's weights, without --model.",
)
@click_options(LoadOptions, "options", only=PLANNED)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(
    *,
    model: str | None,
    mac: str | None,
    memory: str | None,
    bits: str | None,
    options: LoadOptions,
    as_json: bool,
) -> int:
    """Show the memory that a model needs, and the context that fits."""
    machine, options = _machine(mac, memory, options)
    if model is not None:
        if bits is not None:
            raise click.UsageError("a model has its own bits; leave --bits or --model out")
        _show_model(model, machine, options, as_json=as_json)
        return command_line.DONE
    if any(map(_is_typed, OF_MODEL)):
        raise click.UsageError(
            "--revision, --draft-model, --tokenizer and --reasoning-format need a --model to "
            "plan for"
        )
    budget = None if options.memory_gb is None else budget_bytes(options.memory_gb)
    if budget is None:
        _show_macs(bits, options, as_json=as_json)
    elif bits is None:
        _show_formats(machine, budget, options, as_json=as_json)
    else:
        found = Forecast(machine, budget, bits, options.kv_bits or 16, plan_small(bits, options))
        _show_one(found, as_json=as_json)
    return command_line.DONE


def _is_typed(name: str) -> bool:
    """Return whether an option was typed; a default of the user's gives way to a Mac."""
    source = click.get_current_context().get_parameter_source(name)
    return source is ParameterSource.COMMANDLINE


def _machine(
    mac: str | None, memory: str | None, options: LoadOptions
) -> tuple[Mac | None, LoadOptions]:
    """Return the Mac that is named, and the options with what it may use."""
    if mac is not None and memory is not None:
        raise click.UsageError("--mac has the memory; leave --memory out")
    if mac is not None:
        machine = Mac.of_name(mac)
    elif memory is not None:
        machine = Mac.of_memory(memory)
    else:
        return None, options
    if _is_typed("memory_gb"):
        raise click.UsageError(
            "--memory-gb is what may be used, and --mac or --memory tell it from the memory of a "
            "Mac; keep one"
        )
    return machine, replace(options, memory_gb=machine.budget_bytes / 1e9)


def _show_model(model: str, machine: Mac | None, options: LoadOptions, *, as_json: bool) -> None:
    """Plan for a checkpoint, on this device or on a Mac."""
    planned = plan_model(model, options, on_mac=machine is not None)
    checkpoint, plan = planned.checkpoint, planned.plan
    chip, speed = None if machine is None else machine.chip, None
    # Calls of kernels, not the bandwidth, take the time of a small model.
    if chip is not None and checkpoint.nbytes >= LEAST_BYTES:
        cached = kv_bytes(checkpoint.config, min(SPEED_CONTEXT, checkpoint.config.max_positions))
        speed = chip.tokens_per_second(bytes_per_token(checkpoint) + cached)
    if as_json:
        _print_json({**_plain(plan), "model": model, **_of_mac(machine, speed)})
    else:
        where = "" if machine is None else f" on {machine.name}"
        heading, has_chip = f"{model}{where}", chip is not None
        print(forecast_tables.in_words(plan, heading, speed, has_chip=has_chip))


def _show_one(found: Forecast, *, as_json: bool) -> None:
    """Show Magistral Small in one format on one machine."""
    assert found.plan is not None
    if as_json:
        _print_json(_forecast(found))
        return
    where = "" if found.mac is None else f" on {found.mac.name}"
    heading = f"{forecast_tables.NAME} in {forecast_tables.weights(found.bits)}{where}"
    print(forecast_tables.in_words(found.plan, heading, found.tokens_per_second))


def _show_formats(machine: Mac | None, budget: int, options: LoadOptions, *, as_json: bool) -> None:
    """Show Magistral Small in every format on one machine.

    Raises:
        MemoryLimitError: none fits.
    """
    context, caches = options.max_kv_size, [options.kv_bits] if options.kv_bits else CACHES
    found = forecasts([(machine, budget)], list(FORMATS), caches, context)
    if not any(one.plan for one in found):
        smallest, kv_bits = SHOWN[0], caches[-1]
        try:
            plan_small(smallest, replace(options, kv_bits=kv_bits))
        except MemoryLimitError as error:
            raise MemoryLimitError(
                f"{forecast_tables.NAME} does not fit, not even with --bits {smallest} "
                f"--kv-bits {kv_bits}: {error.template}"
            ) from None
    if as_json:
        _print_json({"plans": [_forecast(one) for one in found]})
        return
    show_table(forecast_tables.of_one_mac(found, context))
    print("\n".join(forecast_tables.legend(found, context)))


def _show_macs(bits: str | None, options: LoadOptions, *, as_json: bool) -> None:
    """Show Magistral Small on the Macs of every size, with this one marked."""
    this = this_mac()
    macs = [Mac(size) for size in MAC_GB]
    if this is not None:
        others = [mac for mac in macs if mac.memory_gb != this.memory_gb]
        macs = sorted([*others, this], key=lambda mac: mac.memory_gb)
    budgets = [(mac, budget_bytes() if mac is this else mac.budget_bytes) for mac in macs]
    context, caches = options.max_kv_size, CACHES if bits else CACHES[:2]
    if options.kv_bits:
        caches = (options.kv_bits,)
    found = forecasts(budgets, [bits] if bits else SHOWN, caches, context)
    if as_json:
        _print_json(
            {"plans": [{**_forecast(one), "is_this_mac": one.mac is this} for one in found]}
        )
        return
    show_table(forecast_tables.of_macs(found, this, context))
    if this is not None:
        print("* this Mac, with what it says may be used")
    print("\n".join(forecast_tables.legend(found, context)))
    print('For one Mac: magistral plan --mac "M4 Pro 24GB", or --memory 24GB')


def _forecast(found: Forecast) -> dict[str, Any]:
    """Return a forecast as JSON-compatible data."""
    asked = {"model": forecast_tables.NAME, "bits": found.bits, "kv_bits": found.kv_bits}
    plan = {} if found.plan is None else _plain(found.plan)
    facts = {**plan, **asked, "fits": found.plan is not None, "budget_bytes": found.budget_bytes}
    return {**facts, **_of_mac(found.mac, found.tokens_per_second)}


def _of_mac(mac: Mac | None, speed: tuple[float, float] | None) -> dict[str, Any]:
    if mac is None:
        return {}
    return {
        "memory_gb": mac.memory_gb,
        "chip": mac.chip and mac.chip.name,
        "tokens_per_second": speed,
    }


def _plain(plan: MemoryPlan) -> dict[str, Any]:
    return {**asdict(plan), "total_bytes": plan.total_bytes}


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
