"""`kvtiers disk ls|verify|purge`: what lies in a disk directory, whether it is sound, and how to get rid of it.

`ls` and `verify` only look and work beside a running cache. What removes something (`purge`, `verify --remove`) needs the
directory's lock, so it never takes a record away from under its owner. Nobody here ever removes a file that is not kvtiers'.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from kvtiers.cli.output import JSON_OPTION, note, print_json, print_table, progress, tracked
from kvtiers.model.errors import ConfigError, StoreUnavailable

if TYPE_CHECKING:
    from kvtiers.stores.disk import DiskStore
    from kvtiers.stores.disk.survey import RecordFile, Survey, Verified

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Look at, check or empty the directories of the disk tier.",
)

PATHS = typer.Argument(
    metavar="PATH...",
    help="Disk directories, as in storage.disk.path. One that is named twice counts once.",
    readable=False,  # whether it can be read is said by the reading, in the same words for text and JSON
)
_SHORT: Final = 12
"""Hex digits of a namespace that are shown; any prefix that names one is accepted."""
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_THREADS: Final = 2  # two reads in flight were measured to be enough for one disk
_SHOWN: Final = 20


@app.command("ls")
def list_records(
    paths: Annotated[list[Path], PATHS], *, as_json: Annotated[bool, JSON_OPTION] = False
) -> None:
    """Show records by namespace: chunks, bytes and age, and what else lies there.

    A namespace is one model with everything that its KV depends on; its digest is shown, as the name is not on disk.
    """
    from kvtiers.stores.disk.survey import by_namespace

    surveys = _survey(_directories(paths))
    records = [record for one in surveys for record in one.records]
    namespaces = [_namespace_report(digest, group) for digest, group in by_namespace(records)]
    report = {
        "paths": [_path_report(one) for one in surveys],
        "namespaces": namespaces,
        "total": {
            "chunks": sum(one["chunks"] for one in namespaces),
            "records": len(records),
            "bytes": sum(record.allocated_bytes for record in records),
            "used_bytes": sum(one.used_bytes for one in surveys),
        },
    }
    if as_json:
        print_json(report)
    else:
        _print_listing(report, records)


@app.command()
def verify(
    paths: Annotated[list[Path], PATHS],
    *,
    remove: Annotated[
        bool, typer.Option("--remove", help="Remove damaged records; no cache may have the directory open.")
    ] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Read every record and check header, padding and checksums. Exit code 1 if any is damaged or can't be read.

    A cache does the same at each read: a damaged record is never served, only computed again.
    """
    from kvtiers.stores.disk.survey import Verdict

    paths = _directories(paths)
    if not remove:
        report, verified = _verify_all(paths)
    else:
        with _owned(paths) as store:
            report, verified = _verify_all(paths)
            damaged = [one.file for one in verified if one.verdict is Verdict.DAMAGED]
            report["removed"] = _remove(store, damaged)
    if as_json:
        print_json(report)
    else:
        _print_verification(report)
    if report["unreadable_directories"] or any(
        one.verdict in (Verdict.DAMAGED, Verdict.UNREADABLE) for one in verified
    ):
        raise typer.Exit(1)


@app.command()
def purge(
    paths: Annotated[list[Path], PATHS],
    *,
    namespace: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Only this namespace (the digits `ls` shows are enough)."),
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Only records written longer ago: 90m, 12h, 7d, 2w.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, JSON_OPTION] = False,
) -> None:
    """Remove records. No cache may have the directory open. Files that are not kvtiers' stay."""
    age = _seconds(older_than) if older_than is not None else None
    paths = _directories(paths)
    with _owned(paths) as store:
        doomed = _chosen(_survey(paths), namespace, age)
        size = sum(record.allocated_bytes for record in doomed)
        removed = 0
        if doomed:
            if not yes:
                typer.confirm(f"Remove {_count(len(doomed), 'record')}, {_size(size)}?", abort=True, err=True)
            removed = _remove(store, doomed)
        left = store.usage()
    if as_json:
        print_json(
            {
                "removed": removed,
                "bytes": size,
                "left": {"records": left.records, "used_bytes": left.used_bytes},
            }
        )
    elif not doomed:
        typer.echo("nothing to remove")
    else:
        typer.echo(
            f"removed {_count(removed, 'record')}, {_size(size)}; {_count(left.records, 'record')} left"
        )


# --- looking ----------------------------------------------------------------------------------------------------------


def _directories(paths: list[Path]) -> list[Path]:
    """Real paths, each directory once, however often and by whatever name it was given.

    Raises ConfigError with everything that is no directory, StoreUnavailable for one that can't be listed: it would look empty.
    """
    found: dict[tuple[int, int], Path] = {}
    problems: list[str] = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
        else:
            if path.is_dir():
                found.setdefault((status.st_dev, status.st_ino), Path(os.path.realpath(path)))
            else:
                problems.append(f"{path} is a file; give the directory of the disk tier")
    if problems:
        raise ConfigError(problems, source="PATH")
    for path in found.values():
        if not os.access(path, os.R_OK | os.X_OK):
            raise StoreUnavailable(
                f"{path} can't be looked through: no permission; run it as the cache's user"
            )
    return list(found.values())


def _survey(paths: list[Path]) -> list[Survey]:
    from kvtiers.stores.disk.survey import survey

    try:
        with progress("files looked at") as advance:
            return [survey(str(path), advance) for path in paths]
    except OSError as error:
        raise StoreUnavailable(f"{error.filename} can't be looked through: {error.strerror}") from error


def _namespace_report(digest: bytes, records: list[RecordFile]) -> dict[str, Any]:
    times = [record.written_at for record in records]
    return {
        "namespace": digest.hex(),
        "chunks": len({record.ref.key for record in records}),
        "records": len(records),
        "bytes": sum(record.allocated_bytes for record in records),
        "oldest": _iso(min(times)),
        "newest": _iso(max(times)),
    }


def _path_report(one: Survey) -> dict[str, Any]:
    from kvtiers.stores.disk.survey import is_disk_directory

    return {
        "path": one.path,
        "cache_directory": is_disk_directory(one.path),
        "records": len(one.records),
        "used_bytes": one.used_bytes,
        "foreign_files": one.foreign_files,
        "foreign_bytes": one.foreign_bytes,
        "unfinished_files": one.unfinished_files,
        "unreadable_directories": one.unreadable_directories,
        "owner": one.owner,
    }


def _print_listing(report: dict[str, Any], records: list[RecordFile]) -> None:
    from kvtiers.stores.disk.survey import by_namespace

    now = time.time()
    if records:
        rows = []
        for one, (_, group) in zip(report["namespaces"], by_namespace(records), strict=True):
            times = [record.written_at for record in group]
            name = one["namespace"][:_SHORT]
            ages = _age(now - min(times)), _age(now - max(times))
            rows.append((name, one["chunks"], one["records"], _size(one["bytes"]), *ages))
        columns = ("namespace", "chunks", "records", "size", "oldest", "newest")
        print_table(columns, rows, right=columns[1:])
        typer.echo("")
    total = report["total"]
    typer.echo(
        f"{_count(total['chunks'], 'chunk')} in {_count(total['records'], 'record')}, {_size(total['bytes'])}; "
        f"{_size(total['used_bytes'])} with index, directories and what else lies there"
    )
    for path in report["paths"]:
        facts = [_count(path["records"], "record"), _size(path["used_bytes"])]
        if path["foreign_files"]:
            facts.append(f"{_count(path['foreign_files'], 'foreign file')} ({_size(path['foreign_bytes'])})")
        if path["unfinished_files"]:
            facts.append(f"{_count(path['unfinished_files'], 'unfinished write')}")
        if path["unreadable_directories"]:
            unreadable = path["unreadable_directories"]
            facts.append(
                f"{unreadable} {'directory' if unreadable == 1 else 'directories'} not looked into (no permission)"
            )
        if not path["cache_directory"]:
            facts.append("no cache was ever open here")
        else:
            facts.append(f"open in process {path['owner']}" if path["owner"] else "not open")
        typer.echo(f"{path['path']}: {', '.join(facts)}")


# --- verifying --------------------------------------------------------------------------------------------------------


def _verify_all(paths: list[Path]) -> tuple[dict[str, Any], list[Verified]]:
    """The report, and every file that is not sound."""
    from kvtiers.records.buffers import AlignedBuffers
    from kvtiers.stores.disk.survey import Verdict
    from kvtiers.stores.disk.survey import verify as verify_file

    surveys = _survey(paths)
    files = [record for one in surveys for record in one.records]
    buffers = AlignedBuffers(max_buffers=2 * _THREADS + 2, max_bytes=256 << 20)
    started = time.monotonic()
    wrong: list[Verified] = []
    sound = nbytes = 0
    pool = ThreadPoolExecutor(_THREADS)
    try:
        results = pool.map(lambda file: verify_file(file, buffers), files)
        for one in tracked(results, "verifying records", len(files)):
            if one.verdict is Verdict.SOUND:
                sound += 1
                nbytes += one.file.allocated_bytes
            else:
                wrong.append(one)
    finally:
        pool.shutdown(cancel_futures=True)
    report: dict[str, Any] = {
        "records": len(files),
        "sound": sound,
        "sound_bytes": nbytes,
        "seconds": round(time.monotonic() - started, 3),
        "unreadable_directories": sum(one.unreadable_directories for one in surveys),
    }
    for verdict in (Verdict.DAMAGED, Verdict.UNREADABLE, Verdict.OTHER_VERSION):
        report[verdict.value] = [
            {"file": one.file.path, "problem": one.problem} for one in wrong if one.verdict is verdict
        ]
    report["vanished"] = sum(one.verdict is Verdict.VANISHED for one in wrong)
    return report, wrong


def _print_verification(report: dict[str, Any]) -> None:
    for title in ("damaged", "unreadable", "other_version"):
        for one in report[title][:_SHOWN]:
            typer.echo(f"{title.replace('_', ' ')}: {one['file']}: {one['problem']}")
        if len(report[title]) > _SHOWN:
            typer.echo(
                f"{title.replace('_', ' ')}: … and {len(report[title]) - _SHOWN} more (--json lists all)"
            )
    if report["unreadable_directories"]:
        note(f"directories that could not be looked into (no permission): {report['unreadable_directories']}")
    if not report["records"]:
        typer.echo("no records here")
        return
    speed = report["sound_bytes"] / max(report["seconds"], 1e-3)
    facts = [
        f"{report['sound']} of {_count(report['records'], 'record')} sound ({_size(report['sound_bytes'])})"
    ]
    facts += [
        f"{len(report[title])} {title.replace('_', ' ')}"
        for title in ("damaged", "unreadable", "other_version")
        if report[title]
    ]
    if report["vanished"]:
        facts.append(f"{report['vanished']} removed meanwhile")
    if "removed" in report:
        facts.append(f"{report['removed']} removed")
    typer.echo(f"{', '.join(facts)}; {report['seconds']:.1f} s, {_size(int(speed))}/s")
    if report["damaged"] and "removed" not in report:
        note("A damaged record is never served. The cache removes it when it meets it; --remove does so now.")


# --- removing ---------------------------------------------------------------------------------------------------------


@contextmanager
def _owned(paths: list[Path]) -> Iterator[DiskStore]:
    """A store on the directories, which are locked meanwhile. Raises DirectoryInUse."""
    from kvtiers.stores.disk import DiskSettings, DiskStore
    from kvtiers.stores.disk.survey import is_disk_directory

    for path in paths:  # opening would make a cache directory of it
        if not is_disk_directory(str(path)):
            raise ConfigError(
                [f"{path} is no disk directory of kvtiers (it has no lock file)"], source="PATH"
            )
    store = DiskStore(DiskSettings(paths=tuple(map(str, paths)), min_free_bytes=0))
    store.open()
    try:
        yield store
    finally:
        store.close()


def _remove(store: DiskStore, files: list[RecordFile]) -> int:
    """Remove records by name; how many of the files are gone. Raises StoreError."""
    for _ in store.reconcile_steps():  # so that the store knows them all; it removes what has no sound header
        pass
    for file in tracked(files, "removing records"):
        store.delete(file.ref)
    for _ in store.reconcile_steps():  # directories that are empty now, and what is left
        pass
    return sum(not Path(file.path).exists() for file in files)


def _chosen(surveys: list[Survey], prefix: str | None, age: float | None) -> list[RecordFile]:
    records = [record for one in surveys for record in one.records]
    if prefix is not None:
        digests = {record.ref.namespace for record in records}
        matching = [digest for digest in digests if digest.hex().startswith(prefix.lower())]
        if len(matching) != 1:
            have = ", ".join(sorted(digest.hex()[:_SHORT] for digest in digests)) or "none"
            problem = "names no namespace" if not matching else f"names {len(matching)} namespaces"
            raise ConfigError([f"{prefix} {problem}; there are: {have}"], source="--namespace")
        records = [record for record in records if record.ref.namespace == matching[0]]
    if age is not None:
        before = time.time() - age
        records = [record for record in records if record.written_at < before]
    return records


# --- numbers for people -----------------------------------------------------------------------------------------------


def _seconds(age: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)\s*([smhdw])", age.strip().lower())
    if match is None:
        raise ConfigError([f"{age!r} is not an age such as 90m, 12h, 7d or 2w"], source="--older-than")
    return float(match[1]) * _SECONDS[match[2]]


def _age(seconds: float) -> str:
    for unit, length in reversed(_SECONDS.items()):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def _size(nbytes: int) -> str:
    from kvtiers.config.sizes import format_size

    return format_size(nbytes)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _iso(timestamp: float) -> str:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")
