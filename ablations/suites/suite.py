"""A suite: axes over configurations, the way a table or figure of the paper varies one thing after another.

    configs/suite/connector.yaml -> axes x seeds -> cells -> composed and checked, all of them, before anything starts

    axes:                                   a cell takes one variant of every axis
      connector:
        avgpool: [connector=avgpool]                                       overrides, as `python -m mm1.train` takes them
        cabstractor: [connector=cabstractor]
      tokens:
        few: {tiny: [connector.num_tokens=4], mm1: [connector.num_tokens=64]}   by scale; a variant is left out of other scales
    baseline: {connector: cabstractor, tokens: few}

An axis may change one section of the configuration (connector, data, ...) and nothing that another axis changes; what goes beyond
that must be declared (`changes:`), so that a difference in a table is of what its row says.

Training seeds 0, 1, ... draw the new weights and the order of the data together. Within a seed all cells see the same documents
in the same order, so every difference is paired; across seeds the spread is that of the whole training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ablations.suites.composing import Composer, first_line, override_key, settings_of
from ablations.suites.record import file_name
from configs import CONFIG_DIR
from configs.command import register
from configs.errors import UserError
from mm1.config import TrainConfig
from mm1.run import config_differences

SCALES = ("tiny", "small", "mm1")
MATCHINGS = ("tokens", "images", "flops", "steps")
FREE = ("seed", "train.steps", "optim.warmup_steps")
"""What matching and seeds set; never counted as a change of an axis."""
SHOWN_PROBLEMS = 20


@dataclass
class EvaluationConfig:
    """How every cell is evaluated: the settings of eval.fewshot, and of eval.textcore where `textcore` is given."""

    tasks: list[str] | None = None
    shots: list[int] = field(default_factory=lambda: [0, 4, 8])
    limit: int | None = 200
    seed: int = 0
    demonstration_seeds: list[int] = field(default_factory=list)
    """Further demonstrations for the same queries, each an evaluation of its own; tables show their spread."""
    images: list[str] = field(default_factory=lambda: ["true"])
    """true, and controls: shuffled, none."""
    overrides: list[str] = field(default_factory=list)
    """Further settings of eval.fewshot, as on its command line."""
    textcore: list[str] | None = None
    """Settings of eval.textcore; null: it is not run."""

    def validate(self) -> None:
        self.images = [images.lower() for images in self.images]
        if "true" not in self.images:
            raise UserError(f"evaluation.images={self.images}: true must be among them; controls are compared with it.")

    def fewshot(self) -> list[list[str]]:
        """Overrides of each evaluation, `run=` left out."""
        listed = "null" if self.tasks is None else f"[{','.join(self.tasks)}]"
        common = [f"tasks={listed}", f"shots=[{','.join(map(str, self.shots))}]"]
        common += [f"limit={'null' if self.limit is None else self.limit}", f"seed={self.seed}", *self.overrides]
        drawn = [f"demonstration_seed={seed}" for seed in self.demonstration_seeds if seed != self.seed]
        return [[*common, f"images={images}", *more] for images in self.images for more in ([], *([seed] for seed in drawn))]


@dataclass
class SuiteConfig:
    name: str = "???"
    about: str = ""
    """What it varies, and where the paper does."""
    axes: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: Any = None
    """Overrides of every cell: a list, or lists by scale."""
    baseline: dict[str, Any] = field(default_factory=dict)
    """The cell the others are compared with: axis -> variant, or that by scale. Axes left out: their first variant."""
    matching: str = "tokens"
    """What all cells consume alike: tokens, images, flops or steps; see ablations/suites/matching.py."""
    changes: dict[str, list[str]] = field(default_factory=dict)
    """Axis -> sections or keys it changes beside or beyond one section."""
    seeds: int = 1
    """Training seeds unless the command says how many."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    paper: dict[str, dict[str, float]] = field(default_factory=dict)
    """The paper's values: label of a cell -> number of shots -> points."""
    law: dict[str, str] | None = None
    """{size: AXIS, rate: AXIS} of a learning-rate grid, which `ablations.law` fits."""

    def validate(self) -> None:
        where = f"configs/suite/{self.name}.yaml"
        if self.matching not in MATCHINGS:
            raise UserError(f"{where}: matching={self.matching}; must be one of {', '.join(MATCHINGS)}.")
        if self.seeds < 1:
            raise UserError(f"{where}: seeds={self.seeds}; must be at least 1.")
        self.evaluation.validate()
        for axis in self.changes:
            if axis not in self.axes:
                raise UserError(f"{where}: changes names {axis!r}, which is no axis. Axes: {', '.join(self.axes) or 'none'}.")
        for axis, variants in self.axes.items():
            if axis in SCALES:
                raise UserError(f"{where}: an axis cannot be called {axis}, which is a scale. Give it another name.")
            if not variants:
                raise UserError(f"{where}: axis {axis} has no variants. Add some, or take the axis out.")


register("suite_schema", SuiteConfig, group="suite")


def suite_names() -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / "suite").glob("*.yaml"))


def load_suite(name: str, overrides: Mapping[str, Any] | None = None) -> SuiteConfig:
    """A suite from configs/suite without the command. Raises UserError for an unknown one, or a key given twice in its file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = CONFIG_DIR / "suite" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"suite={name}: there is no {path}. Suites: {', '.join(suite_names())}.")
    try:
        written: Any = OmegaConf.load(path)
        given = {key: value for key, value in written.items() if key != "defaults"}
        merged = OmegaConf.merge(OmegaConf.structured(SuiteConfig), given, overrides or {})
        suite: Any = OmegaConf.to_object(merged)
    except YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}. Each variant and each key may stand there once.") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {first_line(error)}") from error
    if suite.name != name:
        raise UserError(f"{path}: name: {suite.name}; it must be {name}, the file's own name, by which folders and tables go.")
    suite.validate()
    return suite


# ---------------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class PlannedCell:
    """One training of a suite. `choice`: axis -> variant; `overrides`: what `python -m mm1.train` would be told."""

    suite: str
    choice: dict[str, str]
    seed: int
    overrides: tuple[str, ...]
    config: TrainConfig
    baseline: bool

    @property
    def label(self) -> str:
        """What its seeds share, and what a table calls the row."""
        return label_of(self.choice)

    def with_steps(self, steps: int, warmup: int) -> PlannedCell:
        """The same cell trained for `steps` steps."""
        train = replace(self.config.train, steps=steps)
        config = replace(self.config, train=train, optim=replace(self.config.optim, warmup_steps=warmup))
        config.validate()
        return replace(self, config=config, overrides=(*self.overrides, f"train.steps={steps}", f"optim.warmup_steps={warmup}"))


def label_of(choice: Mapping[str, str]) -> str:
    return ".".join(choice.values()) or "base"


def variants_at(suite: SuiteConfig, scale: str) -> dict[str, dict[str, list[str]]]:
    """Axis -> variant -> overrides at this scale, in the file's order."""
    axes = {}
    for axis, variants in suite.axes.items():
        found = {label: at_scale(given, scale) for label, given in variants.items()}
        axes[axis] = {str(label): given for label, given in found.items() if given is not None}
        if not axes[axis]:
            raise UserError(f"suite {suite.name}: axis {axis} has no variant at scale {scale}. Give one, or take another scale.")
    return axes


def at_scale(given: Any, scale: str) -> list[str] | None:
    """Overrides of a list, or of the scale's list in a mapping; None where that has no such scale."""
    if isinstance(given, Mapping):
        if wrong := [key for key in given if key not in SCALES]:
            raise UserError(f"suite: {wrong[0]!r} is no scale; give a list of overrides or {{tiny: [...], small: [...]}}.")
        given = given.get(scale)
        if given is None:
            return None
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(item, str) for item in given):
        raise UserError(f"suite: a variant must be a list of overrides such as [connector.num_tokens=4], not {given!r}.")
    return list(given)


def baseline_choice(suite: SuiteConfig, axes: Mapping[str, Mapping[str, Any]], scale: str) -> dict[str, str]:
    by_scale = bool(suite.baseline) and all(key in SCALES for key in suite.baseline)
    given: Mapping[str, Any] = suite.baseline.get(scale, {}) if by_scale else suite.baseline
    for axis, label in given.items():
        if axis not in axes or str(label) not in axes[axis]:
            known = ", ".join(axes.get(axis, axes))
            raise UserError(f"suite {suite.name}: baseline {{{axis}: {label}}} is not there at scale {scale}. Known: {known}.")
    return {axis: str(given.get(axis, next(iter(variants)))) for axis, variants in axes.items()}


def plan_cells(
    suite: SuiteConfig, scale: str, *, seeds: Sequence[int] = (0,), extra: Iterable[str] = (), composer: Composer | None = None
) -> list[PlannedCell]:
    """All cells of a suite, the baseline's first, composed and checked. `extra`: overrides of every cell.

    Raises UserError that lists every cell that is invalid, not only the first.
    """
    if scale not in SCALES:
        raise UserError(f"scale={scale}: must be one of {', '.join(SCALES)}.")
    composer, extra = composer or Composer(), list(extra)
    axes = variants_at(suite, scale)
    _refuse_shared_keys(suite, axes, extra)
    base = [f"scale={scale}", *(at_scale(suite.base or [], scale) or []), *extra]
    composer.raw(base)  # a key that no cell can have is said once, before axes are put to it
    first = baseline_choice(suite, axes, scale)
    choices = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())]
    choices.sort(key=lambda choice: choice != first)
    _refuse_doubles(suite, choices)
    cells: list[PlannedCell] = []
    problems: list[tuple[str, str]] = []
    for choice, seed in itertools.product(choices, seeds):
        chosen = [override for axis, label in choice.items() for override in axes[axis][label]]
        overrides = (*base, *chosen, f"seed={seed}", f"name={run_name(suite, choice)}")
        try:
            cells.append(PlannedCell(suite.name, choice, seed, overrides, composer.compose(overrides), choice == first))
        except UserError as error:
            if seed == seeds[0]:
                problems.append((label_of(choice), str(error)))
    if problems:
        if len(problems) == len(choices) and len(texts := {text for _, text in problems}) == 1:
            raise UserError(texts.pop())  # said once
        more = f"\n  and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        listed = "\n  ".join(f"{label}: {text}" for label, text in problems[:SHOWN_PROBLEMS])
        count = f"{len(problems)} of {len(choices)} cells are invalid"
        raise UserError(f"suite {suite.name}, scale {scale}: {count}:\n  {listed}{more}")
    _refuse_undeclared(suite, [cell for cell in cells if cell.seed == seeds[0]])
    return cells


def run_name(suite: SuiteConfig, choice: Mapping[str, str]) -> str:
    return file_name(f"{suite.name}.{label_of(choice)}")


def _refuse_doubles(suite: SuiteConfig, choices: Sequence[Mapping[str, str]]) -> None:
    names: dict[str, Mapping[str, str]] = {}
    for choice in choices:
        other = names.setdefault(run_name(suite, choice), choice)
        if other is not choice:
            raise UserError(
                f"suite {suite.name}: two cells have the name {run_name(suite, choice)}: {dict(other)} and {dict(choice)}. "
                "Rename one of the variants."
            )


def _refuse_shared_keys(suite: SuiteConfig, axes: Mapping[str, Mapping[str, Sequence[str]]], extra: Sequence[str]) -> None:
    """Two axes, or an axis and an override for all cells, that set one key: the later would silently win."""
    touched = {
        axis: {setting for overrides in variants.values() for o in overrides for setting in settings_of(o)}
        for axis, variants in axes.items()
    }
    for override in extra:
        if (key := override_key(override)) in ("seed", "name"):
            what = "seeds=[...] says which training seeds are run" if key == "seed" else "runs are named by suite and cell"
            raise UserError(f"{override}: not a setting for all cells of a suite; {what}. Leave it out.")
        for axis, settings in touched.items():
            for own in sorted(settings):
                if any(own.meets(setting) for setting in settings_of(override)):
                    raise UserError(f"{override}: axis {axis} of suite {suite.name} varies {own.key}. Leave it out.")
    for one, other in itertools.combinations(touched, 2):
        both = {max(a, b).key for a in touched[one] for b in touched[other] if a.meets(b)}
        shared = {key for key in both if not _declared(suite, one, key) and not _declared(suite, other, key)}
        if shared:
            raise UserError(
                f"suite {suite.name}: the axes {one} and {other} both set {', '.join(sorted(shared))}. Make one axis of them, or "
                f"declare it: changes: {{{other}: [{', '.join(sorted(shared))}]}}"
            )


def _declared(suite: SuiteConfig, axis: str, key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in suite.changes.get(axis, ()))


def _refuse_undeclared(suite: SuiteConfig, cells: Sequence[PlannedCell]) -> None:
    """An axis whose step from the baseline changes more than one section of what makes the weights."""
    base = next(cell for cell in cells if cell.baseline)
    for cell in cells:
        moved = [axis for axis in cell.choice if cell.choice[axis] != base.choice[axis]]
        if len(moved) != 1:
            continue
        keys = [key for key in changed_keys(base.config, cell.config) if not _declared(suite, moved[0], key)]
        sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
        if len(sections) > 1:
            raise UserError(
                f"suite {suite.name}: variant {cell.choice[moved[0]]!r} of axis {moved[0]} changes {' and '.join(sections)} "
                f"({', '.join(keys[:6])}). If that is meant, say so: changes: {{{moved[0]}: [{', '.join(sections)}]}}"
            )


def changed_keys(base: TrainConfig, other: TrainConfig) -> list[str]:
    """The keys that change the weights and differ, without seeds and steps."""
    found = [text.partition(": ")[0] for text in config_differences(base.identity(), other.identity())]
    return [key for key in found if key not in FREE]
