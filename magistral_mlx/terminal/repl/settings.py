"""Commands that change how replies are made and shown."""

from dataclasses import replace

from magistral_mlx.errors import OptionError, counted
from magistral_mlx.library.known_folders import find_model
from magistral_mlx.terminal.display import tell
from magistral_mlx.terminal.repl.lines import number_in, on_or_off, whole_number_in
from magistral_mlx.terminal.repl.session import Session


def temperature(session: Session, text: str) -> None:
    if text:
        session.sampling = replace(session.sampling, temperature=number_in("/temp", text))
    value = session.sampling.temperature
    tell(f"the temperature is {value:g}{'' if value else ', so replies are greedy'}")


def top_p(session: Session, text: str) -> None:
    if text:
        session.sampling = replace(session.sampling, top_p=number_in("/top-p", text))
    tell(f"top-p is {session.sampling.top_p:g}")


def seed(session: Session, text: str) -> None:
    if text:
        value = None if text == "off" else whole_number_in("/seed", text, "off")
        session.sampling = replace(session.sampling, seed=value)
    tell(
        "each reply has a seed of its own"
        if session.sampling.seed is None
        else f"the seed is {session.sampling.seed}"
    )


def budget(session: Session, text: str) -> None:
    if text:
        session.budget = None if text == "off" else whole_number_in("/budget", text, "off")
        session.sampling = replace(session.sampling, think_budget=session.budget)
    value = session.sampling.think_budget
    tell(
        "the model sets the length of its traces"
        if value is None
        else f"traces have {counted(value, 'token')} at most"
    )


def think(session: Session, text: str) -> None:
    if text:
        # /think on restores this budget.
        session.budget = session.sampling.think_budget or session.budget
        value = session.budget if on_or_off("/think", text) else 0
        session.sampling = replace(session.sampling, think_budget=value)
    tell(
        "the model thinks before it answers"
        if session.sampling.thinks
        else "the model answers at once"
    )


def fold(session: Session, text: str) -> None:
    session.folds = on_or_off("/fold", text) if text else session.folds
    tell("a closed trace is folded to one line" if session.folds else "traces are shown in full")


def markdown(session: Session, text: str) -> None:
    session.renders = on_or_off("/markdown", text) if text else session.renders
    tell("Markdown is laid out" if session.renders else "Markdown is shown as text")


def system(session: Session, text: str) -> None:
    if text:
        session.chat.system_prompt = None if text == "off" else text
    own = session.chat.system_prompt
    tell(
        "only the model's own system prompt is used"
        if own is None
        else f"added to the model's own: {own}"
    )


def model(session: Session, text: str) -> None:
    if not text:
        tell(f"the model is {session.models.name}")
        return
    name = find_model(text)
    if name == session.models.name:
        raise OptionError(f"/model: {text} is the model that is loaded")
    session.switch_to(name)
    tell(f"{text} goes on with this conversation, and reads it anew")
