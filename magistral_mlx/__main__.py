"""The command ``magistral``: every command line under one name."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import click

from magistral_mlx import __version__
from magistral_mlx.terminal import command_line

# The commands by what they are for, each with its module and its name there.
GROUPS = {
    "Ask": {
        "run": "magistral_mlx.generate:run",
        "chat": "magistral_mlx.chat:command",
        "generate": "magistral_mlx.generate:command",
    },
    "Models and defaults": {
        "pull": "magistral_mlx.manage:pull",
        "list": "magistral_mlx.manage:list_models",
        "show": "magistral_mlx.manage:show",
        "remove": "magistral_mlx.manage:remove",
        "config": "magistral_mlx.manage:config",
    },
    "Fit and convert": {
        "plan": "magistral_mlx.plan:command",
        "convert": "magistral_mlx.convert.__main__:command",
        "verify": "magistral_mlx.convert.verify:command",
    },
}
COMMANDS = {name: place for group in GROUPS.values() for name, place in group.items()}

# The names that other tools have.
ALIASES = {"ls": "list", "rm": "remove"}

EPILOG = """\b
First steps:
  magistral run demo "What is 48 + 76?"
  magistral plan
  magistral pull
  magistral chat"""


class Commands(click.Group):
    """A group of commands, each in a module that is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; name the nearest where there is none."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0].lower(), [*COMMANDS, *ALIASES], n=1)
            # An option has its own hint.
            if not near or args[0].startswith("-"):
                raise
            hint = f"{error.format_message()} Did you mean {near[0]}?"
            raise click.UsageError(hint, error.ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in groups."""
        width = formatter.width - max(map(len, COMMANDS)) - 6
        for title, names in GROUPS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            rows = [(n, c.get_short_help_str(width)) for n, c in found if c is not None]
            with formatter.section(title):
                formatter.write_dl(rows, col_max=max(map(len, COMMANDS)))


@click.group(cls=Commands, epilog=EPILOG)
@click.version_option(__version__, prog_name="magistral")
def command() -> None:
    """Magistral Small, Mistral's open reasoning model, on Apple silicon."""


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv, "magistral")


if __name__ == "__main__":
    sys.exit(main())
