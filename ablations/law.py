"""The learning-rate law of a grid: log(rate) = a log(N) + b, N the decoder's parameters without embeddings (MM1, section 3.1).

    runs of one size at several rates -> mean held-out loss of each rate, over seeds -> parabola in log(rate) through the best
    rate and its neighbours -> optimum of the size -> straight line through all sizes, residuals, Student-t confidence intervals

The held-out loss is the mean over captions, interleaved documents and text of run.json's `validation`. A best rate at the edge of
the grid is refused: what lies beyond has not been looked at.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablations.student import t_quantile
from ablations.suites.composing import named
from configs.command import command
from configs.errors import UserError

MM1 = (-0.4214, -0.5535)
"""a and b of the paper."""


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one size; `losses`: mean held-out loss by rate."""

    size: str
    parameters: int
    rate: float
    losses: dict[float, float]


@dataclass(frozen=True)
class Law:
    """eta(N) = exp(a ln N + b). Intervals are None with two sizes, where the line has no residuals."""

    a: float
    b: float
    a_interval: tuple[float, float] | None
    b_interval: tuple[float, float] | None
    residuals: dict[str, float]
    """Of log(rate), by size."""
    optima: tuple[Optimum, ...]

    def rate(self, parameters: float) -> float:
        return math.exp(self.a * math.log(parameters) + self.b)


def best_rate(losses: Mapping[float, float], size: str = "") -> float:
    """The minimum of the parabola through the best rate and its two neighbours in log(rate).

    Raises UserError for fewer than three rates, or a best one at the edge.
    """
    rates = sorted(losses)
    if len(rates) < 3:
        raise UserError(f"size {size}: {len(rates)} learning rates are finished; the optimum of a size needs at least 3.")
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if best in (0, len(rates) - 1):
        where = "lowest" if best == 0 else "highest"
        raise UserError(
            f"size {size}: the {where} rate {rates[best]:g} is the best, so the optimum may lie beyond. Widen the grid."
        )
    chosen = rates[best - 1 : best + 2]
    x = np.log(chosen)
    curvature, slope, _ = np.polyfit(x - x[1], [losses[rate] for rate in chosen], 2)
    return float(math.exp(x[1] - slope / (2 * curvature)))


def fit(optima: Sequence[Optimum], level: float = 0.95) -> Law:
    """Least squares in logarithms. Raises UserError for fewer than two sizes."""
    if len({optimum.parameters for optimum in optima}) < 2:
        raise UserError("A law needs the best rates of at least two sizes.")
    x = np.log([optimum.parameters for optimum in optima])
    y = np.log([optimum.rate for optimum in optima])
    spread = float(((x - x.mean()) ** 2).sum())
    a = float(((x - x.mean()) * (y - y.mean())).sum() / spread)
    b = float(y.mean() - a * x.mean())
    residuals = y - (a * x + b)
    free = len(optima) - 2
    a_interval = b_interval = None
    if free > 0:
        variance = float((residuals**2).sum()) / free
        width = t_quantile(0.5 + level / 2, free)
        a_width = width * math.sqrt(variance / spread)
        b_width = width * math.sqrt(variance * (1 / len(x) + float(x.mean()) ** 2 / spread))
        a_interval, b_interval = (a - a_width, a + a_width), (b - b_width, b + b_width)
    named = {optimum.size: float(r) for optimum, r in zip(optima, residuals, strict=True)}
    return Law(a, b, a_interval, b_interval, named, tuple(optima))


def held_out_loss(info: Mapping[str, Any]) -> float:
    """Mean over the kinds of data, in nats a token; the control with shuffled images left out."""
    losses = [
        float(v) for name, v in (info.get("validation") or {}).items() if name.startswith("loss_") and "shuffled" not in name
    ]
    return sum(losses) / len(losses) if losses else float("nan")


def optima_of(cells: Sequence[Any], size_axis: str, rate_axis: str) -> list[Optimum]:
    """Of a suite's finished cells (record.SuiteCell). Raises UserError that lists what is not finished, or diverged."""
    if missing := [cell.name for cell in cells if not cell.trained]:
        raise UserError(
            f"{len(missing)} of {len(cells)} cells are not trained yet: {', '.join(missing[:6])}. Run the suite first."
        )
    found: dict[str, dict[float, list[float]]] = {}
    parameters: dict[str, int] = {}
    for cell in cells:
        info = cell.run.info
        size, rate = cell.choice[size_axis], float(info["peak_lr"])
        loss = held_out_loss(info)
        if not math.isfinite(loss):
            measured = any(name.startswith("loss_") for name in info.get("validation") or {})
            why = f"peak_lr={rate:g} diverged; take that rate out of the grid" if measured else "train.validation_sequences was 0"
            raise UserError(f"{cell.folder / 'run.json'}: no finite held-out loss: {why}.")
        found.setdefault(size, {}).setdefault(rate, []).append(loss)
        parameters[size] = int(info["parameters"]["decoder_without_embeddings"])
    optima = []
    for size, by_rate in found.items():
        losses = {rate: sum(values) / len(values) for rate, values in sorted(by_rate.items())}
        optima.append(Optimum(size, parameters[size], best_rate(losses, size), losses))
    return sorted(optima, key=lambda optimum: optimum.parameters)


def as_yaml(law: Law, about: str) -> str:
    """A file for configs: a, b, and what they rest on."""
    import yaml

    content = asdict(law)
    content["optima"] = [asdict(optimum) for optimum in law.optima]
    for key in ("a_interval", "b_interval"):
        content[key] = list(content[key]) if content[key] else None
    return f"# {about}\n# peak learning rate = exp(a ln N + b), N = decoder parameters without embeddings\n" + yaml.safe_dump(
        content, sort_keys=False
    )


def report(law: Law) -> str:
    def interval(given: tuple[float, float] | None) -> str:
        return f"[{given[0]:.4f}, {given[1]:.4f}]" if given else "no interval with two sizes"

    lines = [
        f"log(eta) = a log(N) + b    a = {law.a:.4f} {interval(law.a_interval)}    b = {law.b:.4f} {interval(law.b_interval)}",
        f"MM1:                       a = {MM1[0]}    b = {MM1[1]}",
        "",
        f"{'size':>8}  {'parameters':>12}  {'best rate':>10}  {'law':>10}  {'residual':>9}  {'MM1 law':>10}",
    ]
    for optimum in law.optima:
        paper = math.exp(MM1[0] * math.log(optimum.parameters) + MM1[1])
        lines.append(
            f"{optimum.size:>8}  {optimum.parameters:>12,}  {optimum.rate:>10.2e}  {law.rate(optimum.parameters):>10.2e}  "
            f"{law.residuals[optimum.size]:>+9.3f}  {paper:>10.2e}"
        )
    return "\n".join(lines)


@dataclass
class LawConfig:
    suite_name: str = "learning_rate"
    scale_name: str = "tiny"
    folder: str | None = None
    output: str | None = None


@command("law", schema=LawConfig)
def _main(config: LawConfig) -> None:
    """Fit the learning-rate law to the finished cells of a suite, with residuals and confidence intervals.

    suite=learning_rate scale=tiny   a suite whose file says law: {size: AXIS, rate: AXIS}
    folder=NAME_OR_PATH              of the suite, where it was started with settings of its own
    output=FILE                      where the law goes; null: <home>/suites/SUITE-SCALE/law.yaml

    The rate for a decoder of N parameters is exp(a ln N + b): python -m mm1.train optim.law=FILE
    """
    from ablations.suites.planning import suite_cells, suite_folder
    from ablations.suites.suite import load_suite

    suite = load_suite(config.suite_name)
    if suite.law is None:
        raise UserError(f"suite={config.suite_name} has no law: {{size: AXIS, rate: AXIS}} in its file.")
    place = suite_folder(suite.name, config.scale_name, folder=config.folder)
    place.check(suite.name, config.scale_name)
    cells = suite_cells(suite, config.scale_name, folder=config.folder)
    law = fit(optima_of(cells, suite.law["size"], suite.law["rate"]))
    path = Path(config.output).expanduser() if config.output else place.folder / "law.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        as_yaml(law, f"Fitted to {len(cells)} runs of suite {suite.name} at scale {config.scale_name}"), encoding="utf-8"
    )
    print(report(law))
    print(f"\nWritten: {path}\nTrain by it: python -m mm1.train optim.law={path}")


def main() -> None:
    sys.argv[1:] = named(sys.argv[1:], ["suite", "scale"])
    _main()


if __name__ == "__main__":
    main()
