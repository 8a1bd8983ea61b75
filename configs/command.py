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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
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
            arguments = _normalise(sys.argv[1:], key_kinds(schema))
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
    with apart_from_hydra(), initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        raw = hydra_compose(config_name, overrides=_normalise(overrides or [], key_kinds(schema)), return_hydra_config=True)
    return typed(raw)


@contextmanager
def apart_from_hydra() -> Iterator[None]:
    """Inside a command Hydra is in use already, and would refuse to compose anything else."""
    from hydra.core.global_hydra import GlobalHydra

    instance = GlobalHydra.instance()
    instance.hydra, outer = None, instance.hydra
    try:
        yield
    finally:
        instance.hydra = outer


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


def _normalise(arguments: list[str], kinds: Mapping[str, KeyKind] | None = None) -> list[str]:
    """Drop the --local_rank that launchers add (ranks come from the environment); join several +ablation=; `quoted`."""
    ablations: list[str] = []
    rest: list[str] = []
    for argument in arguments:
        if argument.startswith(("--local_rank", "--local-rank")):
            continue
        key, _, value = argument.partition("=")
        if key == "+ablation":
            ablations += ablation_names(value)
        else:
            rest.append(quoted(argument, (kinds or {}).get(key.lstrip("+~"))))
    if ablations:
        rest.append(f"+ablation={ablations[0]}" if len(ablations) == 1 else f"+ablation=[{','.join(ablations)}]")
    return rest


# -------------------------------------------------------------------------------------------------------------- quoting


@dataclass(frozen=True)
class KeyKind:
    """Whether a key of a schema holds a list, and whether it or its items are texts and nothing else."""

    is_list: bool
    is_text: bool


def key_kinds(schema: type, prefix: str = "") -> dict[str, KeyKind]:
    """The schema's keys that hold lists or texts, those of dataclasses within it behind a dot."""
    found: dict[str, KeyKind] = {}
    for key, hint in get_type_hints(schema).items():
        parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        parts = tuple(part for part in parts if part is not type(None))
        if len(parts) != 1:
            continue
        part: Any = parts[0]
        if isinstance(part, type) and is_dataclass(part):
            found |= key_kinds(part, f"{prefix}{key}.")
        elif get_origin(part) is list:
            found[prefix + key] = KeyKind(True, get_args(part) == (str,))
        elif part is str:
            found[prefix + key] = KeyKind(False, True)
    return found


def quoted(override: str, kind: KeyKind | None = None) -> str:
    """KEY=VALUE with quotes where Hydra's grammar would refuse or change what was meant, also in the items of a list.

    Quoted are signs that paths have and that grammar has not (~, é, #, =, the braces of shard-{000..127}.tar), and where the
    key holds texts what looks like a number or a truth value (the hash 12e45678). Where it holds a list, one word is taken for
    the list's one item. Left alone is what has quotes or escapes already, interpolations, mappings and Hydra's functions.
    """
    key, equals, value = override.partition("=")
    text = kind is not None and kind.is_text
    if re.search(r"^\{|[\"'\\]|\$\{", value):
        pass
    elif not value.startswith("["):
        value = _item(value, text, sweep=True)
    elif "{" not in re.sub(r"\{\w+\.\.\w+\}", "", value):
        value = re.sub(r"[^\[\],\s][^\[\],]*", lambda found: _item(found[0], text), value)
    if kind is not None and kind.is_list and _ONE_WORD.fullmatch(value):
        value = f"[{value}]"
    return key + equals + value


def _item(value: str, text: bool, sweep: bool = False) -> str:
    plain = _PLAIN.fullmatch(value.replace(",", "") if sweep else value)
    if _FUNCTION.fullmatch(value) or (plain and not (text and _LITERAL.fullmatch(value.strip()))):
        return value
    return quote(value)


def quote(text: str) -> str:
    """The value that Hydra reads back as this text, whatever its signs: backslashes count before a quote only."""
    return '"' + re.sub(r'(\\*)("|$)', lambda found: 2 * found[1] + found[2].replace('"', '\\"'), text) + '"'


_PLAIN = re.compile(r"[\w/\-+.$%*@?|: ]*", re.ASCII)
"""What Hydra's grammar takes without quotes (backslashes, its escapes, are looked at before)."""
_FUNCTION = re.compile(r"[a-z]+\(.*\)")
_LITERAL = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(e[+-]?\d+)?|[+-]?inf|nan|true|false", re.IGNORECASE)
_ONE_WORD = re.compile(r"""(?!null$)("[^"]*"|[^\s\[\](){},$'"]+)""")
"""A value that can only mean the list's one item; `a,b` is left to Hydra, whose message says to write [a,b]."""


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
