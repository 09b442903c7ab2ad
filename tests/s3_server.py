"""A real S3 server (moto's) on the loopback address, which can be told to misbehave.

What comes to it goes over HTTP, by the real client. Faults are played between the socket and the server: it refuses, hangs,
breaks off, or answers with bytes that are not those that were stored.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import s3fs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

__all__ = ["Fault", "S3Server", "serving"]


@dataclass
class Fault:
    """What happens to requests of one method for blocks.

    Parameters
    ----------
    method
        Which: ``"PUT"``, ``"GET"``, ``"DELETE"``.
    kind
        *status*: the server says no, with the given status; *drop*: the connection is closed without an answer; *hang*: there
        is no answer until the server ends; *flip*: a byte of the answer is another one; *short*: the answer lacks its last
        byte, and says so; *cut*: it lacks half of it, and says that it were all there.
    times
        How often; None: always.
    """

    method: str
    kind: Literal["status", "drop", "hang", "flip", "short", "cut"]
    status: int = 503
    times: int | None = None


@dataclass
class S3Server:
    """The server. It runs in threads until :meth:`stop`."""

    #: What to do wrong; may be changed at any time.
    fault: Fault | None = None
    #: Method and path of all requests for blocks, in the order in which they came.
    requests: list[tuple[str, str]] = field(default_factory=list)
    #: Set when a request has begun to hang.
    hanging: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        #: A bucket of its own.
        self.bucket = f"test-{uuid.uuid4().hex}"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """How clients find it, and nothing else of this machine's."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            # Its retries are not what is tested, and each takes a while.
            "AWS_MAX_ATTEMPTS": "1",
        }

    def stop(self) -> None:
        """Stop listening."""
        self._end.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        fault = None
        if environ["PATH_INFO"].endswith(".blk"):
            with self._lock:
                self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
                if self.fault is not None and self.fault.method == environ["REQUEST_METHOD"] and self.fault.times != 0:
                    fault = self.fault
                    if fault.times is not None:
                        fault.times -= 1
        if fault is None:
            found: Iterable[bytes] = self._app(environ, start_response)
            return found
        match fault.kind:
            case "hang":
                self.hanging.set()
                self._end.wait()
                raise ConnectionAbortedError
            case "drop":
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                raise ConnectionAbortedError
            case "status":
                start_response(f"{fault.status} No", [("Content-Type", "text/xml"), ("Content-Length", "0")])
                return [b""]
            case kind:
                return self._damaged(kind, environ, start_response)

    def _damaged(self, kind: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        told: list[Any] = []
        body = b"".join(self._app(environ, lambda *args: told.append(args)))
        status, headers = told[0][:2]
        # The store's own checksums would give it away; others have none.
        kept = [(name, value) for name, value in headers if not name.lower().startswith("x-amz-checksum")]
        if kind == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        elif kind == "short":
            body = body[:-1]
            kept = [
                (name, str(len(body)) if name.lower() == "content-length" else value)
                for name, value in kept
                if name.lower() != "content-range"
            ]
        else:
            body = body[: len(body) // 2]
        start_response(status, kept)
        return [body]


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[S3Server]:
    """Run a server with one bucket, which this process and its children find."""
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # Its own retries are not what is tested, and each takes a while.
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        # Of a server that is there no more.
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            s3fs.S3FileSystem().mkdir(server.bucket)
            yield server
        finally:
            server.stop()
