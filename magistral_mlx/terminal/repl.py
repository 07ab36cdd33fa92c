"""A conversation at the prompt: its commands, its settings and its costs."""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import OptionError, in_units
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.terminal.display import Display, rate, report, tell, write
from magistral_mlx.terminal.prompt import interruptible

KEYS = """\
Enter sends. Alt-Enter, or \\ before Enter, begins a new line. Pasted text keeps its lines.
Ctrl-C stops a reply: a partial answer stays, a partial trace is dropped. Ctrl-D ends."""


@dataclass
class Session:
    """The state that commands change, and the commands."""

    magistral: Magistral
    chat: Chat
    sampling: SamplingParams
    is_interactive: bool = False
    hides_reasoning: bool = False
    folds: bool = True
    renders: bool = True
    is_over: bool = False
    trace: str = ""
    # The last question, if the conversation does not have it.
    unanswered: str | None = None
    usages: list[Usage] = field(default_factory=list)
    _budget: int | None = None

    def ask(self, question: str, *, seed: int | None = None) -> None:
        """Show the reply to a question. At a terminal Ctrl-C ends the reply.

        Raises:
            MagistralError: as ``Chat.ask``.
            KeyboardInterrupt: Ctrl-C, if the question comes from a pipe.
        """
        if not self.is_interactive:
            self._ask(question, seed)
            return
        with suppress(KeyboardInterrupt), interruptible(self.magistral.cancel):
            self._ask(question, seed)
        if self.unanswered is not None:
            tell("stopped before an answer: the question is dropped; /retry asks it again")

    def _ask(self, question: str, seed: int | None) -> None:
        self.unanswered = question
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed)
        display = Display(self.hides_reasoning, folds=self.folds, renders=self.renders)
        reply = display.show_all(self.chat.stream(question, sampling))
        self.trace = display.reasoning
        if reply is None:
            raise KeyboardInterrupt
        self.usages.append(reply.usage)
        report(reply)
        if self._is_kept(reply):
            self.unanswered = None

    def _is_kept(self, reply: Reply) -> bool:
        """Return True if the turn stays; drop one that has only a partial trace."""
        if reply.finish_reason == "cancelled" and not reply.answer:
            if reply.reasoning:
                self.chat.undo()
            return False
        return True

    def run_command(self, line: str) -> None:
        """Run a line such as ``/budget 100``.

        Raises:
            OptionError: there is no such command, or it cannot be done.
        """
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            raise OptionError(f"{line.splitlines()[0]}: no such command; {', '.join(COMMANDS)}")
        command = COMMANDS[name]
        if rest.strip() and not command.takes:
            raise OptionError(f"{name} takes nothing after it")
        command.act(self, rest.strip())

    def help(self, _: str) -> None:
        width = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
        for name, command in COMMANDS.items():
            tell(f"{f'{name} {command.takes}':{width}}  {command.help}")
        tell(KEYS)

    def retry(self, _: str) -> None:
        question = self.unanswered or self.chat.undo()
        if question is None:
            raise OptionError("/retry: there is no question yet")
        seed = None
        if self.sampling.seed is not None and self.usages:
            # The same seed would give the same reply.
            seed = self.usages[-1].seed + 1
        if self.sampling.temperature == 0:
            tell("at temperature 0 the same question has the same reply")
        self.ask(question, seed=seed)

    def budget(self, text: str) -> None:
        if text:
            if text != "off" and not text.isdecimal():
                raise OptionError(f"/budget {text}: use a number of tokens, or off")
            self._budget = None if text == "off" else int(text)
            self.sampling = replace(self.sampling, think_budget=self._budget)
        budget = self.sampling.think_budget
        tell(
            "the model sets the length of its traces"
            if budget is None
            else f"traces have {budget:,} tokens at most"
        )

    def think(self, text: str) -> None:
        if text:
            # /think on restores this budget.
            self._budget = self.sampling.think_budget or self._budget
            self.sampling = replace(
                self.sampling, think_budget=self._budget if on_or_off("/think", text) else 0
            )
        tell(
            "the model answers at once"
            if not self.sampling.thinks
            else "the model thinks before it answers"
        )

    def save(self, text: str) -> None:
        if not text:
            raise OptionError("/save needs a file: /save talk.cache")
        path = Path(text).expanduser()
        self.chat.save(path)
        tell(f"saved to {path}; --prompt-cache-file {path} goes on from it")

    def system(self, text: str) -> None:
        if text:
            self.chat.system_prompt = None if text == "off" else text
        own = self.chat.system_prompt
        tell(
            "only the model's own system prompt is used"
            if own is None
            else f"added to the model's own: {own}"
        )

    def show_trace(self, _: str) -> None:
        if not self.trace:
            raise OptionError("/trace: the last reply has none")
        write(sys.stderr, self.trace + "\n", is_dim=True)

    def fold(self, text: str) -> None:
        self.folds = on_or_off("/fold", text) if text else self.folds
        tell("a closed trace is folded to one line" if self.folds else "traces are shown in full")

    def markdown(self, text: str) -> None:
        self.renders = on_or_off("/markdown", text) if text else self.renders
        tell("Markdown is laid out" if self.renders else "Markdown is shown as text")

    def stats(self, _: str) -> None:
        magistral = self.magistral

        def total(name: str) -> float:
            return sum(getattr(usage, name) for usage in self.usages)

        prompt, cached, replied = (
            int(total(f"{kind}_tokens")) for kind in ("prompt", "cached", "completion")
        )
        turns = sum(message["role"] == "user" for message in self.chat.messages)
        left_out = (
            f", the oldest {self.chat.dropped_turns} left out" if self.chat.dropped_turns else ""
        )
        budget = (
            "none"
            if self.sampling.think_budget is None
            else f"{self.sampling.think_budget:,} tokens"
        )
        tell(f"conversation  {turns} turns{left_out}; traces kept: {self.chat.keep_reasoning}")
        tell(
            f"context       {magistral.cached_tokens:,} of {magistral.plan.context:,} positions "
            f"in the cache, {in_units(magistral.cache_bytes)}"
        )
        tell(
            f"read          {prompt:,} tokens, of which {cached:,} were in the cache; "
            f"the rest at {rate(prompt - cached, total('prefill_seconds'))}"
        )
        tell(
            f"written       {replied:,} tokens in {len(self.usages)} replies, of which "
            f"{int(total('reasoning_tokens')):,} reasoning; "
            f"{rate(replied - len(self.usages), total('decode_seconds'))}"
        )
        tell(
            f"sampling      temperature {self.sampling.temperature}, "
            f"top-p {self.sampling.top_p}, budget {budget}"
        )

    def reset(self, _: str) -> None:
        self.chat.reset()
        self.unanswered = None

    def quit(self, _: str) -> None:
        self.is_over = True


@dataclass(frozen=True)
class Command:
    takes: str
    help: str
    act: Callable[[Session, str], None]


COMMANDS = {
    "/retry": Command("", "ask the last question again", Session.retry),
    "/budget": Command("N|off", "reasoning tokens at most", Session.budget),
    "/think": Command("on|off", "turn the trace before an answer on or off", Session.think),
    "/system": Command("TEXT|off", "set a system prompt, added to the model's own", Session.system),
    "/trace": Command("", "show the last trace", Session.show_trace),
    "/fold": Command("on|off", "fold closed traces to one line", Session.fold),
    "/markdown": Command("on|off", "lay out Markdown in answers", Session.markdown),
    "/stats": Command("", "show the cost of the conversation", Session.stats),
    "/save": Command("F", "write conversation and cache to a file", Session.save),
    "/reset": Command("", "begin a new conversation", Session.reset),
    "/help": Command("", "show this", Session.help),
    "/quit": Command("", "end", Session.quit),
}


def on_or_off(command: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise OptionError(f"{command} {text}: use on or off")
    return text == "on"
