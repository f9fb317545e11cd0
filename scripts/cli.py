"""What every command shares: Hydra composes the configuration, rank 0 speaks, and bad input ends with exit code 2.

A command is a function of one config object:

    if __name__ == "__main__":
        main("generate", GenerateConfig, run)

Its schema is the dataclass; conf/NAME.yaml composes it. Keys that do not exist and values that do not fit are found
before anything starts, and reported in one line by rank 0 alone. --multirun is a loop over plain runs, of which the
first begins when all have been checked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from io import TextIOWrapper
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scripts.ending import FAILURE, RunFailed, crash, ending_on_signals, fail, leave_part
from scripts.ending import rank as rank  # commands ask cli for these two
from scripts.ending import say as say
from scripts.key_help import help_text

CONF = Path(__file__).resolve().parent.parent / "conf"
SWEEP_FLAGS = {"-m", "--multirun"}
DIR_FLAGS = {"-cd", "--config-dir"}
FILE_FLAGS = {"-cp", "--config-path", "-cn", "--config-name"}
INFO_FLAGS = {"-i", "--info"}  # take a value or none
VALUE_FLAGS = {"-c", "--cfg", "-p", "--package", "--experimental-rerun"} | DIR_FLAGS | FILE_FLAGS | INFO_FLAGS
HELP_FLAGS = {"-h", "--help"}
RUN_FLAGS = {"-r", "--run"} | SWEEP_FLAGS | DIR_FLAGS | FILE_FLAGS  # run the command; all others only print
TEXT_KEY = "prompt"  # its value is what a person wrote, not Hydra's grammar
SWEEP_KEYS = ("hydra.sweep", "hydra/sweeper", "hydra.launcher", "hydra/launcher", "hydra.mode")
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
        _main(name, schema, run, plan)


def _main(
    name: str, schema: type[Config], run: Callable[[Config], None], plan: Callable[[Config], None] | None
) -> None:
    register(name, schema)
    overrides, options = split([quote_text(argument) for argument in sys.argv[1:]])
    flags = {option.partition("=")[0] for option in options if option.startswith("-")}
    runs = flags <= RUN_FLAGS
    if rank() != 0 and not runs:
        return  # --help, --cfg and the like: once is enough
    jobs = [overrides]
    configs: list[Config] = []
    try:
        if runs and flags & SWEEP_FLAGS:
            jobs = _jobs(overrides)
            options = [option for option in options if option not in SWEEP_FLAGS]
        if flags & HELP_FLAGS:
            does = (sys.modules[run.__module__].__doc__ or "").partition("\n")[0]
            composed = compose(name, schema, overrides, folder=_folder(options))
            print(help_text(f"{name}: {does}", schema, composed, presets(_folder(options))))
            sys.exit(0)
        if flags <= SWEEP_FLAGS | DIR_FLAGS:
            folder = _folder(options)
            configs = [check(name, schema, job, folder=folder) for job in jobs]
            _require_own_files(configs)
    except (HydraException, OmegaConfBaseException) as error:
        fail(_first_lines(error))
    except ValueError as problem:
        fail(problem)

    if plan is not None and len(configs) > 1:
        for config in configs:
            _call(plan, config)

    def task(composed: Any) -> None:
        _call(run, OmegaConf.to_object(composed))  # here, since Hydra cuts tracebacks and adds lines of its own

    task.__module__ = f"scripts.{name}"  # Hydra names the command after it
    for number, job in enumerate(jobs, 1):
        if len(jobs) > 1 and rank() == 0:
            values = " ".join(argument for argument in job if argument not in overrides)
            print(f"job {number} of {len(jobs)}: {values}", file=sys.stderr, flush=True)
        sys.argv[1:] = [*job, *options]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    if dist.is_torchelastic_launched():
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


def register(name: str, schema: type[Any]) -> None:
    """Let Hydra find the schema that a command's YAML names."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def presets(folder: str | None = None) -> dict[str, list[str]]:
    """Return the names of the presets of every group, those in a folder of the user's own too."""
    found: dict[str, set[str]] = {}
    for root in (CONF, *([] if folder is None else [Path(folder)])):
        for file in root.glob("*/*.yaml"):
            found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(found[group]) for group in sorted(found)}


def quote_text(argument: str) -> str:
    """Return ``prompt=TEXT`` so that Hydra takes all of the text as it is, be it commas, braces or ${...}.

    Other arguments are returned as they are, and ``prompt=null``, which is no prompt. Between Hydra's quotes a
    backslash stands for itself, but before a quote, before ${ and at the end it escapes.
    """
    key, _, text = argument.partition("=")
    if key != TEXT_KEY or text == "null":
        return argument
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)'", r"\1\1\\'", text)
    text = re.sub(r"(\\+)\Z", r"\1\1", text)
    return f"{key}='{text}'"


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the overrides of a command line, and Hydra's flags with their values; both may stand anywhere.

    Hydra itself takes overrides in one piece only.
    """
    overrides, options, flag = list[str](), list[str](), ""
    for argument in arguments:
        is_flag = argument.startswith("-")
        is_value = flag in VALUE_FLAGS and not (flag in INFO_FLAGS and "=" in argument)
        (options if is_flag or is_value else overrides).append(argument)
        flag = argument if is_flag else ""
    return overrides, options


def _jobs(given: Sequence[str]) -> list[list[str]]:
    """Return the overrides of each job of a sweep: one for every combination of the values that are listed.

    Each then is a plain run. Hydra's own sweeper would leave a folder and a file of every rank.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(given)
        choices = [
            [f"{each.get_key_element()}={value}" for value in each.sweep_string_iterator()]
            if each.is_sweep_override()
            else [argument]
            for each, argument in zip(overrides, given, strict=True)
        ]
    return [list(job) for job in product(*choices)]


def check(name: str, schema: type[Config], arguments: Sequence[str], *, folder: str | None = None) -> Config:
    """Return the config that the overrides compose to; ValueError, or an error of Hydra's, says why it is not valid.

    ``folder`` holds presets beside those of conf/.
    """
    config: Config = OmegaConf.to_object(compose(name, schema, arguments, folder=folder))  # type: ignore[assignment]
    return config


def compose(name: str, schema: type[Any], arguments: Sequence[str], *, folder: str | None = None) -> DictConfig:
    """Return what conf/NAME.yaml and the overrides compose to, unchecked but for its keys and their types."""
    overrides = OverridesParser.create().parse_overrides(list(arguments))
    for override in overrides:
        _check_key(override, schema)
    search = [] if folder is None else [f"hydra.searchpath=['file://{Path(folder).resolve()}']"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, [*arguments, *search])


def _folder(options: Sequence[str]) -> str | None:
    """Return the value of --config-dir; None where it is not given. ValueError where it is no folder."""
    folder = None
    for option, following in pairwise([*options, ""]):
        flag, _, value = option.partition("=")
        if flag in DIR_FLAGS:
            folder = value or following
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


def _check_key(override: Override, schema: type[Any]) -> None:
    """Raise ValueError when an override names a key that the schema lacks, and say which keys there are."""
    key = override.key_or_group
    if key.startswith(SWEEP_KEYS):
        raise ValueError(f"{key} has no effect: --multirun runs one job after another and leaves only what they write")
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    node: Any = schema
    done: list[str] = []
    for part in key.split("."):
        choices = [field.name for field in fields(node)]
        if part not in choices:
            where = f"{'.'.join(done)} has" if done else "there are"
            near = get_close_matches(part, choices, 1)
            hint = f" did you mean {'.'.join([*done, near[0]])}?" if near else ""
            raise ValueError(f"{key} is not a key;{hint} {where}: {', '.join(choices)}")
        done.append(part)
        default = next(field for field in fields(node) if field.name == part)
        node = default.default_factory if is_dataclass(default.default_factory) else None
        if node is None:
            break
    if len(done) < len(key.split(".")) and not override.is_add():
        raise ValueError(f"{key} is not a key: {'.'.join(done)} is a value, not a group of keys")
