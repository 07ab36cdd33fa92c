"""Talk to a model: ``python -m magistral_mlx.chat --model demo``."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import click

from magistral_mlx.engine.load import plan_model
from magistral_mlx.engine.turns import KeepReasoning
from magistral_mlx.errors import MagistralError, OptionError, as_flags, visible
from magistral_mlx.files import state_dir
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.library.known_folders import find_model
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.terminal import command_line, shared_flags
from magistral_mlx.terminal.asking.model_name import model_option
from magistral_mlx.terminal.asking.question import SystemPrompt
from magistral_mlx.terminal.display import tell
from magistral_mlx.terminal.flags_from_options import click_options
from magistral_mlx.terminal.prompt import is_interactive, read_pipe, read_terminal
from magistral_mlx.terminal.repl.commands import ALIASES, COMMANDS, answer
from magistral_mlx.terminal.repl.history import show_resumed
from magistral_mlx.terminal.repl.session import Models, Session

log = logging.getLogger(__name__)

EPILOG = """\b
Examples:
  magistral chat demo
  magistral chat --keep-reasoning last --prompt-cache-file talk.cache
  printf 'What is 7 * 8?\\nWhat is 9 * 8?\\n' | magistral chat demo --quiet

Answers go to stdout; traces (dim) and figures go to stderr. At a terminal /help lists the commands,
and chat-history in the state folder keeps what is typed. From a pipe each line is one message or
command; a backslash at its end continues it in the next line. A wrong line ends the conversation
with exit code 2, after it is saved.

\b
Exit codes: 0 done, 2 something to change, 130 interrupted, 1 a bug."""


@click.command("chat", cls=shared_flags.Command, epilog=EPILOG)
@model_option
@click_options(LoadOptions, "options")
@click_options(SystemPrompt, "system")
@click.option(
    "--keep-reasoning",
    type=click.Choice(get_args(KeepReasoning)),
    help="Which traces the model sees again: all, the last, or none (the default).",
)
@shared_flags.sampling_options
@shared_flags.hide_reasoning_option
@shared_flags.cache_file_option(
    "Resume the conversation in F if it exists, and save it there at the end."
)
def command(
    *,
    model: str,
    options: LoadOptions,
    sampling: SamplingParams,
    system: SystemPrompt,
    keep_reasoning: KeepReasoning | None,
    hide_reasoning: bool,
    prompt_cache_file: Path | None,
) -> int:
    """Talk to Magistral; each turn reuses the cache of those before."""
    file = prompt_cache_file
    system_prompt = system.text
    if file is not None and file.exists() and system_prompt is not None:
        flag = "--system-prompt" if system.system_prompt_file is None else "--system-prompt-file"
        raise OptionError(f"{file} has a conversation with its own system prompt; leave {flag} out")

    def options_for(name: str) -> LoadOptions:
        # A revision belongs to the model that it was given with.
        return options if name == model else replace(options, revision=None)

    models = Models(
        model,
        check=lambda name: plan_model(find_model(name), options_for(name)),
        open=lambda name: shared_flags.load_with_progress(name, options_for(name)),
    )
    magistral = models.open(model)
    if file is not None and file.exists():
        chat = magistral.resume(file)
    else:
        chat = magistral.chat(system_prompt=system_prompt)
    chat.keep_reasoning = keep_reasoning or chat.keep_reasoning
    session = Session(
        models, magistral, chat, sampling, file, is_interactive(), hides_reasoning=hide_reasoning
    )
    # The session frees a model that it replaces.
    del magistral, chat
    with command_line.exit_in_order():
        try:
            if session.is_interactive:
                answer_terminal(session)
            else:
                answer_pipe(session)
        finally:
            session.save_at_end()
    return command_line.DONE


def answer_terminal(session: Session) -> None:
    """Answer messages from a terminal; an error or Ctrl-C ends the turn."""
    tell("/help lists the commands")
    if session.file is not None and session.turns:
        show_resumed(session.chat, session.file)
    tell("")
    for text in read_terminal(state_dir() / "chat-history", [*COMMANDS, *ALIASES]):
        try:
            answer(session, text)
        except (MagistralError, OSError) as error:
            tell(f"error: {as_flags(error)}")
        except KeyboardInterrupt:
            tell("stopped")
        except Exception as error:
            # A bug must not cost a conversation that is not saved.
            log.debug("a bug", exc_info=True)
            tell(
                f"error: {type(error).__name__}: {visible(str(error))}. This is a bug; "
                "the conversation goes on, and /save F keeps it"
            )
        if session.is_over:
            return
        tell("")


def answer_pipe(session: Session) -> None:
    """Answer messages from a pipe; an error or Ctrl-C ends the program."""
    for text in read_pipe():
        answer(session, text)
        if session.is_over:
            return


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
