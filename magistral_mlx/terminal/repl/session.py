"""The state of a conversation at the prompt: its model, its settings and its file."""

import gc
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from magistral_mlx.engine.chat import Chat
from magistral_mlx.engine.magistral import Magistral
from magistral_mlx.errors import OverwriteError, counted
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.generation.reply import Reply, Usage
from magistral_mlx.terminal.display import Display, remark, report, tell
from magistral_mlx.terminal.prompt import interruptible
from magistral_mlx.terminal.repl.history import show_turns


@dataclass
class Models:
    """The model that is loaded, and the way to another one.

    Attributes:
        name: of the model that is loaded.
        check: raises MagistralError for a model that cannot be used or does not fit.
        open: loads a model.
    """

    name: str
    check: Callable[[str], object]
    open: Callable[[str], Magistral]


@dataclass
class Session:
    """The state that commands change.

    Attributes:
        file: where the conversation is saved at the end, if it is.
        unanswered: the last question, if the conversation does not have it.
        budget: the reasoning budget that ``/think on`` restores.
    """

    models: Models
    magistral: Magistral
    chat: Chat
    sampling: SamplingParams
    file: Path | None = None
    is_interactive: bool = False
    hides_reasoning: bool = False
    folds: bool = True
    renders: bool = True
    is_over: bool = False
    trace: str = ""
    unanswered: str | None = None
    usages: list[Usage] = field(default_factory=list)
    budget: int | None = None
    _saved: object = None

    def __post_init__(self) -> None:
        self._saved = self._state()

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

    def go_on_with(self, chat: Chat, file: Path) -> None:
        """Continue another conversation, which its file holds."""
        self.chat, self.file = chat, file
        self._forget()
        self._saved = self._state()

    def reset(self) -> None:
        """Begin a new conversation. Errors: ``Chat.save``."""
        self.keep()
        self.chat.reset()
        self._forget()

    def _forget(self) -> None:
        self.trace, self.unanswered = "", None
        self.usages.clear()

    def switch_to(self, name: str) -> None:
        """Go on with another model; this one is freed before the other one is loaded.

        Raises:
            MagistralError: the other one cannot be used; this one is loaded, if need be again.
        """
        self.models.check(name)
        self.keep()
        former, self.models.name = self.models.name, name
        self._free_model()
        try:
            self._use(self.models.open(name))
        # Ctrl-C, too: the conversation needs a model.
        except BaseException:
            tell(f"{name} is not loaded; {former} is loaded again")
            self.models.name = former
            self._reopen(former)
            raise

    def _reopen(self, name: str) -> None:
        """Load the model from before; without one the conversation ends, and its text is shown."""
        try:
            self._use(self.models.open(name))
        except BaseException:
            self.is_over, self.file = True, None
            tell("no model is loaded any more, so the conversation ends. It was:")
            show_turns(self.chat)
            raise

    def _free_model(self) -> None:
        del self.magistral, self.chat.magistral
        # A cache and its layers refer to each other.
        gc.collect()

    def _use(self, magistral: Magistral) -> None:
        self.magistral, self.chat = magistral, self.chat.moved_to(magistral)

    @property
    def has_answers(self) -> bool:
        """True if the model has said anything."""
        return any(message["role"] == "assistant" for message in self.chat.messages)

    @property
    def is_unsaved(self) -> bool:
        """True if a turn would be lost with the conversation."""
        return self.has_answers and self._saved != self._state()

    def save(self, path: Path, *, overwrite: bool = False) -> None:
        """Write the conversation to a file. Errors: ``Chat.save``."""
        self.chat.save(path, overwrite=overwrite)
        # The session's own file is to have it as well.
        if self.file in (None, path):
            self._saved = self._state()

    def keep(self) -> None:
        """Write the conversation to its file, if it has one and a turn would be lost."""
        if self.file is not None and self.is_unsaved:
            self.save(self.file)
            tell(f"saved to {self.file}")

    def save_at_end(self) -> None:
        """Write the conversation to its file, or beside it if somebody else has written there.

        Raises:
            OptionError: it cannot be written.
        """
        file = self.file
        if file is None:
            return
        if not self.is_unsaved:
            if self._saved != self._state() and file.exists():
                remark(f"there is nothing new to save; {file} is unchanged")
            return
        try:
            self.save(file)
        except OverwriteError:
            self.file = self._save_beside(file)
            remark(
                f"{file} holds another conversation by now, or a newer state of this one; "
                f"this one is saved to {self.file}"
            )
        else:
            remark(f"saved to {file}: {counted(self.turns, 'turn')}")

    @property
    def turns(self) -> int:
        """Questions in the conversation."""
        return sum(message["role"] == "user" for message in self.chat.messages)

    def _save_beside(self, file: Path) -> Path:
        number = 2
        while True:
            beside = file.with_name(f"{file.stem}-{number}{file.suffix}")
            with suppress(OverwriteError):
                if not os.path.lexists(beside):
                    self.save(beside)
                    return beside
            number += 1

    def _state(self) -> object:
        """Return what a file would have of the conversation beside its cache."""
        return self.chat.keep_reasoning, list(self.chat.messages)
