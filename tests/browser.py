"""A real browser, driven over its debugging protocol: no more than opening a page, asking it what it shows, and taking a picture.

Covers: :class:`Browser`, a headless Chromium; ``chromium()``, whether there is one on this machine.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
from types import TracebackType
from typing import Any, Self

from tornado.websocket import WebSocketClientConnection, websocket_connect

__all__ = ["Browser", "chromium"]

#: An expression becomes true within this time, or never.
PATIENCE_S = 60


def chromium() -> str | None:
    """Return the path of Chromium, or None where there is none."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


class _GoneError(Exception):
    """The document that was asked is not there any more."""


class Browser:
    """One browser with one page; an asynchronous context manager.

    Parameters
    ----------
    scheme
        What it says of the colours that the user likes: ``light`` or ``dark``.
    size
        Width and height of the page in pixels.
    """

    def __init__(self, scheme: str = "light", size: tuple[int, int] = (1400, 1300)) -> None:
        self._scheme = scheme
        self._size = size
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._socket: WebSocketClientConnection
        #: Exceptions of scripts, and what was written to the console as an error.
        self.errors: list[str] = []

    async def __aenter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory()
        self._process = subprocess.Popen(  # noqa: ASYNC220  nothing else is done meanwhile
            [
                chromium() or "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--no-first-run",
                # It asks nobody but the page.
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-quic",
                "--disable-sync",
                "--remote-debugging-address=127.0.0.1",
                "--remote-debugging-port=0",
                f"--user-data-dir={self._profile.name}",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stderr is not None
        for line in self._process.stderr:
            _, listening, url = line.partition("DevTools listening on ")
            if listening:
                break
        else:
            raise RuntimeError("Chromium did not start")
        self._socket = await websocket_connect(url.strip(), max_message_size=2**28)
        target = await self._call("Target.createTarget", url="about:blank")
        attached = await self._call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self._call(f"{domain}.enable")
        features = [{"name": "prefers-color-scheme", "value": self._scheme}]
        await self._call("Emulation.setEmulatedMedia", features=features)
        # A window has a frame, and is not made as small as a panel may be.
        width, height = self._size
        await self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        while await self._socket.read_message() is not None:
            pass
        self._process.terminate()
        self._process.wait(20)
        assert self._process.stderr is not None
        self._process.stderr.close()
        # It may still be writing there.
        shutil.rmtree(self._profile.name, ignore_errors=True)
        self._profile.cleanup()

    async def open(self, url: str) -> None:
        """Go to a page."""
        await self._call("Page.navigate", url=url)

    async def wait_for(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript as soon as it is anything but false, missing or an error."""
        # The page is asked again in the new document where one replaces another.
        watch = f"""new Promise((found, failed) => {{
            const end = Date.now() + {1000 * PATIENCE_S};
            const look = () => {{
                let value;
                try {{ value = {expression}; }} catch (error) {{ value = undefined; }}
                if (value) found(value);
                else if (Date.now() > end) failed(new Error("timeout"));
                else setTimeout(look, 50);
            }};
            look();
        }})"""
        for _ in range(3):
            try:
                answer = await self._call("Runtime.evaluate", expression=watch, awaitPromise=True, returnByValue=True)
            except _GoneError:
                continue
            assert "exceptionDetails" not in answer, f"{expression} did not come true; errors: {self.errors}"
            return answer["result"].get("value")
        raise AssertionError(f"{expression}: the page is loaded again and again")

    async def picture(self) -> bytes:
        """Return the page as it looks, as far as it goes, as a PNG."""
        answer = await self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    async def _call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.write_message(json.dumps(message))
        while True:
            text = await self._socket.read_message()
            assert text is not None, "the browser is gone"
            answer = json.loads(text)
            if answer.get("id") == number:
                problem = answer.get("error", {}).get("message", "")
                if "navigated" in problem or "context was destroyed" in problem:
                    raise _GoneError(problem)
                assert not problem, f"{method}: {problem}"
                return answer["result"]
            self._note(answer)

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(str(parameters["args"]))
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
