"""Keep models and settings: ``magistral pull``, ``list``, ``show``, ``remove`` and ``config``."""

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import click

from magistral_mlx.checkpoint.folder import DEMO
from magistral_mlx.checkpoint.hub_api import Unreachable, is_hub_id
from magistral_mlx.demo import resolve_model
from magistral_mlx.errors import MemoryLimitError, OptionError, as_flags, in_units, quoted, visible
from magistral_mlx.files import settings_path
from magistral_mlx.library import settings
from magistral_mlx.library.details import details
from magistral_mlx.library.hub_models import hide_progress
from magistral_mlx.library.known_folders import find_model
from magistral_mlx.library.models import bits_of, find_local, local_models
from magistral_mlx.library.preview import preview
from magistral_mlx.library.removal import find_removable, remove_model
from magistral_mlx.library.texts import in_words, model_table
from magistral_mlx.library.toml_file import in_toml
from magistral_mlx.model.memory import plan_for
from magistral_mlx.terminal import command_line
from magistral_mlx.terminal.asking.model_name import READY_MADE, complete_models
from magistral_mlx.terminal.display import remark
from magistral_mlx.terminal.flags_from_options import suggest
from magistral_mlx.terminal.verbosity import is_quiet, waiting
from magistral_mlx.tokenizer.agreement import check_before_weights

CODES = "Exit codes: 0 done, 2 something to change, 130 interrupted, 1 a bug."
CONFIG_EPILOG = f"""\b
Examples:
  magistral config
  magistral config model magistral-4bit
  magistral config temp 0.5
  magistral config --unset temp

A setting is the default of the flag of the same name, in generate, chat, plan and run; a flag that
is typed wins. For the model, MAGISTRAL_MODEL wins over the file. The file is
~/.config/magistral-mlx/config.toml, or the one that MAGISTRAL_CONFIG names.

\b
Settings:
  {{names}}

\b
{CODES}""".format(names="\n  ".join(" or ".join(names) for names in settings.names_of_keys()))


PULL_EPILOG = f"""\b
Examples:
  magistral pull
  magistral pull org/name
  magistral pull org/name --revision main

Without ID it is {READY_MADE},
Magistral Small in 4 bit. The files go into the hub's own cache, which HF_HUB_CACHE names; a
download that was interrupted resumes. If no model is the default, this one becomes it.

\b
{CODES}"""
LIST_EPILOG = f"""\b
Examples:
  magistral list
  magistral list --json

Shown are the demo, the folders that were converted or loaded here, and the models in the hub's
cache. The context is the tokens of prompt and reply together that fit this machine.

\b
{CODES}"""
SHOW_EPILOG = f"""\b
Examples:
  magistral show demo
  magistral show magistral-4bit --json

\b
{CODES}"""
REMOVE_EPILOG = f"""\b
Examples:
  magistral remove magistral-4bit
  magistral remove lmstudio-community/Magistral-Small-2506-MLX-4bit --yes

Only a model of the hub's cache is removed, or a folder that magistral convert has made and that
holds no other files. At a terminal it asks first.

\b
{CODES}"""


@click.command("pull", cls=command_line.Command, epilog=PULL_EPILOG)
@click.argument("model", metavar="[ID]", default=READY_MADE)
@click.option("--revision", metavar="R", help="Branch, tag or commit.")
@click.option(
    "--tokenizer",
    metavar="T",
    help="A folder or hub id whose tekken.json fits a model that has none and names no base model.",
)
@click.option("--force", is_flag=True, help="Fetch a model that does not fit this machine, too.")
def pull(*, model: str, revision: str | None, tokenizer: str | None, force: bool) -> int:
    """Fetch a model from the hub, and say first what it takes."""
    found = find_model(model)
    if found == DEMO or os.path.isdir(os.path.expanduser(found)):
        raise OptionError(f"{model} is on this machine already; a hub id has the form org/name")
    if not is_hub_id(found):
        raise OptionError(f"{quoted(model)} is no hub id; use the form org/name")
    if is_quiet():
        hide_progress()
    try:
        seen = preview(found, revision)
    except Unreachable:
        seen = None  # a complete copy in the cache is enough, and what lacks is told below
    if seen is not None:
        bits = bits_of(seen.checkpoint)
        remark(f"{found}: {bits:.3g} bit, {in_units(seen.nbytes)} in all")
        try:
            context = plan_for(seen.checkpoint, settings.load_options()).context
            remark(f"fits this machine, with a context of {context:,} tokens")
        except MemoryLimitError as error:
            if not force:
                raise MemoryLimitError(
                    f"{found} does not fit this machine, so it is not fetched (--force fetches "
                    f"it): {error.template}"
                ) from None
            remark(f"does not fit this machine: {as_flags(error)}")
    with waiting(f"fetching {found}"):
        folder = resolve_model(
            found, revision, check=partial(check_before_weights, given=tokenizer)
        )
    print(folder)
    if settings.default_model() is None and revision is None:
        settings.set_value(settings.key_of(settings.MODEL), found)
        remark("it is the default model now: magistral chat")
    return command_line.DONE


@click.command("list", cls=command_line.Command, epilog=LIST_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array instead of text.")
def list_models(*, as_json: bool) -> int:
    """List the models on this machine, their sizes, and what fits."""
    models = local_models()
    if as_json:
        found = [asdict(model) | {"folder": str(model.folder)} for model in models]
        print(json.dumps(found, ensure_ascii=False))
        return command_line.DONE
    print(visible(model_table(models)))
    broken = [model.name for model in models if model.context is None]
    if broken:
        remark(f'"-" means that it cannot be loaded; magistral show {broken[0]} tells why')
    default = settings.default_model()
    if any(model.is_default for model in models):
        remark("* is the default: magistral config model NAME changes it")
    elif default is None:
        remark("none is the default: magistral config model NAME makes one")
    else:
        remark(f"the default, {default}, is not here")
    return command_line.DONE


@click.command("show", cls=command_line.Command, epilog=SHOW_EPILOG)
@click.argument("model", metavar="M", shell_complete=complete_models)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def show(*, model: str, as_json: bool) -> int:
    """Show all that the files of a model tell about it."""
    found = details(find_local(model))
    print(json.dumps(found, ensure_ascii=False) if as_json else in_words(found))
    return command_line.DONE


@click.command("remove", cls=command_line.Command, epilog=REMOVE_EPILOG)
@click.argument("model", metavar="M", shell_complete=complete_models)
@click.option("--yes", is_flag=True, help="Remove without asking.")
def remove(*, model: str, yes: bool) -> int:
    """Remove a model from this machine."""
    found = find_removable(model)
    what = visible(f"{found.folder if found.kind == 'folder' else found.name}")
    if not yes:
        if not sys.stdin.isatty():
            raise OptionError(f"{what} would be removed; say --yes, as nobody can be asked here")
        if not click.confirm(f"Remove {what}, {in_units(found.disk_bytes)}?", err=True):
            return command_line.DONE
    print(f"{what}: removed, {in_units(remove_model(found))} freed")
    if found.is_default:
        remark("it was the default model; magistral config model NAME makes another")
    return command_line.DONE


@click.command("config", cls=command_line.Command, epilog=CONFIG_EPILOG)
@click.argument("key", required=False, shell_complete=suggest(*settings.KEYS))
@click.argument("value", required=False)
@click.option(
    "--unset", metavar="KEY", shell_complete=suggest(*settings.KEYS), help="Remove a setting."
)
def config(*, key: str | None, value: str | None, unset: str | None) -> int:
    """Show the defaults of flags, or set one."""
    path = settings_path()
    if unset is not None:
        if key is not None:
            raise click.UsageError("--unset KEY stands alone; leave the other words out")
        if not settings.unset_value(unset):
            raise OptionError(f"{unset} is not set in {path}")
        return command_line.DONE
    if key is None:
        found = settings.read_settings()
        for name, each in found.items():
            print(f"{name.replace('_', '-')} = {in_toml(each)}")
        print(f"({path}{'' if found else ' sets nothing'})", file=sys.stderr)
        return command_line.DONE
    setting = settings.key_of(key)
    if value is None:
        found = settings.read_settings()
        if setting.option.name not in found:
            raise OptionError(f"{setting.name} is not set in {path}")
        print(_plain(found[setting.option.name]))
        return command_line.DONE
    if setting.name == settings.MODEL:
        value = _model_to_keep(value)
    settings.set_value(setting, settings.parse_value(setting, value))
    return command_line.DONE


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else in_toml(value)


def _model_to_keep(name: str) -> str:
    """Return a model's name as it holds in every folder."""
    found = find_model(name)
    if os.path.isdir(os.path.expanduser(found)):
        return os.path.abspath(os.path.expanduser(found))
    if found != DEMO and not is_hub_id(found):
        raise OptionError(
            f"{quoted(name)} is no model here; magistral list shows those that are, and a hub id "
            "has the form org/name"
        )
    return found
