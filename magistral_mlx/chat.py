"""Talk to a model: ``python -m magistral_mlx.chat --model demo``."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import get_args

import click

from magistral_mlx import command_line, console
from magistral_mlx.conversation import Chat, KeepReasoning
from magistral_mlx.display import Display, report, write
from magistral_mlx.errors import MagistralError, OptionError
from magistral_mlx.reasoning import ReasoningFormat
from magistral_mlx.sampling import OnLoop, SamplingParams

HELP = """/reset  begin a new conversation
/quit   end (as does Ctrl-D)
/help   show this
Ctrl-C stops a reply; that turn is then forgotten. Anything else is a message."""

EPILOG = """\b
Examples:
  magistral chat --model demo
  magistral chat --model ~/magistral-4bit --keep-reasoning last --prompt-cache-file talk.cache
  printf 'What is 7 * 8?\\nWhat is 9 * 8?\\n' | magistral chat --model demo --hide-reasoning

Answers go to stdout; traces (dim) and figures go to stderr. From a pipe each line is one message.
Exit codes: 0 done, 2 something to change, 130 interrupted, 1 a bug of ours."""


@click.command("chat", cls=console.Command, epilog=EPILOG)
@console.loading_options
@click.option("--system-prompt", metavar="S", help="Joins the checkpoint's own system prompt.")
@click.option(
    "--keep-reasoning",
    type=click.Choice(get_args(KeepReasoning)),
    help="Which traces the model sees again: all, the last, or none (the default).",
)
@console.sampling_options
@console.cache_file_option("Resume the conversation in F if it exists, and save it there at the end.")
def command(
    *,
    model: str,
    revision: str | None,
    max_kv_size: int | None,
    kv_bits: int | None,
    prefill_step_size: int | None,
    memory_gb: float | None,
    wired: bool,
    draft_model: str | None,
    num_draft_tokens: int | None,
    reasoning_format: ReasoningFormat | None,
    system_prompt: str | None,
    keep_reasoning: KeepReasoning | None,
    max_tokens: int | None,
    temp: float,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    think_budget: int | None,
    no_think: bool,
    on_loop: OnLoop,
    hide_reasoning: bool,
    prompt_cache_file: Path | None,
) -> int:
    """Talk to Magistral; a follow-up reuses the KV cache of the turns before it."""
    sampling = console.make_sampling(
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        seed=seed,
        stop=stop,
        think_budget=think_budget,
        no_think=no_think,
        on_loop=on_loop,
    )
    file = prompt_cache_file
    is_resumed = file is not None and file.exists()
    if is_resumed and system_prompt is not None:
        raise OptionError(f"{file} has a conversation with its own system prompt; leave --system-prompt out")
    magistral = console.load_visibly(
        model,
        revision=revision,
        max_kv_size=max_kv_size,
        kv_bits=kv_bits,
        prefill_step_size=prefill_step_size,
        memory_gb=memory_gb,
        wired=wired,
        draft_model=draft_model,
        num_draft_tokens=num_draft_tokens,
        reasoning_format=reasoning_format,
    )
    if file is not None and is_resumed:
        chat = magistral.resume(file)
        chat.keep_reasoning = keep_reasoning or chat.keep_reasoning
    else:
        chat = magistral.chat(keep_reasoning=keep_reasoning or "none", system_prompt=system_prompt)
    try:
        converse(chat, sampling, hides_reasoning=hide_reasoning)
    finally:
        if file is not None and any(message["role"] == "assistant" for message in chat.messages):
            chat.save(file)
    return command_line.DONE


def converse(chat: Chat, sampling: SamplingParams, *, hides_reasoning: bool) -> None:
    """Answer one message after the other; at a terminal an error or Ctrl-C ends its turn, from a pipe the program."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("/help lists the commands", file=sys.stderr)
    for text in typed() if is_terminal else piped():
        if text == "/quit":
            return
        if text.startswith("/"):
            obey(text, chat, is_terminal=is_terminal)
            continue
        try:
            reply = Display(hides_reasoning).show_all(chat.stream(text, sampling))
        except MagistralError as error:
            if not is_terminal:
                raise
            print(f"error: {error}", file=sys.stderr)
            continue
        if reply is not None:
            report(reply)
        elif is_terminal:
            print("stopped", file=sys.stderr)
        else:
            raise KeyboardInterrupt


def obey(command: str, chat: Chat, *, is_terminal: bool) -> None:
    if command == "/reset":
        chat.messages[:] = [message for message in chat.messages if message["role"] == "system"]
    elif command == "/help":
        print(HELP, file=sys.stderr)
    elif is_terminal:
        print(f"{command}: no such command\n{HELP}", file=sys.stderr)
    else:
        raise OptionError(f"{command}: no such command; use /reset, /quit or /help, or begin the message otherwise")


def typed() -> Iterator[str]:
    """Messages typed at a terminal, until Ctrl-D; Ctrl-C discards the line begun."""
    with suppress(ImportError):  # a Python may be built without it; lines still arrive
        import readline  # noqa: F401  # input() then edits lines and remembers them
    while True:
        try:
            if sys.stdout.isatty():
                text = input("> ")
            else:  # input() would write its prompt among the answers
                write(sys.stderr, "> ")
                text = input("")
        except UnicodeDecodeError as error:
            print(f"error: that line is not UTF-8 ({error}); set the terminal to UTF-8", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the conversation", file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        if text.strip():
            yield text.strip()


def piped() -> Iterator[str]:
    """Messages from a pipe, one a line."""
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise OptionError(f"line {number} of stdin is not UTF-8 ({error}); convert it, e.g. with iconv") from None
        if text:
            yield text


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
