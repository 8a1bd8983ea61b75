"""A command of the suite = a typed dataclass + a YAML file of the same name + a function.

    @command("train", schema=TrainConfig)
    def main(config: TrainConfig) -> None:
        '''First line: what the command is for. The rest is printed by --help.'''

gives `python -m mm1.train +ablation=connector_avgpool optim.peak_lr=1e-3`: composed by Hydra, checked against the dataclass,
handed over as an instance of it. A UserError ends the command with its text alone and exit status 2; --help lists every group
of the command's configuration with a line for each option and answers without importing torch.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from configs import CONFIG_DIR
from configs.errors import UserError

T = TypeVar("T")


def register(name: str, schema: type, group: str | None = None) -> None:
    """Make a dataclass known to Hydra, so that a YAML file can name it first in its defaults and is checked against it."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=name, node=schema, group=group)


def command(config_name: str, *, schema: type[T]) -> Callable[[Callable[[T], Any]], Callable[[], None]]:
    """Turn `function(config)` into a command-line entry point; see the module docstring."""

    def decorate(function: Callable[[T], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            arguments = _normalise(sys.argv[1:], list_keys(schema))
            if not {"-h", "--help"}.isdisjoint(arguments):
                print(help_text(config_name, inspect.getdoc(function) or "", _program(function)))
                return
            import hydra

            register(f"{config_name}_schema", schema)
            sys.argv[1:] = arguments
            status = 0

            def job(raw: Any) -> None:
                nonlocal status
                status = _run(function, raw)

            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(job)()
            if status:
                sys.exit(status)

        return main

    return decorate


def compose(config_name: str, schema: type[T], overrides: list[str] | None = None) -> T:
    """The same configuration a command would get, for tests and for code that plans runs.

    Raises hydra's ConfigCompositionException (wrong key, type or option) or UserError (an impossible combination).
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register(f"{config_name}_schema", schema)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        raw = hydra_compose(config_name, overrides=_normalise(overrides or [], list_keys(schema)), return_hydra_config=True)
    return typed(raw)


def typed(raw: Any) -> Any:
    """A composed DictConfig -> the dataclass it was checked against; its `validate()` runs if it has one."""
    from omegaconf import MissingMandatoryValue, OmegaConf, open_dict

    hydra_node = raw.get("hydra")
    if hydra_node is None:
        from hydra.core.hydra_config import HydraConfig

        hydra_node = HydraConfig.get()
    # not runtime.choices, where Hydra leaves out a group that was given as a list
    chosen = [text for text in hydra_node.overrides.task if text.startswith("+ablation=")]
    if "hydra" in raw:
        with open_dict(raw):
            del raw["hydra"]
    if "ablation" in raw:
        raw.ablation = [name for text in chosen for name in ablation_names(text.partition("=")[2])]
    missing = OmegaConf.missing_keys(raw)
    if missing:
        add = " ".join(f"{key}=..." for key in sorted(missing))
        raise UserError(f"{', '.join(sorted(missing))}: no value given. Add {add} to the command.")
    try:
        config: Any = OmegaConf.to_object(raw)
    except MissingMandatoryValue as error:
        raise UserError(str(error)) from error
    if hasattr(config, "validate"):
        config.validate()
    return config


def ablation_names(value: str) -> list[str]:
    """What stands behind `+ablation=`: none, one or several names."""
    return re.findall(r"[^\[\],'\"\s]+", value)


def _run(function: Callable[[T], Any], raw: Any) -> int:
    try:
        return function(typed(raw)) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _normalise(arguments: list[str], lists: Collection[str] = ()) -> list[str]:
    """Drop the --local_rank that launchers add (ranks come from the environment); join several +ablation=; quote paths."""
    ablations: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        if argument.startswith(("--local_rank", "--local-rank")):
            continue
        key, _, value = argument.partition("=")
        if key == "+ablation":
            ablations += ablation_names(value)
        elif value:
            value = _quoted(value)
            rest.append(f"{key}=[{value}]" if key in lists and _ONE_WORD.fullmatch(value) else f"{key}={value}")
        else:
            rest.append(argument)
    if ablations:
        rest.append(f"+ablation={ablations[0]}" if len(ablations) == 1 else f"+ablation=[{','.join(ablations)}]")
    return rest


def _quoted(value: str) -> str:
    """Quote what Hydra's grammar refuses but paths have: a leading ~, the braces of shard-{000..127}.tar, alone or in a list."""
    if re.search("^{|[\"'()$]", value):  # a mapping, quoted by the user, a sweep, an interpolation
        return value
    if value.startswith("["):
        return re.sub(r"[^\s\[\],]*\{\w+\.\.\w+\}[^\s\[\],]*", r'"\g<0>"', value)
    return f'"{value}"' if value.startswith("~") or "{" in value else value


_ONE_WORD = re.compile(r"""(?!null$)("[^"]*"|[^\s\[\](){},$'"]+)""")
"""A value that can only mean the list's one item; `a,b` is left to Hydra, whose message says to write [a,b]."""


def list_keys(schema: type) -> set[str]:
    """The schema's keys that hold lists: there KEY=WORD is taken for KEY=[WORD], which Hydra would refuse in its own terms."""

    def holds_list(hint: Any) -> bool:
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        return any(get_origin(part) is list for part in parts)

    return {key for key, hint in get_type_hints(schema).items() if holds_list(hint)}


def _program(function: Callable[..., Any]) -> str:
    module = function.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec else os.path.basename(sys.argv[0])
    return f"python -m {module}"


# ----------------------------------------------------------------------------------------------------------------- help


def groups_of(config_name: str) -> list[str]:
    """The config groups a primary config draws on, in its order; `ablation` joins them where it exists for that command."""
    text = (CONFIG_DIR / f"{config_name}.yaml").read_text(encoding="utf-8")
    named = re.findall(r"^\s*-\s*(?:override\s+)?/?([\w/]+)(?:@\w+)?:", text, flags=re.MULTILINE)
    groups = [name for name in named if not name.startswith("hydra")]
    if re.search(r"^ablation:", text, flags=re.MULTILINE):
        groups.insert(0, "ablation")
    return groups


def summary(path: Path) -> str:
    """A config file's own one-line description: its first comment that is no directive."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @package"):
            return line.lstrip("# ").strip()
    return ""


def help_text(config_name: str, doc: str, program: str) -> str:
    lines = [doc, "", f"usage: {program} [KEY=VALUE ...]", ""]
    for group in groups_of(config_name):
        sign = "+" if group == "ablation" else ""
        lines.append(f"{sign}{group}=")
        options = sorted((CONFIG_DIR / group).glob("*.yaml"))
        width = max((len(o.stem) for o in options), default=0)
        lines += [f"  {option.stem:<{width}}  {summary(option)}" for option in options]
        lines.append("")
    lines.append(f"{program} --cfg job prints the whole configuration with every key; any of them can be set as KEY=VALUE.")
    return "\n".join(lines)


logging.getLogger("hydra").setLevel(logging.WARNING)
