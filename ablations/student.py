"""Student's t distribution in pure Python: tail probability and quantile, for any positive number of degrees of freedom."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist


def t_two_sided(t: float, df: float) -> float:
    """P(|T| >= |t|) for Student's t: the regularised incomplete beta I_x(df/2, 1/2) at x = df / (df + t^2)."""
    if math.isnan(t) or math.isnan(df):
        return math.nan
    if math.isinf(t):
        return 0.0
    if math.isinf(df):
        return math.erfc(abs(t) / math.sqrt(2))
    return _incomplete_beta(df / 2, 0.5, df / (df + t * t), 1 - df / (df + t * t))


@lru_cache(maxsize=4096)
def t_quantile(probability: float, df: float) -> float:
    """The value that Student's t stays below with `probability` (0.5 < probability < 1)."""
    if math.isnan(df):
        return math.nan
    z = NormalDist().inv_cdf(probability)
    if math.isinf(df):
        return z
    tail = 2 * (1 - probability)
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t = z + (z**3 + z) / (4 * df)  # two terms of Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5)
    for _ in range(200):  # Halley's method; far off, where its denominator nears 0, at most two of Newton's steps
        density = scale * (1 + t * t / df) ** (-(df + 1) / 2)
        step = (t_two_sided(t, df) - tail) / (2 * density)
        step /= max(0.5, 1 - step * (df + 1) * t / (df + t * t) / 2)
        t += max(step, -t / 2)
        if abs(step) <= 1e-5 * t:  # the error left is of the order of the step's cube
            break
    return t


def t_df(quantile: float, probability: float) -> float:
    """The degrees of freedom at which `t_quantile(probability, df)` is `quantile`; infinity from the normal one down."""
    tail = 2 * (1 - probability)
    if t_two_sided(quantile, math.inf) >= tail:
        return math.inf

    def excess(inverse: float) -> float:  # in 1/df, in which the tail is nearly linear
        return t_two_sided(quantile, 1 / inverse if inverse else math.inf) - tail

    high = 1.0
    while excess(high) < 0:
        high *= 2
    return 1 / _root(excess, 0.0, high)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a rising function passes 0 between `low` and `high`, to 1e-11 of `high`: false position with the Illinois rule."""
    below, above, kept = function(low), function(high), 0
    while high - low > 1e-11 * high:
        middle = (low * above - high * below) / (above - below)
        value = function(middle)
        if value == 0 or not low < middle < high:
            return middle
        if value > 0:
            high, above = middle, value
            below, kept = (below / 2 if kept > 0 else below), 1
        else:
            low, below = middle, value
            above, kept = (above / 2 if kept < 0 else above), -1
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float, complement: float) -> float:
    """I_x(a, b) by Lentz's continued fraction (DLMF 8.17.22); `complement` = 1 - x is handed over, lest rounding lose it."""
    if x <= 0 or complement <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, complement, x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(complement)) / a
    tiny, c = 1e-300, 1.0
    fraction = d = 1 / (1 - (a + b) * x / (a + 1) or tiny)
    for m in range(1, 200):  # two levels of the fraction a round
        even = a + 2 * m
        term = m * (b - m) * x / ((even - 1) * even)
        d, c = 1 / (1 + term * d or tiny), 1 + term / c or tiny
        fraction *= c * d
        term = -(a + m) * (a + b + m) * x / (even * (even + 1))
        d, c = 1 / (1 + term * d or tiny), 1 + term / c or tiny
        fraction *= c * d
        if abs(1 - c * d) < 1e-14:
            break
    return front * fraction
