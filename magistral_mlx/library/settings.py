"""The user's settings: a small TOML file with defaults for the flags of the command lines."""

import os
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from magistral_mlx.errors import OptionError, quoted
from magistral_mlx.files import settings_path
from magistral_mlx.generation.params import SamplingParams
from magistral_mlx.library.toml_file import in_toml, read_table, remove_keys, write_lines
from magistral_mlx.model.load_options import LoadOptions
from magistral_mlx.options import Option, alternatives, option, options_of

MODEL, MODEL_VARIABLE = "model", "MAGISTRAL_MODEL"
# The options of loading that are settings. The others belong to one model or one run.
LOADING = (
    "max_kv_size",
    "kv_bits",
    "prefill_step_size",
    "memory_gb",
    "num_draft_tokens",
    "tokenizer",
)
# Those that a plan for this machine takes.
PLANNED = ("kv_bits", "prefill_step_size", "memory_gb")


@dataclass(frozen=True, slots=True)
class Default:
    """The setting that is no option of a model."""

    model: str | None = option(None, "The model of commands that name none.")


@dataclass(frozen=True, slots=True)
class Key:
    """A setting: the option whose default it is, and the class that checks its value."""

    option: Option
    owner: type

    @property
    def name(self) -> str:
        return self.option.name.replace("_", "-")

    def checked(self, value: object) -> Any:
        """Return a value as the option takes it.

        Raises:
            OptionError: it has another type, or is out of range.
        """
        if isinstance(value, list):
            value = tuple(value)
        if not _fits(value, self.option.type):
            raise OptionError(f"{self.name} is {quoted(value)}; use {_described(self.option.type)}")
        self.owner(**{self.option.name: value})
        # The range of a context depends on the model, so its options do not check it.
        if self.option.name == "max_kv_size" and value < 1:  # type: ignore[operator]
            raise OptionError(f"{self.name} is {value}; use a whole number from 1 on")
        return value


def _keys() -> dict[str, Key]:
    """Return every setting by each of its names: the flags without their dashes."""
    loading = {option.name: option for option in options_of(LoadOptions)}
    keys = [Key(option, Default) for option in options_of(Default)]
    keys += [Key(option, SamplingParams) for option in options_of(SamplingParams)]
    keys += [Key(loading[name], LoadOptions) for name in LOADING]
    names = {key.name: key for key in keys}
    for key in keys:
        names |= {alias[2:]: key for alias in key.option.aliases if alias.startswith("--")}
    return names


KEYS = _keys()


def names_of_keys() -> list[list[str]]:
    """Return the names of each setting, the first of which is written into the file."""
    keys = dict.fromkeys(key.name for key in KEYS.values())
    return [[name for name in KEYS if KEYS[name].name == key] for key in keys]


def key_of(name: str) -> Key:
    """Return a setting by its name; raise OptionError, which names the nearest, if it is none."""
    found = KEYS.get(_plain(name))
    if found is not None:
        return found
    near = get_close_matches(name, KEYS, n=1)
    names = ", ".join(dict.fromkeys(key.name for key in KEYS.values()))
    hint = f"did you mean {near[0]}?" if near else f"use one of {names}"
    raise OptionError(f"{quoted(name)} is not a setting; {hint}")


def read_settings() -> dict[str, Any]:
    """Return the user's settings by the names of the options, such as ``max_tokens``.

    Raises:
        OptionError: the file cannot be read, has a key that is none, or a value that is wrong.
    """
    path = settings_path()
    found: dict[str, Any] = {}
    for name, value in read_table(path).items():
        try:
            key = key_of(name)
            if key.option.name in found:
                raise OptionError(f"{key.name} is set twice, by two names of it; keep one")
            found[key.option.name] = key.checked(value)
        except OptionError as error:
            raise OptionError(
                f"{path}: {error.template}. `magistral config --unset {name}` removes it"
            ) from None
    return found


def default_model() -> str | None:
    """Return the model for commands that name none: MAGISTRAL_MODEL, else the settings'.

    Raises:
        OptionError: as for ``read_settings``.
    """
    found: str | None = os.environ.get(MODEL_VARIABLE) or read_settings().get(MODEL)
    return found


def load_options() -> LoadOptions:
    """Return the options of a plan for this machine: the settings without the context."""
    settings = read_settings()
    values = {name: settings[name] for name in PLANNED if name in settings}
    return LoadOptions(**values)


def parse_value(key: Key, text: str) -> Any:
    """Return the value that a word of a command line means.

    Raises:
        OptionError: it is not a value of this setting.
    """
    allowed = alternatives(key.option.type)
    value: Any = text
    if not text.isprintable():
        raise OptionError(f"{key.name} is {quoted(text)}; use one line of plain text")
    if str not in allowed and not any(_is_text(each) for each in allowed):
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            # Several texts need TOML's list; one is written as it is.
            value = [text] if any(get_origin(each) is tuple for each in allowed) else text
    return key.checked(value)


def set_value(key: Key, value: Any) -> None:
    """Write one setting; the other lines of the file, and its comments, stay.

    Raises:
        OptionError: the file cannot be read or written, or has a form that is not edited here.
    """
    path = settings_path()
    lines, table = remove_keys(path, _names_of(key))
    lines.append(f"{key.name} = {in_toml(value)}")
    write_lines(path, lines, {**table, key.name: value})


def unset_value(name: str) -> bool:
    """Remove one setting, also one that has a wrong name; return whether it was there.

    Raises:
        OptionError: there is no such setting; or as for ``set_value``.
    """
    path = settings_path()
    key = KEYS.get(_plain(name))
    names = {name} if key is None else _names_of(key)
    if not names & set(read_table(path)):
        key_of(name)  # names the nearest, if this is none
        return False
    write_lines(path, *remove_keys(path, names))
    return True


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _names_of(key: Key) -> set[str]:
    return {name for name, other in KEYS.items() if other is key}


def _is_text(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and isinstance(get_args(annotation)[0], str)


def _fits(value: object, annotation: Any) -> bool:
    """Return whether a value has the type of an option; None is no value."""
    for each in alternatives(annotation):
        if get_origin(each) is Literal:
            fits = value in get_args(each) and type(value) is type(get_args(each)[0])
        elif get_origin(each) is tuple:
            fits = isinstance(value, tuple) and all(isinstance(text, str) for text in value)
        elif each is float:
            fits = type(value) in (int, float)
        else:
            fits = each is not type(None) and type(value) is each
        if fits:
            return True
    return False


def _described(annotation: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    for each in alternatives(annotation):
        if get_origin(each) is Literal:
            return f"one of {', '.join(map(str, get_args(each)))}"
        if get_origin(each) is tuple:
            return "a text, or a list of texts"
        if each in words:
            return words[each]
    raise AssertionError(annotation)
