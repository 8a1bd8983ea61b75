"""How a benchmark reports: a row a case, as a table or (--json) as one JSON object a line."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass


@dataclass
class Row:
    """`ours` and `peer` in `unit`, higher is better; `ratio` of the two; `limit`: what the hardware would allow at most."""

    case: str
    ours: float
    peer: float
    ratio: float
    limit: float
    unit: str
    peer_name: str
    limit_name: str


def best_rate(count: int, work: Callable[[], object], repeats: int) -> float:
    """`count` over the fastest of `repeats` runs, after one that warms up: the run least disturbed by other work."""
    work()
    fastest = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        fastest = min(fastest, time.perf_counter() - start)
    return count / fastest


def print_rows(rows: Iterable[Row], as_json: bool) -> None:
    """As each row comes: long cases show that they are done."""
    if not as_json:
        print(f"{'case':<14}{'ours':>12}{'peer':>12}{'ratio':>8}{'limit':>12}  unit")
    for row in rows:
        if as_json:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()}), flush=True)
        else:
            numbers = f"{row.ours:>12,.0f}{row.peer:>12,.0f}{row.ratio:>8.2f}{row.limit:>12,.0f}"
            print(f"{row.case:<14}{numbers}  {row.unit} (peer: {row.peer_name}; limit: {row.limit_name})", flush=True)


def arguments(description: str, cases: Iterable[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", action="append", choices=sorted(cases), help="only this case; may be given again")
    return parser.parse_args()
