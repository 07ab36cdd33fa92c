"""Ask one question: ``python -m magistral_mlx.generate --model demo -p "What is 48 + 76?"``."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from magistral_mlx.errors import ContextError, OptionError, TokenizerError, as_flags, counted
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Samples
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.serving.events import event_of
from magistral_mlx.streams import Stream
from magistral_mlx.terminal import command_line, shared_flags
from magistral_mlx.terminal.asking.batch import Batch, ResultFile, read_entries
from magistral_mlx.terminal.asking.model_name import model_option, word_command
from magistral_mlx.terminal.asking.question import Question
from magistral_mlx.terminal.asking.results import (
    as_object,
    cancelled_object,
    report_samples,
    samples_object,
)
from magistral_mlx.terminal.display import (
    Display,
    has_result,
    remark,
    report,
    report_no_answer,
    tell,
    write,
)
from magistral_mlx.terminal.flags_from_options import click_options
from magistral_mlx.terminal.verbosity import Status, ticking
from magistral_mlx.tokenizer.segments import Segment, Text

EPILOG = """\b
Examples:
  magistral generate demo -p "What is 48 + 76?"
  magistral generate demo -p "What is 48 + 76?" | pbcopy
  cat report.txt | magistral generate -p "Summarize this." > summary.txt
  magistral generate -p "Which is faster?" --file a.py --file b.py
  magistral generate demo -p "What is 9 * 37?" --samples 5 --json
  magistral generate --prompts-file questions.jsonl --output answers.jsonl

The answer goes to stdout, so that a pipe gets nothing else. Progress, the trace (dim)
and the figures go to stderr.

--json-stream prints one JSON object a line: progress, reasoning and answer, by their "kind", while
they arrive, and in the last line the object of --json.

--prompts-file reads a line for each prompt: {"prompt": "..."}, and in it "id" and "system_prompt"
if you like. For each one it prints a JSON object, with the "index" of the prompt. With --output F
the objects are appended to F, and the same command goes on where an earlier run ended.

\b
Exit codes: 0 done, 2 something to change, 3 a reply ended without an answer,
130 interrupted, 1 a bug."""


@click.command("generate", cls=shared_flags.Command, epilog=EPILOG)
@model_option
@click_options(LoadOptions, "options")
@click_options(Question, "question")
@click_options(Batch, "batch")
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
@click.option(
    "--json-stream", is_flag=True, help="Print JSON lines while the reply arrives; see below."
)
def command(
    *,
    model: str,
    options: LoadOptions,
    question: Question,
    batch: Batch,
    sampling: SamplingParams,
    hide_reasoning: bool,
    samples: int | None,
    prompt_cache_file: Path | None,
    as_json: bool,
    json_stream: bool,
) -> int:
    """Ask one question with -p or from a pipe, as mlx_lm.generate."""
    if as_json and json_stream:
        raise click.UsageError("--json-stream ends with the object of --json; keep one of the two")
    prints_json = as_json or json_stream
    if batch.prompts_file is not None:
        refuse_beside_batch(
            {
                "--prompt": question.prompt is not None,
                "--file": bool(question.file),
                "--samples": samples is not None,
                "--prompt-cache-file": prompt_cache_file is not None,
                "--hide-reasoning": hide_reasoning,
                "--json": as_json,
                "--json-stream": json_stream,
            }
        )
        return answer_batch(model, options, question, batch, sampling)
    messages = question.messages
    if question.system_prompt_only:
        remark("warning: without its own system prompt the model may not reason")
    magistral = shared_flags.load_with_progress(model, options)
    if samples is not None:
        replies = magistral.stream_samples(
            messages,
            sampling,
            n=samples,
            system_prompt_only=question.system_prompt_only,
            prompt_cache_file=prompt_cache_file,
        )
        found, is_complete = collect(
            replies, samples, lambda: magistral.tokens_so_far, model=model if json_stream else None
        )
        return show_samples(found, model, as_json=prints_json, is_complete=is_complete)
    stream = magistral.stream(
        messages,
        sampling,
        system_prompt_only=question.system_prompt_only,
        prompt_cache_file=prompt_cache_file,
    )
    shown = EventDisplay if json_stream else Display
    display = shown(hides_reasoning=hide_reasoning or prints_json, hides_answer=prints_json)
    return show_reply(display, stream, model if prints_json else None)


def show_reply(display: Display, stream: Stream[Segment, Reply], model: str | None) -> int:
    """Show a reply while it arrives, with ``model`` as JSON at its end; return the exit code."""
    reply = display.show_all(stream)
    if model is not None:
        print_json(
            cancelled_object(display.reasoning, display.answer, model)
            if reply is None
            else as_object(reply, model)
        )
    if reply is None:
        return command_line.INTERRUPTED
    if has_result(reply):
        report(reply)
        return command_line.DONE
    report(reply, says_ending=False)
    report_no_answer(reply)
    return command_line.NO_ANSWER


def refuse_beside_batch(given: Mapping[str, bool]) -> None:
    """Refuse flags that are given beside --prompts-file and would change nothing."""
    for flag, is_given in given.items():
        if is_given:
            raise click.UsageError(
                f"--prompts-file has its own prompts and prints JSON lines; leave {flag} out"
            )


def answer_batch(
    model: str, options: LoadOptions, question: Question, batch: Batch, sampling: SamplingParams
) -> int:
    """Answer every prompt of a file, one after the other, each as a line of JSON."""
    assert batch.prompts_file is not None
    entries, system = read_entries(batch.prompts_file), question.system_messages
    file = None if batch.output is None else ResultFile(batch.output, entries, model)
    waiting = [entry for entry in entries if file is None or entry.index not in file.finished]
    if not waiting:
        remark(f"{batch.output} has the results of all {counted(len(entries), 'prompt')} already")
        return command_line.DONE
    magistral = shared_flags.load_with_progress(model, options)
    codes = {command_line.DONE}
    status = Status()
    try:
        for entry in waiting:
            place = f"prompt {entry.index + 1} of {len(entries)}"
            result = entry.key | {"model": model}
            try:
                stream = magistral.stream(
                    entry.messages(system), sampling, system_prompt_only=question.system_prompt_only
                )
                written = 0
                for segment in stream:
                    written += len(segment.text) if isinstance(segment, Text) else 0
                    status.show(f"{place}: {counted(written, 'character')} so far")
                reply = stream.result()
                result |= as_object(reply, model)
                if not has_result(reply):
                    codes.add(command_line.NO_ANSWER)
            # The other prompts may be right.
            except (ContextError, OptionError, TokenizerError) as error:
                codes.add(command_line.WRONG)
                result |= {"error": as_flags(error)}
                status.clear()
                tell(f"error: {place}: {as_flags(error)}")
            if file is None:
                print_json(result)
            else:
                file.append(json.dumps(result, ensure_ascii=False))
    finally:
        status.clear()
    return command_line.WRONG if command_line.WRONG in codes else max(codes)


def print_json(found: Mapping[str, Any]) -> None:
    """Print an object on a line of its own."""
    print(json.dumps(found, ensure_ascii=False), flush=True)


class EventDisplay(Display):
    """Prints each segment as a line of JSON, as the bridge spells its events."""

    def show(self, segment: Segment) -> None:
        print_json(event_of(segment))
        super().show(segment)


def collect(
    replies: Iterator[Reply], count: int, tokens: Callable[[], int], *, model: str | None = None
) -> tuple[Samples, bool]:
    """Collect the replies; return them, and False if Ctrl-C was pressed before the last.

    ``tokens`` counts the tokens so far. With ``model`` each reply is printed as a line of JSON.
    """
    found: list[Reply] = []

    def state() -> str:
        done = f"{len(found)} of {counted(count, 'reply', 'replies')} done"
        return f"{done}, {counted(tokens(), 'token')} so far"

    try:
        with ticking(state):
            for reply in replies:
                found.append(reply)
                if model is not None:
                    print_json({"kind": "reply"} | as_object(reply, model))
    except KeyboardInterrupt:
        return Samples.from_replies(found), False
    return Samples.from_replies(found), True


def show_samples(samples: Samples, model: str, *, as_json: bool, is_complete: bool) -> int:
    """Print the votes and costs on stderr, then the majority answer or one JSON object."""
    report_samples(samples)
    if as_json:
        print_json(samples_object(samples, model, is_complete=is_complete))
    elif samples.votes:
        write(sys.stdout, samples.majority + "\n")
    if not is_complete:
        return command_line.INTERRUPTED
    if any(map(has_result, samples.replies)):
        return command_line.DONE
    report_no_answer(samples.replies[0])
    return command_line.NO_ANSWER


run = word_command(
    command,
    help="Ask the default model, or one named first, a question.",
    epilog="""\b
Examples:
  magistral run "How many r's are in strawberry?"
  magistral run demo "What is 48 + 76?"
  magistral run demo "What is 48 + 76?" --json

\b
magistral generate --help says more: what is printed where, and what
--json-stream and --prompts-file do.

\b
Exit codes: 0 done, 2 something to change, 3 a reply ended without an answer,
130 interrupted, 1 a bug.""",
)


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
