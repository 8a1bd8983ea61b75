"""Whether all files of a split that lies in several are there, as far as their names tell.

test-00000-of-00002.jsonl     numbers and how many: of the Hub's and most publishers'
0000.parquet, 0001.parquet    numbers alone, of the Hub's branch refs/convert/parquet: a gap shows, a lost end does not
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError

_COUNTED = re.compile(r"-(\d{5})-of-(\d{5})")
_NUMBERED = re.compile(r"(\d{4})\.parquet")


def check_shards(files: Sequence[Path], task: str, split: str) -> None:
    """Raises UserError naming the first shard that is missing. `files`: one or more, of one folder."""
    counted = [match for file in files if (match := _COUNTED.search(file.name))]
    numbered = [match[1] for file in files if (match := _NUMBERED.fullmatch(file.name))]
    if counted:
        there, total = {int(match[1]) for match in counted}, max(int(match[2]) for match in counted)
        digits, known = 5, f"{total}"
    elif numbered:
        there, total = set(map(int, numbered)), int(max(numbered)) + 1
        digits, known = 4, f"at least {total}"
    else:
        return
    if lacking := sorted(set(range(total)) - there):
        raise UserError(
            f"Task {task}: {files[0].parent} lacks {len(lacking)} of {known} shards of {split}, the first of them number "
            f"{lacking[0]:0{digits}d}. Bring the rest: a part of a split is another split."
        )
