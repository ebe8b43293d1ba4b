"""A headless Chromium that tests drive through its debugging pipe."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of ``width`` by ``height`` pixels; ``errors`` are what its console has reported."""

    def __init__(self, width, height, folder):
        ours, theirs = os.pipe(), os.pipe()  # (read, write): commands to it, answers from it
        self.errors, self._number = [], 0
        command = [
            "bash", "-c", f'exec 3<&{ours[0]} 4>&{theirs[1]}; exec "$@"', "_", PROGRAM, "--headless=new", "--no-sandbox",
            "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--disable-dev-shm-usage",
            "--no-first-run", "--disable-extensions", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self._write, self._read, self._buffer = os.fdopen(ours[1], "wb", 0), theirs[0], b""
        self._session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def send(self, method, **arguments):
        """A command's result; the errors reported until it comes are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            kind, event = answer.get("method"), answer.get("params", {})
            level = event.get("type") or event.get("entry", {}).get("level")
            if kind == "Runtime.exceptionThrown" or level in ("error", "warning", "assert"):
                self.errors.append(event)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._buffer:
            piece = os.read(self._read, 1 << 20)
            assert piece, "the browser has ended"
            self._buffer += piece
        content, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(content)

    def open(self, path):
        """Load a file and wait until it has."""
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def value(self, expression):
        """What a JavaScript expression gives."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def mouse(self, kind, x, y):
        """``Pressed``, ``Moved`` or ``Released`` at a place of the window."""
        button = {"button": "left", "buttons": 1, "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button)

    def key(self, name):
        """Press and release a key."""
        text = {"text": name} if len(name) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=name)

    def close(self):
        self._process.terminate()
        self._process.wait(20)
        self._write.close()
        os.close(self._read)
