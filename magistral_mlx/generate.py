"""Ask one question: ``python -m magistral_mlx.generate --model demo -p "What is 48 + 76?"``."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from magistral_mlx.errors import OptionError
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Samples
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.terminal import command_line, shared_flags
from magistral_mlx.terminal.display import Display, report, show_status, write
from magistral_mlx.terminal.flags_from_options import click_options

USAGE_KEYS = (
    "prompt_tokens",
    "completion_tokens",
    "reasoning_tokens",
    "cached_tokens",
    "forward_passes",
    "prefill_seconds",
    "decode_seconds",
    "peak_memory_bytes",
    "seed",
)

EPILOG = """\b
Examples:
  magistral generate --model demo -p "What is 48 + 76?"
  magistral generate --model demo -p "What is 48 + 76?" | pbcopy
  cat problem.txt | magistral generate --model ~/magistral-4bit -p - > answer.txt
  magistral generate --model demo -p "What is 9 * 37?" --samples 5 --json

The answer goes to stdout, so that a pipe gets nothing else. Progress, the trace (dim)
and the figures go to stderr.

\b
Exit codes: 0 done, 2 something to change, 130 interrupted, 1 a bug."""


@click.command("generate", cls=shared_flags.Command, epilog=EPILOG)
@shared_flags.model_option
@click_options(LoadOptions, "options")
@click.option(
    "--prompt", "-p", required=True, metavar="P", help="The question; - reads it from stdin."
)
@click.option(
    "--system-prompt", metavar="S", help="A system prompt, added to the checkpoint's own."
)
@click.option(
    "--system-prompt-only",
    is_flag=True,
    help="Use --system-prompt alone; the model may then stop reasoning.",
)
@shared_flags.sampling_options
@shared_flags.hide_reasoning_option
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    metavar="N",
    help="Give N replies, and the answer that most of them share.",
)
@shared_flags.cache_file_option(
    "Reuse the KV cache in F if it exists, and write it there afterwards."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def command(
    *,
    model: str,
    options: LoadOptions,
    sampling: SamplingParams,
    prompt: str,
    system_prompt: str | None,
    system_prompt_only: bool,
    hide_reasoning: bool,
    samples: int | None,
    prompt_cache_file: Path | None,
    as_json: bool,
) -> int:
    """Ask Magistral one question and watch it reason."""
    messages = [{"role": "user", "content": read_prompt(prompt)}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    if system_prompt_only:
        if system_prompt is None:
            raise click.UsageError(
                "--system-prompt-only needs a --system-prompt to use instead of the default"
            )
        print("warning: without its own system prompt the model may not reason", file=sys.stderr)
    magistral = shared_flags.load_with_progress(model, options)
    if samples is not None:
        replies = magistral.stream_samples(
            messages,
            sampling,
            n=samples,
            system_prompt_only=system_prompt_only,
            prompt_cache_file=prompt_cache_file,
        )
        samples_so_far, is_complete = collect(replies, samples)
        show_samples(samples_so_far, model, as_json=as_json, is_complete=is_complete)
        return command_line.DONE if is_complete else command_line.INTERRUPTED
    stream = magistral.stream(
        messages,
        sampling,
        system_prompt_only=system_prompt_only,
        prompt_cache_file=prompt_cache_file,
    )
    display = Display(hides_reasoning=hide_reasoning or as_json, hides_answer=as_json)
    reply = display.show_all(stream)
    if as_json:
        print(
            json.dumps(
                cancelled(display, model) if reply is None else as_object(reply, model),
                ensure_ascii=False,
            )
        )
    if reply is None:
        return command_line.INTERRUPTED
    report(reply)
    return command_line.DONE


def read_prompt(prompt: str) -> str:
    """Return the prompt, or for "-" the text of a pipe.

    Raises:
        OptionError: it is empty, or not UTF-8.
    """
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise OptionError(
                f"the prompt on stdin is not UTF-8 ({error}); convert it, for example with iconv"
            ) from None
    if not prompt.strip():
        raise OptionError(
            "the prompt is empty; give one with --prompt, or pipe it in with --prompt -"
        )
    return prompt.removesuffix("\n")


def as_object(reply: Reply, model: str) -> dict[str, Any]:
    """Return a reply as the object that --json prints."""
    usage = asdict(reply.usage)
    return {
        "reasoning": reply.reasoning,
        "answer": reply.answer,
        "finish_reason": reply.finish_reason,
        "reasoning_closed_by": reply.reasoning_closed_by,
        **{key: usage[key] for key in USAGE_KEYS},
        "model": model,
    }


def cancelled(display: Display, model: str) -> dict[str, Any]:
    """Return the object of a reply that Ctrl-C ended: its text so far, without figures."""
    text = {"reasoning": display.reasoning, "answer": display.answer}
    unknown = dict.fromkeys(("reasoning_closed_by", *USAGE_KEYS))
    return {**text, "finish_reason": "cancelled", **unknown, "model": model}


def collect(replies: Iterator[Reply], count: int) -> tuple[Samples, bool]:
    """Collect the replies; return them, and False if Ctrl-C was pressed before the last."""
    found: list[Reply] = []
    try:
        show_status(f"{count} replies under way")
        for reply in replies:
            found.append(reply)
            show_status(f"{count - len(found)} of {count} replies under way")
    except KeyboardInterrupt:
        return Samples.from_replies(found), False
    finally:
        show_status("")
    return Samples.from_replies(found), True


def show_samples(samples: Samples, model: str, *, as_json: bool, is_complete: bool) -> None:
    """Print the majority answer, or one JSON object; the votes and costs go to stderr."""
    replies = [as_object(reply, model) for reply in samples.replies]
    if as_json:
        printed: dict[str, Any] = asdict(samples) | {"replies": replies}
        printed |= {} if is_complete else {"finish_reason": "cancelled"}
        print(json.dumps(printed, ensure_ascii=False))
    elif samples.votes:
        write(sys.stdout, samples.majority + "\n")
        for key, count in samples.votes.items():
            write(sys.stderr, f"{count} of {len(replies)}: {key}\n")
    for reply in samples.replies:
        report(reply, f"seed {reply.usage.seed}: ")


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
