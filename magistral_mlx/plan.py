"""Say what fits: ``python -m magistral_mlx.plan --model demo``. Reads headers, no weights."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.demo import resolve_model
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.model.mac_table import mac_table
from magistral_mlx.model.memory import MemoryPlan, plan_for
from magistral_mlx.terminal import command_line, shared_flags
from magistral_mlx.terminal.flags_from_options import click_options

# The options of LoadOptions that change a plan, or say which model it is for.
PLANNED = ("revision", "max_kv_size", "kv_bits", "memory_gb", "draft_model")

EPILOG = """\b
Examples:
  magistral plan --model ~/magistral-4bit
  magistral plan --model ~/magistral-4bit --memory-gb 17.2 --kv-bits 8
  magistral plan

Without --model it prints the contexts of Magistral Small that fit each Mac, predicted from shapes.

\b
Exit codes: 0 it fits, 2 it does not fit, or something else to change."""


@click.command("plan", cls=shared_flags.Command, epilog=EPILOG)
@click.option(
    "--model", metavar="M", help="A folder, a hub id such as org/name (which is fetched), or demo."
)
@click_options(LoadOptions, "options", only=PLANNED)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(*, model: str | None, options: LoadOptions, as_json: bool) -> int:
    """Show the memory that a model needs and the context that fits, before it is loaded."""
    if model is None:
        if as_json or options != LoadOptions():
            raise click.UsageError("these options need a --model to plan for")
        print(mac_table())
        return command_line.DONE
    draft = None
    if options.draft_model is not None:
        draft = open_checkpoint(resolve_model(options.draft_model))
    plan = plan_for(open_checkpoint(resolve_model(model, options.revision)), options, draft=draft)
    if as_json:
        print(
            json.dumps(
                {**asdict(plan), "total_bytes": plan.total_bytes, "model": model},
                ensure_ascii=False,
            )
        )
    else:
        print(in_words(plan))
    return command_line.DONE


def in_words(plan: MemoryPlan) -> str:
    """Format a plan as a table."""
    cache = f"{plan.kv_bits}-bit KV cache" if plan.kv_bits else "KV cache"
    rows = [
        ("weights", plan.weights_bytes),
        (f"{cache}, context {plan.context:,}", plan.kv_bytes),
        (f"workspace, {plan.prefill_chunk:,} tokens a pass", plan.workspace_bytes),
        *([("draft model and its cache", plan.draft_bytes)] if plan.draft_bytes else []),
        ("together", plan.total_bytes),
        ("may be used", plan.budget_bytes),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {size / 1e9:8.3f} GB" for name, size in rows)


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
