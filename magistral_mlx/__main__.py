"""The command ``magistral``: every command line under one name."""

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from magistral_mlx import __version__
from magistral_mlx.terminal import command_line

COMMANDS = {
    "generate": "magistral_mlx.generate",
    "chat": "magistral_mlx.chat",
    "plan": "magistral_mlx.plan",
    "convert": "magistral_mlx.convert.__main__",
    "verify": "magistral_mlx.convert.verify",
}

EPILOG = """\b
First steps:
  magistral generate --model demo -p "What is 48 + 76?"
  magistral plan
  magistral convert --help"""


class Commands(click.Group):
    """A group of commands, each in a module that is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command


@click.group(cls=Commands, epilog=EPILOG)
@click.version_option(__version__, prog_name="magistral")
def command() -> None:
    """Magistral Small, Mistral's open reasoning model, on Apple silicon."""


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv, "magistral")


if __name__ == "__main__":
    sys.exit(main())
