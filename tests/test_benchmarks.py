"""Benchmarks run and report what they promise; how fast they find the machine is nobody's test."""

from __future__ import annotations

import json
import subprocess
import sys


def test_a_row_a_case_as_json() -> None:
    arguments = [sys.executable, "-m", "benchmarks.data", "--json", "--repeats", "1", "--case", "images_640"]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=True)
    (row,) = [json.loads(line) for line in result.stdout.splitlines()]
    assert row["case"] == "images_640"
    assert set(row) == {"case", "ours", "peer", "ratio", "limit", "unit", "peer_name", "limit_name"}
    assert min(row["ours"], row["peer"], row["limit"]) > 0
    assert abs(row["ratio"] - row["ours"] / row["peer"]) < 1e-3
