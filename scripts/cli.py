"""What every command shares: Hydra composes presets, the command line sets values, and bad input ends with exit code 2.

A command is a function of one config object:

    if __name__ == "__main__":
        main("generate", GenerateConfig, run)

Its schema is the dataclass. conf/NAME.yaml and the presets that the command line names (GROUP=PRESET) are Hydra's to
compose; values (KEY=VALUE) are read by scripts/settings.py, after the schema's types. What does not fit is found before
anything starts, and reported in one line by rank 0 alone. --multirun is a loop over plain runs, of which the first
begins when all have been checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from io import TextIOWrapper
from itertools import product
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from parallel.slurm import environment
from scripts import settings
from scripts.ending import FAILURE, RunFailed, crash, ending_on_signals, fail, leave_part
from scripts.ending import rank as rank  # commands ask cli for these three
from scripts.ending import say as say
from scripts.ending import say_json as say_json
from scripts.key_help import help_text

CONF = Path(__file__).resolve().parent.parent / "conf"
Config = TypeVar("Config")


def main(
    name: str,
    schema: type[Config],
    run: Callable[[Config], None],
    *,
    plan: Callable[[Config], None] | None = None,
) -> None:
    """Compose conf/NAME.yaml with the command line's overrides and run the command on every rank.

    ``plan`` finds what ``run`` would refuse, without its cost; it looks at every job of a sweep before the first runs.
    ValueError and OSError that one of them raises on all ranks alike end these with exit code 2 and their message,
    RunFailed with exit code 1 and its message. All else, and a ValueError out of a model's steps, ends with exit code 1
    and a traceback. Signals end it as scripts/ending.py says.
    """
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of another encoding ends no command
    with ending_on_signals():
        try:
            os.environ.update(environment(os.environ))  # who speaks is known before anything starts
        except ValueError as problem:
            fail(problem)
        _main(name, schema, run, plan)


def _main(
    name: str, schema: type[Config], run: Callable[[Config], None], plan: Callable[[Config], None] | None
) -> None:
    try:
        options = _Flags(prog=name).parse_intermixed_args(sys.argv[1:])
        folder = _folder(options.config_dir)
        if options.help or options.cfg:
            if rank() == 0:  # once is enough
                tree = compose(name, schema, options.settings, folder=folder)
                print(_help(name, schema, run, tree, folder) if options.help else _as_yaml(tree))
            return
        jobs = _jobs(schema, options.settings) if options.multirun else [options.settings]
        configs = [check(name, schema, job, folder=folder) for job in jobs]
        _require_own_files(configs)
    except (HydraException, OmegaConfBaseException) as error:
        fail(_first_lines(error))
    except ValueError as problem:
        fail(problem)

    if plan is not None and len(configs) > 1:
        for config in configs:
            _call(plan, config)
    for number, (job, config) in enumerate(zip(jobs, configs, strict=True), 1):
        if len(jobs) > 1 and rank() == 0:
            values = " ".join(argument for argument in job if argument not in options.settings)
            print(f"job {number} of {len(jobs)}: {values}", file=sys.stderr, flush=True)
        _call(run, config)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # One of gloo's threads may outlive its group and abort an orderly exit ("terminate called without an active
        # exception", torch 2.13, now and then with 4 ranks): what was to be done is done, so end here.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _call(step: Callable[[Any], None], config: Any) -> None:
    """Take a step of one job; every way that it can fail ends the rank."""
    try:
        step(config)
    except (ValueError, OSError) as problem:
        fail(problem)
    except RunFailed as problem:
        fail(problem, FAILURE)
    except Exception as defect:
        crash(defect)
    leave_part()


def presets(folder: str | None = None) -> dict[str, list[str]]:
    """Return the names of the presets of every group, those in a folder of the user's own too."""
    found: dict[str, set[str]] = {}
    for root in (CONF, *([] if folder is None else [Path(folder)])):
        for file in root.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def check(name: str, schema: type[Config], arguments: Sequence[str], *, folder: str | None = None) -> Config:
    """Return the settings that the arguments compose to; ValueError, or an error of Hydra's, says why they cannot be.

    ``folder`` holds presets beside those of conf/.
    """
    return settings.build(schema, compose(name, schema, arguments, folder=folder))


def compose(name: str, schema: type[Any], arguments: Sequence[str], *, folder: str | None = None) -> settings.Tree:
    """Return the values of all keys, of their types: the schema's, then conf/NAME.yaml's, then the arguments'."""
    chosen, values = list[str](), list[tuple[str, str]]()
    for argument in arguments:
        key, text = _parse(schema, argument)
        if _is_preset(schema, key, text, folder):
            chosen.append(argument)
        else:
            values.append((key, text))
    if folder is not None:
        path = str(Path(folder).resolve()).replace("\\", "\\\\").replace("'", "\\'")
        chosen.append(f"hydra.searchpath=['file://{path}']")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose(name, chosen))
    tree = settings.defaults(schema)
    settings.overlay(tree, schema, composed)  # type: ignore[arg-type]
    for key, text in values:
        settings.put(tree, key, settings.read(key, text, settings.type_of(schema, key)))
    settings.resolve(tree, schema)
    return tree


def _parse(schema: type[Any], argument: str) -> tuple[str, str]:
    """Return the key and the text of an argument; ValueError where it has none, or there is no such key."""
    key, equals, text = argument.partition("=")
    key = key.lstrip("+")
    settings.type_of(schema, key.lstrip("~"))
    if not equals or key.startswith("~"):
        raise ValueError(f"{argument} is not KEY=VALUE; null is no value")
    return key, text


def _is_preset(schema: type[Any], key: str, text: str, folder: str | None) -> bool:
    """Return whether an argument names presets of a group, GROUP=PRESET, and no value."""
    return is_dataclass(settings.type_of(schema, key)) and bool(text) and key in presets(folder)


def _jobs(schema: type[Any], arguments: Sequence[str]) -> list[list[str]]:
    """Return the arguments of each job of a sweep: one for every combination of the values that are listed.

    Texts are split at commas, prompts never. Other values are Hydra's to list: 1,2 or range(1,9) or glob(*).
    """
    choices = []
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        for argument in arguments:
            key, text = _parse(schema, argument)
            values = [text]
            if settings.is_text(settings.type_of(schema, key)):
                values = [text] if key == settings.RAW_KEY else settings.split(text)
            elif settings.json_object(text) is not None:  # of commas that list nothing
                pass
            elif (override := parser.parse_overrides([argument])[0]).is_sweep_override():
                values = list(override.sweep_string_iterator())
            choices.append([f"{key}={value}" for value in values] if len(values) > 1 else [argument])
    return [list(job) for job in product(*choices)]


class _Flags(argparse.ArgumentParser):
    """The flags of every command; they and its KEY=VALUE arguments may stand anywhere."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, add_help=False, allow_abbrev=False)
        self.add_argument("-h", "--help", action="store_true")
        self.add_argument("-c", "--cfg", choices=["job"])
        self.add_argument("-m", "--multirun", action="store_true")
        self.add_argument("-cd", "--config-dir")
        self.add_argument("settings", nargs="*")

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; the flags are --help, --cfg job, --multirun and --config-dir FOLDER")


def _help(name: str, schema: type[Any], run: Callable[..., None], tree: settings.Tree, folder: str | None) -> str:
    does = (sys.modules[run.__module__].__doc__ or "").partition("\n")[0]
    return help_text(f"{name}: {does}", schema, tree, presets(folder))


def _as_yaml(tree: settings.Tree) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).rstrip("\n")


def _folder(folder: str | None) -> str | None:
    """Return the value of --config-dir; ValueError where it is no folder."""
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--config-dir {folder} is not a folder; give one that holds GROUP/PRESET.yaml files")
    return folder


def _require_own_files(configs: Sequence[Any]) -> None:
    """Raise ValueError when a job of a sweep would write over another's file."""
    for key in ("output", "metrics", "cache.events"):
        files = [file for file in (_value(config, key) for config in configs) if file is not None]
        for file in files:
            if files.count(file) > 1 and (Path(file).is_file() or not Path(file).exists()):  # /dev/null takes many
                raise ValueError(
                    f"{key} = {file} would be written by {files.count(file)} jobs; name it after a key that differs, "
                    f"as in '{key}=job-${{sampling.max_tokens}}'"
                )


def _value(config: Any, key: str) -> Any:
    """Return the value of a key; None where the command has no such key."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return config


def _first_lines(error: BaseException) -> str:
    """Join the messages of an error and its root cause, without repeats and without the search path."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    texts = [str(each).partition("Config search path")[0] for each in (error, cause)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return " ".join(dict.fromkeys(line for line in lines if line))
