"""Verify shards: read every sample, list every fault, count what is good around it.

    shards -> samples, and the damaged regions between them -> documents -> counts and faults -> table or JSON
              tar.py                                           check

    python -m data_pipelines.verify starter                          a corpus: the manifest's counts, bytes and SHA-256 as well
    python -m data_pipelines.verify '/data/cc12m-{000..127}.tar'     shards, also before they are a corpus

Training and preparing stop at the first fault; this command goes on, and joins nothing across damage or across shards.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from configs.errors import UserError
from data_pipelines import paths
from data_pipelines.corpora.detection import checked
from data_pipelines.document import Document, Origin
from data_pipelines.faults import Fault
from data_pipelines.formats import READERS
from data_pipelines.formats.img2dataset import IMAGE_EXTENSIONS
from data_pipelines.formats.pictures import PictureError, header
from data_pipelines.images import decode_image
from data_pipelines.shards import MANIFEST, Manifest, Shard, sha256_of, shard_place
from data_pipelines.storage import MissingError, ShardFile, expand, is_remote, open_file
from data_pipelines.tar import Damage, Sample, printable, read_members, samples

TASK = "task"
"""Format of a corpus's few-shot tasks: KEY.json and pictures. Read by eval/, so only JSON and pictures are checked here."""
TRIED = 64
"""Samples of a shard on which every known layout is tried, where nobody says which it has."""


# --------------------------------------------------------------------------------------------------------------- checking


@dataclass
class Report:
    """What one shard holds. `samples`: all that were found; `documents`: those without a fault, counted in what follows."""

    shard: str
    format: str | None
    source: str | None = None
    split: str | None = None
    samples: int = 0
    documents: int = 0
    images: int = 0
    characters: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)


def verify_shard(path: str | Path, format: str | None = None, *, images: bool = False) -> Report:
    """Read all of one shard, by path or URL. `format` None: the layout that reads most of its first samples; `images`: decode
    every picture."""
    report = Report(str(path), format)

    def fault(start: int, end: int, reason: str, key: str | None = None) -> None:
        report.faults.append(Fault("", str(path), key, start, end, reason))

    try:
        file = open_file(path)
        report.bytes = file.size
        if not file.size:
            fault(0, 0, "the file is empty")
            return report
        if file.read(0, 2) == b"\x1f\x8b":
            fault(0, file.size, "compressed: samples cannot be read at random. Unpack it with gunzip")
            return report
        if format is None:
            format = report.format = guess_format(file)
        for item in samples(file):
            if isinstance(item, Damage):
                fault(item.start, item.end, item.reason, item.key)
                continue
            report.samples += 1
            if format is None:
                continue
            document, faults = check(file, item, format, Origin("", str(path), item.key), images)
            report.faults += faults
            if document is not None:
                report.documents += 1
                report.images += len(document.images) if format != TASK else len(pictures(item.members))
                report.characters += len(document.text)
        if format is None and report.samples:
            fault(0, file.size, f"its samples are of no known layout ({', '.join(READERS)})")
        elif not report.samples and not report.faults:
            fault(0, file.size, "holds no samples")
        file.close()
    except UserError as error:  # missing, not permitted, or not to be had just now
        fault(0, 0, f"cannot be read: {error}")
    return report


def check(file: ShardFile, sample: Sample, format: str, origin: Origin, images: bool) -> tuple[Document | None, list[Fault]]:
    """The sample as a document, or None and all that is wrong with it: each picture on its own, then the layout."""
    members = read_members(file, sample)
    faults: list[Fault] = []
    for name in pictures(members):
        if reason := picture_fault(members[name], images):
            start = sample.members[name].offset
            faults.append(Fault("", origin.shard, origin.key, start, start + len(members[name]), f"{name} {reason}"))
    document, reason = read_sample(format, members, origin)
    if reason and not (faults and reason.startswith(tuple(f"{name} " for name in pictures(members)))):
        faults.append(Fault("", origin.shard, origin.key, sample.start, sample.end, reason))
    if document is not None and images:
        for image in document.images:  # those that lie inside another member, a JSON's base64 or a TIFF's frames
            if image.name not in members and (reason := picture_fault(image.data, True)):
                faults.append(Fault("", origin.shard, origin.key, sample.start, sample.end, f"{image.name} {reason}"))
    return (None if faults else document), faults


def read_sample(format: str, members: dict[str, bytes], origin: Origin) -> tuple[Document | None, str]:
    """(document, "") or (None, what the layout misses)."""
    if format == TASK:
        try:
            json.loads(members["json"])
        except (KeyError, ValueError) as error:
            return None, f"a task's sample needs a json member that can be read ({type(error).__name__}: {error})"
        return Document((), origin), ""
    try:
        return checked(format, members, origin), ""
    except UserError as error:
        return None, str(error).removeprefix(f"{origin}: ")
    except Exception as error:  # JSON nested too deep, say: one sample must not end the verification
        return None, f"cannot be read as {format} ({type(error).__name__}: {error})"


def pictures(members: Mapping[str, object]) -> list[str]:
    return [name for name in members if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]


def picture_fault(data: bytes, decode: bool) -> str:
    """Why a picture cannot be used, or "". By its header; with `decode`, by the very function that training calls."""
    try:
        header(data)
        if decode:
            decode_image(data, 16)
    except PictureError as error:
        return str(error)
    except UserError as error:
        return f"is damaged: {str(error).removeprefix('image: ')}"
    except Exception as error:  # decoders of damaged files raise what they like, and one picture must not end the verification
        return f"is no picture that can be decoded ({type(error).__name__}: {error})"
    return ""


def guess_format(file: ShardFile) -> str | None:
    """The layout that reads most of the shard's first samples, None if none reads any."""
    read = dict.fromkeys(READERS, 0)
    tried = 0
    for item in samples(file):
        if isinstance(item, Damage):
            continue
        members = read_members(file, item)
        for format in READERS:
            read[format] += read_sample(format, members, Origin("", file.name, item.key))[0] is not None
        tried += 1
        if tried == TRIED:
            break
    best = max(read, key=lambda format: read[format])
    return best if read[best] else None


# ----------------------------------------------------------------------------------------------------------------- corpora


@dataclass(frozen=True)
class Job:
    """A shard to verify, with what its manifest says of it."""

    path: str
    format: str | None = None
    source: str | None = None
    split: str | None = None
    expected: Shard | None = None
    images: bool = False

    def run(self) -> Report:
        report = verify_shard(self.path, self.format, images=self.images)
        report.source, report.split = self.source, self.split
        if self.expected is not None and report.bytes:
            found = {"samples": report.samples, "bytes": report.bytes, "sha256": sha256_of(self.path)}
            for key, value in found.items():
                if value != (said := getattr(self.expected, key)):
                    reason = f"{key}: found {value}, {MANIFEST} says {said}"
                    report.faults.append(Fault("", self.path, None, 0, report.bytes, reason))
        return report


def plan(arguments: Sequence[str], format: str | None, images: bool) -> list[Job]:
    """What to verify, from paths, patterns and corpora. Raises UserError naming the argument that leads to nothing."""
    jobs: dict[str, Job] = {}
    for argument in arguments:
        corpus = paths.corpus(argument)
        if not (corpus / MANIFEST).is_file() and Path(argument).expanduser().is_dir():
            corpus = Path(argument).expanduser().resolve()
        if corpus.is_dir():
            if not (corpus / MANIFEST).is_file():
                raise UserError(f"{corpus} is a folder without a {MANIFEST}. For the shards in it, write '{argument}/*.tar'.")
            for source, splits in Manifest.load(corpus).splits.items():
                for split, content in splits.items():
                    for shard in content.shards:
                        path = shard_place(corpus, shard.file)
                        jobs[path] = Job(path, content.format, source, split, shard, images)
            continue
        try:
            found = expand(argument)
        except MissingError as error:
            raise UserError(f"{error} Nor is there a corpus of that name.") from error
        for path in found:
            jobs.setdefault(path, Job(path, format, images=images))
    return list(jobs.values())


def corpus_faults(arguments: Sequence[str], reports: Sequence[Report]) -> list[Fault]:
    """What is wrong with a manifest as a whole: totals of splits in which every sample is good, and the tokeniser's hash."""
    faults: list[Fault] = []
    for argument in arguments:
        corpus = paths.corpus(argument)
        if not (corpus / MANIFEST).is_file():
            corpus = Path(argument).expanduser().resolve()
        if not (corpus / MANIFEST).is_file():
            continue
        manifest, where = Manifest.load(corpus), str(corpus / MANIFEST)
        files = {report.shard: report for report in reports}
        for source, splits in manifest.splits.items():
            for split, content in splits.items():
                held = [files[shard_place(corpus, shard.file)] for shard in content.shards]
                if any(report.faults for report in held):
                    continue
                for key in ("images", "characters") if content.format != TASK else ("images",):
                    found, said = sum(getattr(report, key) for report in held), getattr(content, key)
                    if found != said:
                        reason = f"{source}/{split} {key}: found {found}, {MANIFEST} says {said}"
                        faults.append(Fault("", where, None, 0, 0, reason))
        if manifest.tokenizer and manifest.tokenizer_sha256:
            vocabulary = corpus / manifest.tokenizer / "tokenizer.json"
            if not vocabulary.is_file() or sha256_of(vocabulary) != manifest.tokenizer_sha256:
                faults.append(Fault("", str(vocabulary), None, 0, 0, f"missing, or not the file whose SHA-256 {MANIFEST} has"))
    return faults


# ------------------------------------------------------------------------------------------------------------------ output


COUNTS = ("samples", "documents", "images", "characters", "bytes")


def table(reports: Sequence[Report], faults: Sequence[Fault]) -> str:
    """Counts a shard, then every fault on a line of its own."""
    common = common_folder([report.shard for report in reports])
    rows: list[tuple[str, ...]] = [("shard", "layout", *COUNTS, "faults")]
    for report in reports:
        counts = [f"{getattr(report, key):,}" for key in COUNTS]
        rows.append((below(report.shard, common), report.format or "?", *counts, f"{len(report.faults):,}"))
    if len(reports) > 1:
        sums = [f"{sum(getattr(report, key) for report in reports):,}" for key in COUNTS]
        rows.append((f"{len(reports)} shards", "", *sums, f"{sum(len(report.faults) for report in reports):,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * len(lines[0])
    lines[1:1] = [rule]
    if len(reports) > 1:
        lines[-1:-1] = [rule]
    lines = [f"in {common}", "", *lines, ""]
    for fault in faults:
        name = below(fault.shard, common)
        sample = f" sample {fault.key}" if fault.key else ""
        span = f" bytes {fault.start:,}-{fault.end:,}" if fault.end > fault.start else ""
        lines.append(f"{name}:{sample}{span}: {printable(fault.reason)}")
    lines.append(f"{len(faults):,} fault{'s' if len(faults) != 1 else ''}." if faults else "No faults.")
    return "\n".join(lines)


def common_folder(names: Sequence[str]) -> str:
    """The folder that holds them all; that of the first where some lie elsewhere, behind a URL say."""
    folders = [os.path.dirname(name) for name in names]
    return os.path.commonpath(folders) if not any(map(is_remote, names)) else folders[0]


def below(name: str, folder: str) -> str:
    return name.removeprefix(folder + "/") if is_remote(name) or is_remote(folder) else os.path.relpath(name, folder)


def as_json(reports: Sequence[Report], faults: Sequence[Fault]) -> str:
    totals = {key: sum(getattr(report, key) for report in reports) for key in COUNTS}
    extra = faults[sum(len(report.faults) for report in reports) :]
    content = {
        "ok": not faults,
        "totals": {"shards": len(reports), **totals, "faults": len(faults)},
        "shards": [asdict(report) for report in reports],
        "corpus_faults": [asdict(fault) for fault in extra],
    }
    return json.dumps(content, indent=1, ensure_ascii=True)


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.verify",
        description="Read every sample of the shards, list every fault with its byte range, and count what is good around it.\n"
        "Exit status: 0 no faults, 1 faults, 2 nothing to verify.",
        epilog="python -m data_pipelines.verify starter --images\n"
        "python -m data_pipelines.verify '/data/cc12m-{000..127}.tar' --json > report.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars by path, URL or pattern (*, **, {000..127}, ~; quoted), or a corpus by name or folder, which is also compared "
        "with its manifest: samples, images, characters, bytes, SHA-256",
    )
    parser.add_argument("--images", action="store_true", help="decode every picture as training does, not only its header")
    parser.add_argument(
        "--format",
        choices=[*READERS, TASK],
        help="layout of shards given by path (default: the one that reads most of a shard's first samples)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="shards verified at a time (default: 1)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    asked = arguments_of(given)
    try:
        if asked.processes < 1:
            raise UserError(f"--processes {asked.processes}: must be at least 1.")
        jobs = plan(asked.shards, asked.format, asked.images)
        reports = run(jobs, asked.processes)
        faults = [fault for report in reports for fault in report.faults] + corpus_faults(asked.shards, reports)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_json(reports, faults) if asked.json else table(reports, faults))
    return 1 if faults else 0


def run(jobs: Sequence[Job], processes: int) -> list[Report]:
    """One report a job, in their order."""
    from tqdm import tqdm

    with tqdm(total=len(jobs), unit="shard", leave=False, disable=None) as bar:
        reports = []
        if processes == 1:
            for job in jobs:
                reports.append(job.run())
                bar.update()
            return reports
        with ProcessPoolExecutor(min(processes, len(jobs))) as pool:
            for report in pool.map(Job.run, jobs):
                reports.append(report)
                bar.update()
        return reports


if __name__ == "__main__":
    sys.exit(main())
