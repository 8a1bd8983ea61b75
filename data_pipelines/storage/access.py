"""Settings of reading: data.access."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.storage.names import scheme_of


@dataclass(frozen=True)
class Access:
    """How files are read (data.access). It changes nothing about what is read, so no fingerprint contains it."""

    cache_dir: str | None = None
    """Where chunks of remote files are kept, None: <home>/cache. Processes and runs may share it."""
    cache_gb: float = 50.0
    """Room (10^9 bytes) for the cache; the chunks used longest ago make way. 0: keep nothing on disk."""
    chunk_mb: float = 8.0
    """Remote files are read and cached in aligned chunks of this size (2^20 bytes)."""
    retries: int = 5
    """Further attempts after a read that failed."""

    def validate(self) -> None:
        if not (math.isfinite(self.cache_gb) and self.cache_gb >= 0):
            raise UserError(f"data.access.cache_gb={self.cache_gb}: must be 0 (keep nothing on disk) or more.")
        if not (math.isfinite(self.chunk_mb) and 1 <= self.chunk_mb * 2**20 <= 2**30):
            raise UserError(f"data.access.chunk_mb={self.chunk_mb}: must be more than 0 and at most 1024.")
        if self.retries < 0:
            raise UserError(f"data.access.retries={self.retries}: must be 0 (give up at the first failure) or more.")
        if self.cache_dir is not None and (not self.cache_dir or scheme_of(self.cache_dir)):
            raise UserError(f"data.access.cache_dir={self.cache_dir!r}: must be a folder on this machine, or null.")

    @property
    def chunk(self) -> int:
        return int(self.chunk_mb * 2**20)

    @property
    def capacity(self) -> int:
        return int(self.cache_gb * 1e9)

    @property
    def folder(self) -> Path:
        return Path(self.cache_dir).expanduser().resolve() if self.cache_dir else paths.home() / "cache"


DEFAULTS = Access()
