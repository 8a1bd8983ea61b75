"""Composing many configurations quickly: the same result as configs.command.compose, a few milliseconds each.

Of a thousand cells most choose the same files from the config groups and differ in values. So Hydra composes each choice of files
once, and values (`optim.peak_lr=1e-3`, `+data.sources.more.ratio=0.1`) are put into a copy by Hydra's own parser. What these
cannot express (deletions) goes to Hydra whole.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs import CONFIG_DIR
from configs.command import ablation_names, apart_from_hydra, quoted, register, typed
from configs.errors import UserError
from mm1.config import TrainConfig


def override_key(override: str) -> str:
    """What an override sets: `+data.sources.more.ratio=0.1` -> `data.sources.more.ratio`."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def chooses_file(override: str) -> bool:
    """Whether it picks a file of a config group (`connector=avgpool`) and does not set a value (`connector.num_tokens=4`)."""
    return "/" in override.partition("=")[0] or (CONFIG_DIR / override_key(override)).is_dir()


@dataclass(frozen=True, order=True)
class Setting:
    """A key that an override sets, or a config group of which it picks a file (`is_file`)."""

    key: str
    is_file: bool

    def meets(self, other: Setting) -> bool:
        """Whether one would undo the other. A value within a file that is picked (connector=avgpool, connector.num_tokens=4) does
        not; a value within a mapping that is given whole does."""
        if self.key == other.key:
            return True
        outer, inner = sorted((self, other), key=lambda setting: len(setting.key))
        return inner.key.startswith(f"{outer.key}.") and not outer.is_file


def settings_of(override: str) -> list[Setting]:
    """What an override sets; of `+ablation=NAME` what that file does."""
    if not override.startswith("+ablation="):
        return [Setting(override_key(override), chooses_file(override))]
    from omegaconf import OmegaConf

    found = []
    for name in ablation_names(override.partition("=")[2]):
        path = CONFIG_DIR / "ablation" / f"{name}.yaml"
        # an unknown one is refused by Hydra
        written: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}
        for default in written.pop("defaults", []):
            if isinstance(default, dict):
                found += [Setting(key.removeprefix("override ").strip("/"), True) for key in default]
        found += [Setting(key, False) for key in _leaves(written)]
    return found


def _leaves(node: Any, key: str = "") -> list[str]:
    if not isinstance(node, dict):
        return [key]
    return [leaf for name, value in node.items() for leaf in _leaves(value, f"{key}.{name}" if key else str(name))]


class Composer:
    """`compose(overrides)` -> the training configuration of one cell."""

    def __init__(self) -> None:
        register("train_schema", TrainConfig)
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self._parser = OverridesParser.create()
        self._chosen: dict[tuple[str, ...], Any] = {}
        self._parsed: dict[str, Any] = {}

    def compose(self, overrides: Sequence[str]) -> TrainConfig:
        """Raises UserError for what Hydra or the configuration itself refuses, as one line that begins with the override."""
        return typed(self.raw(overrides))

    def raw(self, overrides: Sequence[str]) -> Any:
        """As Hydra composes it, not yet checked as a whole: what all cells share may be no training by itself. Raises UserError
        for what Hydra refuses."""
        simple = not any(override.startswith(("~", "++")) for override in overrides)
        files = tuple(o for o in overrides if chooses_file(o)) if simple else tuple(overrides)
        raw = copy.deepcopy(self._files(files))
        for override in overrides if simple else ():
            if not chooses_file(override):
                self._set(raw, override)
        return raw

    def _files(self, overrides: tuple[str, ...]) -> Any:
        if overrides in self._chosen:
            return self._chosen[overrides]
        from hydra import compose, initialize_config_dir
        from hydra.errors import HydraException
        from omegaconf import open_dict
        from omegaconf.errors import OmegaConfBaseException

        try:
            with apart_from_hydra(), initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                raw = compose("train", overrides=list(overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{' '.join(overrides)}: {first_line(error)}") from error
        names = [name for o in overrides if o.startswith("+ablation=") for name in ablation_names(o.partition("=")[2])]
        with open_dict(raw):
            # what `typed` reads of Hydra's own node; the rest of it would only be copied a thousand times
            raw.hydra = {"overrides": {"task": [f"+ablation=[{','.join(names)}]"] if names else []}}
        self._chosen[overrides] = raw
        return raw

    def _set(self, raw: Any, override: str) -> None:
        from hydra.errors import HydraException
        from omegaconf import OmegaConf, open_dict
        from omegaconf.errors import OmegaConfBaseException

        try:
            if override not in self._parsed:
                self._parsed[override] = self._parser.parse_override(quoted(override))
            parsed = self._parsed[override]
            key, value = parsed.key_or_group, parsed.value()
            if parsed.is_add():
                with open_dict(raw):
                    OmegaConf.update(raw, key, value, merge=True, force_add=True)
            else:
                OmegaConf.update(raw, key, value, merge=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{override}: {first_line(error)}") from error


def named(arguments: Sequence[str], keys: Sequence[str]) -> list[str]:
    """A command's arguments with `scale=tiny` as `scale_name=tiny`: a bare group's name would mean that group's file to Hydra."""
    return [
        f"{key}_name={value}" if (key := a.partition("=")[0]) in keys and (value := a.partition("=")[2]) else a for a in arguments
    ]


def step_overrides(scale: str, steps: int | None, extra: Sequence[str]) -> list[str]:
    """steps=100 -> train.steps=100 with as large a share of warm-up as the scale has. UserError if `extra` sets the steps too."""
    if steps is None:
        return []
    if other := next((o for o in extra if o.startswith("train.steps=")), None):
        raise UserError(f"steps={steps} and {other}: give one of them.")
    base = Composer().raw([f"scale={scale}", *extra])
    warmup = round(base.optim.warmup_steps * steps / base.train.steps)
    found = [f"train.steps={steps}"]
    if not any(o.startswith("optim.warmup_steps=") for o in extra):
        found.append(f"optim.warmup_steps={min(warmup, steps - 1)}")
    return found


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
