"""A page in headless Chromium, asked over its debugging pipe; needs nothing but the browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser() -> str | None:
    """Return where the browser is, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One page; `problems` are the console's errors and warnings, and what the page tried to load."""

    def __init__(self, file: Path, *, width: int = 1280, dark: bool = False, media: str = "screen") -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._number = 0
        self.problems: list[str] = []
        self.loaded: list[str] = []
        self._events: set[str] = set()
        commands, answers = os.pipe(), os.pipe()
        self._out, self._in = os.fdopen(commands[1], "wb"), os.fdopen(answers[0], "rb")
        # The browser reads commands from descriptor 3 and answers on 4; a shell puts them there.
        place = f'exec "$0" "$@" 3<&{commands[0]} 4>&{answers[1]}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        words = ["/bin/bash", "-c", place, browser() or "chromium", *flags, f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            words, pass_fds=(commands[0], answers[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(commands[0])
        os.close(answers[1])
        try:
            self._open(file, width, dark=dark, media=media)
        except BaseException:
            self.close()
            raise

    def _open(self, file: Path, width: int, *, dark: bool, media: str) -> None:
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)
        if error := self.ask("Page.navigate", url=file.resolve().as_uri()).get("errorText"):
            raise RuntimeError(f"{file}: {error}")
        self._wait_for("Page.loadEventFired")

    def __enter__(self) -> Page:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the browser."""
        with suppress(RuntimeError, OSError):
            self._ask("Browser.close")
        with suppress(OSError):  # what could not be sent any more
            self._out.close()
        self._in.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to the page and return its result."""
        return self._ask(method, self._session, **parameters)

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression comes to."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, file: Path, *, height: int | None = None, scale: float = 1) -> None:
        """Write a picture of the page, or of its upper part."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": scale}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        self._out.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        self._out.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, event: str) -> None:
        while event not in self._events:
            self._next()

    def _next(self) -> dict[str, Any]:
        """Read one message, and note what the console says and what is loaded."""
        raw = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        method, found = str(message.get("method")), message.get("params", {})
        self._events.add(method)
        if method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.problems.append(found["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.problems.append(str(found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(found["exceptionDetails"]))
        elif method == "Network.requestWillBeSent":
            self.loaded.append(found["request"]["url"])
        return message
