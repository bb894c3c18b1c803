"""A headless Chromium, driven over a pipe with the standard library only.

`Browser` starts one process with a fresh profile and no network beyond this
machine; `Page` is one tab.  Commands are those of the DevTools protocol.

Does not handle: Windows, where Chromium has no such pipe.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Chromium reads commands from descriptor 3 and answers on 4.
CHILD = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); "
    "os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-sandbox",  # a container's root has no other way
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--hide-scrollbars",
    "--no-first-run",
    "--no-default-browser-check",
    "--mute-audio",
    # Nothing but this machine resolves, so an outside address fails.
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
Event = dict[str, Any]


def find() -> str | None:
    """The browser's program, or None; ``CHROMIUM`` names another."""
    named = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, (named or "", *NAMES))), None)


class Browser:
    """One browser process; use it in a ``with`` block.

    Raises:
        TimeoutError: the browser did not answer in time.
        RuntimeError: it refused a command, or ended.
    """

    def __init__(self, program: str, timeout_s: float = 60.0) -> None:
        self.program, self.timeout_s = program, timeout_s
        self.profile = tempfile.mkdtemp(prefix="specref-browser-")
        self._last, self._rest = 0, b""
        self.listeners: dict[str, Callable[[Event], None]] = {}

    def __enter__(self) -> Browser:
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        # Above 9, so that neither is overwritten when 3 and 4 are set up.
        fds = [fcntl.fcntl(f, fcntl.F_DUPFD, 10) for f in
               (theirs_read, theirs_write)]
        command = [sys.executable, "-c", CHILD, *map(str, fds), self.program]
        self.process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={self.profile}"],
            pass_fds=fds,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for fd in (theirs_read, theirs_write, *fds):
            os.close(fd)
        self._read, self._write = ours_read, ours_write
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._write)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)

    def send(
        self, method: str, session: str | None = None, **params: Any
    ) -> Any:
        """Run a command and return its result; events go to listeners."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout_s
        while True:
            answer = self._next(end, method)
            if answer.get("id") == number:
                if "error" in answer:
                    why = answer["error"]["message"]
                    raise RuntimeError(f"{method}: {why}")
                return answer["result"]

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Handle events until ``done()``."""
        end = time.monotonic() + self.timeout_s
        while not done():
            self._next(end, what)

    def _next(self, end: float, what: str) -> Event:
        while b"\0" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(
                    f"{what}: no answer in {self.timeout_s:.0f} seconds"
                )
            got = os.read(self._read, 1 << 20)
            if not got:
                raise RuntimeError(f"{self.program} ended during {what}")
            self._rest += got
        text, _, self._rest = self._rest.partition(b"\0")
        event = json.loads(text)
        listener = self.listeners.get(event.get("sessionId", ""))
        if listener and "method" in event:
            listener(event)
        return event


class Page:
    """One tab, with every event that it has sent since `open`."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        target = browser.send("Target.createTarget", url="about:blank")
        attached = browser.send(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self.session = attached["sessionId"]
        self.events: list[Event] = []
        browser.listeners[self.session] = self.events.append
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        return self.browser.send(method, self.session, **params)

    def resize(self, width: int, height: int) -> None:
        """Set the window in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def open(self, address: str) -> None:
        """Load a page and wait for its load event."""
        self.events.clear()
        self.send("Page.navigate", url=address)
        self.browser.wait(lambda: self.saw("Page.loadEventFired"), address)

    def saw(self, method: str) -> list[Event]:
        """The parameters of the events of one kind so far."""
        return [e["params"] for e in self.events if e["method"] == method]

    def run(self, script: str) -> Any:
        """The JSON value of an expression; a promise is awaited."""
        result = self.send(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"script failed: {result['exceptionDetails']}")
        return result["result"].get("value")

    def shoot(self, file: Path, most: int = 12_000) -> None:
        """Save the whole page as PNG, at most ``most`` pixels high."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        height = min(size["height"], most)
        clip = {"x": 0, "y": 0, "scale": 1, "height": height}
        clip["width"] = self.run("window.innerWidth")
        shot = self.send(
            "Page.captureScreenshot", captureBeyondViewport=True, clip=clip
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(shot["data"]))
