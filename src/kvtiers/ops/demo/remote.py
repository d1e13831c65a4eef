"""The remote store of a run: the reader's own, or an engine that the demo starts and ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from kvtiers.config import CacheConfig
from kvtiers.model.errors import StoreError
from kvtiers.ops.demo.options import BadOption, DemoOptions
from kvtiers.ops.demo.session import Say
from kvtiers.ops.engines import Engine, throw_away
from kvtiers.runtime.remote_plan import remote_store, what_is_missing

_OF_ONE_SERVER: Final = frozenset({"endpoint", "password_file", "redis", "mooncake", "s3", "fs"})


def given_engine(options: DemoOptions) -> Engine | None:
    """The one at the `--endpoint`."""
    if options.remote is None or options.endpoint is None:
        return None
    return Engine(options.remote, f"{options.remote}, at the endpoint given", options.endpoint)


@contextmanager
def engine_for(options: DemoOptions, scratch: Path, say: Say) -> Iterator[Engine | None]:
    """The given one, or one of our own that ends with the `with`; None if none was asked for. Raises EngineUnavailable."""
    given = given_engine(options)
    own = options.remote is not None and given is None
    with throw_away(options.remote or "", scratch / "remote") if own else nullcontext(given) as engine:
        if own and engine is not None:
            say(f"remote store: {engine.what}")
        yield engine
        if own:
            say("remote store: ending it")


def with_engine(said: Mapping[str, Any], engine: Engine | None) -> dict[str, Any]:
    """The reader's settings, with this engine in them. What they say of a server of theirs is not meant for ours."""
    if engine is None:
        return dict(said)
    storage = dict(said.get("storage", {}))
    remote = storage.get("remote", {})
    if engine.is_own:
        remote = {key: value for key, value in remote.items() if key not in _OF_ONE_SERVER}
    return {**said, "storage": {**storage, "remote": {**remote, **engine.remote()}}}


def check_remote(said: Mapping[str, Any]) -> None:
    """One round trip to the store, if there is one. Raises BadOption, ConfigError: before a model is loaded for it."""
    config = CacheConfig.from_mapping(dict(said), environ={})
    remote = config.storage.remote
    if not remote.enabled:
        return
    reason = what_is_missing(remote)
    if reason is not None:
        raise BadOption([reason])
    store = remote_store(config)
    try:
        store.open()
        store.probe()
    except StoreError as error:
        raise BadOption([f"the remote store ({remote.backend}, {remote.endpoint}): {error}"]) from error
    finally:
        store.close()


def remote_text(config: CacheConfig, engine: Engine | None) -> str:
    """As a reader calls it; empty if there is none."""
    remote = config.storage.remote
    if not remote.enabled:
        return ""
    what = engine.what if engine is not None else f"{remote.backend}, as the configuration says"
    return f"{what}; {'raw' if remote.compression == 'none' else remote.compression}"
