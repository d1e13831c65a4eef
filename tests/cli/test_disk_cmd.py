"""`kvtiers disk`, as someone at a terminal meets it: real directories, real damage, a real owner."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvtiers.cli.app import run
from kvtiers.stores.disk import DiskSettings, DiskStore
from kvtiers.testing.disk_damage import damage_file, du, make_other_version, record_file
from kvtiers.testing.store_kit import Damage, make_part

OTHER = bytes(range(32))
PARTS = [
    *(make_part(number, 5000) for number in range(6)),
    *(make_part(n, 9000, namespace=OTHER) for n in range(3)),
]
SHORT = PARTS[0].ref.namespace.hex()[:12]

OWNER = """
import sys
from kvtiers.stores.disk import DiskSettings, DiskStore
store = DiskStore(DiskSettings(paths=(sys.argv[1],)))
store.open()
print("open", flush=True)
sys.stdin.read()
"""


class Output(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Output]


@pytest.fixture
def kvtiers_disk(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*args: object) -> Output:
        capsys.readouterr()
        code = run(["disk", *map(str, args)])
        captured = capsys.readouterr()
        return Output(code, captured.out, captured.err)

    return command


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Six chunks of one namespace, three of another, two files of somebody else."""
    path = tmp_path / "disk"
    store = DiskStore(DiskSettings(paths=(str(path),), min_free_bytes=0))
    store.open()
    for part in PARTS:
        store.write(part)
    store.close()
    (path / "README").write_text("not ours")
    (path / "lmcache").mkdir()
    (path / "lmcache" / "model.pt").write_bytes(b"x" * 10_000)
    return path


@pytest.fixture
def owner(directory: Path) -> Iterator[int]:
    """Pid of another process that has the directory open."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "open\n"
    yield process.pid
    process.stdin.close()
    process.wait(30)
    process.stdout.close()


def everything_in(path: Path) -> dict[str, int]:
    return {str(file.relative_to(path)): file.lstat().st_mtime_ns for file in path.rglob("*")}


def test_ls_shows_namespaces_and_what_else_lies_there(directory: Path, kvtiers_disk: Command) -> None:
    shown = kvtiers_disk("ls", directory)
    assert shown.code == 0
    assert re.search(rf"{SHORT} +6 +6 +72 KiB", shown.out)
    assert re.search(rf"{OTHER.hex()[:12]} +3 +3 +48 KiB", shown.out)
    assert "9 chunks in 9 records, 120 KiB" in shown.out
    assert "2 foreign files" in shown.out
    assert "not open" in shown.out


def test_ls_counts_chunks_not_parts(tmp_path: Path, kvtiers_disk: Command) -> None:
    path = tmp_path / "disk"
    store = DiskStore(DiskSettings(paths=(str(path),), min_free_bytes=0))
    store.open()
    for part in range(4):
        store.write(make_part(1, 5000, part=part))
    store.close()
    assert kvtiers_disk("ls", path, "--json").json["total"]["chunks"] == 1
    assert "1 chunk in 4 records" in kvtiers_disk("ls", path).out


def test_ls_json_has_exact_numbers(directory: Path, kvtiers_disk: Command) -> None:
    report = kvtiers_disk("ls", directory, "--json").json
    assert report["total"] == {
        "chunks": 9,
        "records": 9,
        "bytes": 9 * 12_288 + 3 * 4096,
        "used_bytes": du(directory),
    }
    (path,) = report["paths"]
    assert (path["foreign_files"], path["foreign_bytes"], path["owner"]) == (2, 4096 + 12_288, None)
    assert [one["namespace"] for one in report["namespaces"]] == [PARTS[0].ref.namespace.hex(), OTHER.hex()]


def test_ls_and_verify_work_beside_the_owner_and_change_nothing(
    directory: Path, owner: int, kvtiers_disk: Command
) -> None:
    before = everything_in(directory)
    assert f"open in process {owner}" in kvtiers_disk("ls", directory).out
    assert kvtiers_disk("ls", directory, "--json").json["paths"][0]["owner"] == owner
    assert kvtiers_disk("verify", directory).code == 0
    assert everything_in(directory) == before


def test_several_directories_are_looked_at_together(
    directory: Path, tmp_path: Path, kvtiers_disk: Command
) -> None:
    (tmp_path / "empty").mkdir()
    report = kvtiers_disk("ls", directory, tmp_path / "empty", "--json").json
    assert [path["records"] for path in report["paths"]] == [9, 0]
    assert kvtiers_disk("ls", tmp_path / "empty").out.startswith("0 chunks in 0 records")


@pytest.mark.parametrize("command", ["ls", "verify", "purge"])
def test_a_path_that_is_not_there_is_a_wrong_command_line(
    tmp_path: Path, kvtiers_disk: Command, command: str
) -> None:
    missing = tmp_path / "missing"
    assert kvtiers_disk(command, missing).code == 2
    assert not missing.exists()


def test_verify_passes_what_is_sound(directory: Path, kvtiers_disk: Command) -> None:
    verified = kvtiers_disk("verify", directory)
    assert verified.code == 0
    assert "9 of 9 records sound (120 KiB)" in verified.out


@pytest.mark.parametrize("how", [how for how in Damage if how not in (Damage.REMOVE, Damage.SWAP)])
def test_verify_finds_damage_names_it_and_leaves_it(
    directory: Path, kvtiers_disk: Command, how: Damage
) -> None:
    path = record_file(directory, PARTS[2].ref)
    damage_file(path, how)
    verified = kvtiers_disk("verify", directory)
    assert verified.code == 1
    assert f"damaged: {path}: " in verified.out
    assert "8 of 9 records sound" in verified.out
    assert path.exists()
    report = kvtiers_disk("verify", directory, "--json")
    assert report.code == 1
    assert [one["file"] for one in report.json["damaged"]] == [str(path)]


def test_verify_finds_a_swapped_record(directory: Path, kvtiers_disk: Command) -> None:
    damage_file(record_file(directory, PARTS[2].ref), Damage.SWAP, record_file(directory, PARTS[3].ref))
    verified = kvtiers_disk("verify", directory)
    assert verified.code == 1
    assert "the record is of chunk" in verified.out


def test_another_format_version_is_no_damage_and_is_not_removed(
    directory: Path, kvtiers_disk: Command
) -> None:
    path = record_file(directory, PARTS[2].ref)
    make_other_version(path)
    verified = kvtiers_disk("verify", directory)
    assert verified.code == 0
    assert "other version: " in verified.out
    assert kvtiers_disk("verify", "--remove", directory).code == 0
    assert path.exists()


@pytest.mark.parametrize("how", [Damage.FLIP_HEADER, Damage.FLIP_PAYLOAD, Damage.TRUNCATE])
def test_verify_remove_removes_damage_and_nothing_else(
    directory: Path, kvtiers_disk: Command, how: Damage
) -> None:
    path = record_file(directory, PARTS[2].ref)
    damage_file(path, how)
    removed = kvtiers_disk("verify", "--remove", "--json", directory)
    assert removed.code == 1  # there was damage
    assert removed.json["removed"] == 1
    assert not path.exists()
    again = kvtiers_disk("verify", "--json", directory)
    assert (again.code, again.json["sound"]) == (0, 8)
    assert (directory / "README").exists()


def test_what_removes_is_refused_while_a_cache_has_the_directory_open(
    directory: Path, owner: int, kvtiers_disk: Command
) -> None:
    before = everything_in(directory)
    for command in (("purge", "--yes"), ("verify", "--remove")):
        refused = kvtiers_disk(*command, directory)
        assert refused.code == 1
        assert f"in use by process {owner}" in refused.err
    assert everything_in(directory) == before


def test_purge_removes_all_records_and_no_foreign_file(directory: Path, kvtiers_disk: Command) -> None:
    purged = kvtiers_disk("purge", "--yes", directory)
    assert purged.code == 0
    assert "removed 9 records, 120 KiB; 0 records left" in purged.out
    assert {path.name for path in directory.iterdir()} == {"README", "lmcache", "lock", "index-v1.log", "tmp"}
    assert (directory / "lmcache" / "model.pt").stat().st_size == 10_000
    assert kvtiers_disk("purge", "--yes", directory).out == "nothing to remove\n"


def test_purge_of_one_namespace_leaves_the_others(directory: Path, kvtiers_disk: Command) -> None:
    purged = kvtiers_disk("purge", "--yes", "--json", "--namespace", OTHER.hex()[:12].upper(), directory).json
    assert (purged["removed"], purged["left"]["records"]) == (3, 6)
    assert purged["left"]["used_bytes"] == du(directory)
    assert kvtiers_disk("verify", directory, "--json").json["sound"] == 6
    unknown = kvtiers_disk("purge", "--yes", "--namespace", "ffff", directory)
    assert unknown.code == 2
    assert SHORT in unknown.err


def test_purge_by_age_goes_by_when_a_record_was_written(directory: Path, kvtiers_disk: Command) -> None:
    for part in PARTS[:4]:
        os.utime(record_file(directory, part.ref), (0, 0))
    assert kvtiers_disk("purge", "--yes", "--older-than", "7d", "--json", directory).json["removed"] == 4
    assert kvtiers_disk("ls", directory, "--json").json["total"]["records"] == 5
    assert kvtiers_disk("purge", "--yes", "--older-than", "soon", directory).code == 2


@pytest.mark.parametrize(("answer", "left"), [("n\n", 9), ("", 9), ("y\n", 0)])
def test_purge_asks_first(
    directory: Path, kvtiers_disk: Command, monkeypatch: pytest.MonkeyPatch, answer: str, left: int
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(answer))
    asked = kvtiers_disk("purge", directory)
    assert "Remove 9 records, 120 KiB?" in asked.err
    assert (asked.code == 0) == (left == 0)
    assert kvtiers_disk("ls", directory, "--json").json["total"]["records"] == left


def test_a_directory_that_never_was_a_cache_is_not_made_one(tmp_path: Path, kvtiers_disk: Command) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("x")
    assert kvtiers_disk("purge", "--yes", home).code == 2
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("again", ["same", "link", "dotted"])
def test_a_directory_named_twice_counts_once(
    directory: Path, tmp_path: Path, kvtiers_disk: Command, again: str
) -> None:
    link = tmp_path / "link"
    link.symlink_to(directory)
    other = {"same": directory, "link": link, "dotted": f"{directory}/../{directory.name}"}[again]
    once = kvtiers_disk("ls", directory, "--json").json
    assert kvtiers_disk("ls", other, directory, "--json").json == once
    assert kvtiers_disk("verify", directory, other, "--json").json["records"] == 9
    assert kvtiers_disk("purge", directory, other, "--yes", "--json").json["removed"] == 9


def test_a_directory_that_no_cache_has_used_is_said_to_be_none(tmp_path: Path, kvtiers_disk: Command) -> None:
    assert "no cache was ever open here" in kvtiers_disk("ls", tmp_path).out
    assert kvtiers_disk("ls", tmp_path, "--json").json["paths"][0]["cache_directory"] is False
    assert kvtiers_disk("verify", tmp_path) == (0, "no records here\n", "")


@pytest.mark.parametrize("command", ["ls", "verify", "purge"])
def test_everything_wrong_with_the_paths_is_said_at_once_as_json_too(
    tmp_path: Path, kvtiers_disk: Command, command: str
) -> None:
    file = tmp_path / "cache.yaml"
    file.touch()
    wrong = kvtiers_disk(command, tmp_path / "nowhere", file, "--json")
    assert wrong.code == 2
    assert wrong.json["error"].startswith("PATH: 2 problems")
    assert "nowhere" in wrong.json["error"]
    assert "cache.yaml is a file" in wrong.err


def test_json_is_json_for_a_path_that_is_no_text(directory: Path) -> None:
    strange = directory.with_name("caf\udce9")  # Latin-1 on disk
    directory.rename(strange)
    script = Path(sys.executable).with_name("kvtiers")
    for path, code in ((strange, 0), (strange / "nowhere", 2)):
        done = subprocess.run(
            [script, "disk", "ls", "--json", path], capture_output=True, timeout=60, check=False
        )
        assert done.returncode == code
        assert r"/caf\udce9" in json.dumps(json.loads(done.stdout))


def test_a_directory_that_may_not_be_listed_is_an_error_and_not_empty(directory: Path) -> None:
    script = Path(sys.executable).with_name("kvtiers")
    if os.geteuid() == 0:
        pytest.skip("root may list everything")
    directory.chmod(0)
    try:
        done = subprocess.run(
            [script, "disk", "ls", "--json", directory], capture_output=True, timeout=60, check=False
        )
    finally:
        directory.chmod(0o700)
    assert done.returncode == 1
    assert "no permission" in json.loads(done.stdout)["error"]


def test_a_directory_that_can_not_be_looked_into_is_told_and_fails_verify(
    directory: Path, kvtiers_disk: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records are not "0 records". root may look anywhere, so the refusal is played."""
    scandir, shut = os.scandir, str(directory / OTHER.hex())
    assert Path(shut).is_dir()

    def refusing(path: str) -> Any:
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    listing = kvtiers_disk("ls", directory)
    assert listing.code == 0
    assert "1 directory not looked into" in listing.out
    (path,) = json.loads(kvtiers_disk("ls", directory, "--json").out)["paths"]
    assert (path["unreadable_directories"], path["records"]) == (1, 6)
    checked = kvtiers_disk("verify", directory)
    assert checked.code == 1
    assert "could not be looked into" in checked.err
    assert json.loads(kvtiers_disk("verify", directory, "--json").out)["unreadable_directories"] == 1
