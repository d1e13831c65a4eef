"""A shared directory across a network that a test can hurt: GlusterFS, its server and its mount, both from volume files of our own.

The mount gives calls up as `soft` does for NFS: a server that is gone is told at once, one that has stopped after `_PING_S` seconds.
Needs Debian's glusterfs-client, FUSE, and root: the server keeps its files' books in trusted attributes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.servers.process import LOOPBACK, PATIENCE_S, RemoteEngine, ServerProcess, free_port

_PING_S: Final = 2
_BYTES: Final = 128 << 20
_VOLUME_ID: Final = bytes(range(16))
_TCP: Final = {"transport-type": "socket", "transport.address-family": "inet"}


class GlusterServer(RemoteEngine):
    """A server with one export, a file system of 128 MiB that outlives it, mounted at `mount`. Killed and paused is the server alone."""

    def __init__(self, folder: Path) -> None:
        _check_needs()
        self._port = free_port()
        self._server = ServerProcess("gluster", folder)
        self._memory = folder / "memory"
        self._client: GlusterMount | None = None

    @property
    def address(self) -> tuple[str, int]:
        return LOOPBACK, self._port

    @property
    def share(self) -> Path:
        """A directory on the share."""
        assert self._client is not None
        return self._client.share

    def start(self) -> None:
        if not self._server.running:
            volume = self._server.folder / "server.vol"
            if not self._memory.exists():
                self._make_export()
            volume.write_text(self._volume())
            self._server.launch([_program(), "--no-daemon", f"--volfile={volume}", "--log-file=/dev/stderr"])
        if self._client is None:
            self._client = GlusterMount(self._server.folder / "mount", self.address)
        self._wait_until_it_serves()

    def stop(self) -> None:
        if self._client is not None:
            self._client.stop()
            self._client = None
        self._server.stop()
        _unmount(self._memory)

    def kill(self) -> None:
        self._server.kill()

    def pause(self) -> None:
        self._server.pause()

    def resume(self) -> None:
        self._server.resume()

    def clear(self) -> None:
        self._wait_until_it_serves()
        for path in self.share.iterdir():
            shutil.rmtree(path)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Within it the export's file system has 1 MiB left."""
        filler = self._memory / "filler"
        free = os.statvfs(self._memory)
        filler.write_bytes(bytes(free.f_bavail * free.f_frsize - (1 << 20)))
        try:
            yield
        finally:
            filler.unlink()

    def _make_export(self) -> None:
        self._memory.mkdir()
        _mount(["-t", "tmpfs", "-o", f"size={_BYTES}", "tmpfs", str(self._memory)])
        export = self._memory / "export"
        export.mkdir()
        os.setxattr(export, "trusted.glusterfs.volume-id", _VOLUME_ID)

    def _volume(self) -> str:
        name = _VOLUME_ID.hex()
        volume_id = f"{name[:8]}-{name[8:12]}-{name[12:16]}-{name[16:20]}-{name[20:]}"
        export = {"directory": self._memory / "export", "volume-id": volume_id, "reserve": 0}
        listening = {
            "transport.socket.bind-address": LOOPBACK,
            "transport.socket.listen-port": self._port,
            "auth.addr.export.allow": LOOPBACK,
        }
        return (
            _xlator("files", "storage/posix", export)
            + _xlator("locks", "features/locks", {}, below="files")
            + _xlator("export", "performance/io-threads", {"thread-count": 8}, below="locks")
            + _xlator("server", "protocol/server", {**_TCP, **listening}, below="export")
        )

    def _wait_until_it_serves(self) -> None:
        assert self._client is not None
        serves = wait_until(self._client.serves, PATIENCE_S, every=0.05)
        assert serves, self._server.log + self._client.log


class GlusterMount:
    """The export of the server at `address`, mounted in `folder`. Nothing is cached: what another mount does is seen at once."""

    def __init__(self, folder: Path, address: tuple[str, int]) -> None:
        """It need not be there yet."""
        self._process = ServerProcess("mount", folder)
        self._point = folder / "point"
        self._point.mkdir()
        host, port = address
        remote = {
            "remote-host": host,
            "remote-port": port,
            "remote-subvolume": "export",
            "ping-timeout": _PING_S,
        }
        volume = folder / "client.vol"
        volume.write_text(_xlator("share", "protocol/client", {**_TCP, **remote}))
        uncached = ["--entry-timeout=0", "--attribute-timeout=0", "--direct-io-mode=enable"]
        self._process.launch(
            [
                _program(),
                "--no-daemon",
                f"--volfile={volume}",
                "--log-file=/dev/stderr",
                *uncached,
                str(self._point),
            ]
        )

    @property
    def share(self) -> Path:
        """A directory on it."""
        return self._point / "kv"

    @property
    def log(self) -> str:
        """What the mount wrote."""
        return self._process.log

    def serves(self) -> bool:
        """Whether it is mounted and the server answers; the directory is made if need be."""
        try:
            if not self._point.is_mount():
                return False
            self.share.mkdir(exist_ok=True)
            return self.share.is_dir()
        except OSError:
            return False

    def stop(self) -> None:
        """Nothing if it does not run."""
        _unmount(self._point)
        self._process.stop()


def _program() -> str:
    return shutil.which("glusterfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def _check_needs() -> None:
    if not _program():
        missing("there is no GlusterFS: tools/install-system-packages.sh")
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        missing("mounting GlusterFS needs root and /dev/fuse")


def _xlator(name: str, kind: str, options: dict[str, object], *, below: str = "") -> str:
    """One of the layers of a volume file."""
    lines = [
        f"volume {name}",
        f"  type {kind}",
        *(f"  option {key} {value}" for key, value in options.items()),
    ]
    return "\n".join([*lines, *([f"  subvolumes {below}"] if below else []), "end-volume", ""])


def _mount(words: list[str]) -> None:
    mounted = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if mounted.returncode != 0:
        missing(f"mounting is not permitted here: {mounted.stderr.strip()}")


def _unmount(point: Path) -> None:
    subprocess.run(["umount", "--lazy", str(point)], capture_output=True, check=False)  # noqa: S603, S607
