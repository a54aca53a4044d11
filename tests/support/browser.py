"""A real headless Chromium, driven over the DevTools protocol.

    with chromium(directory) as address:            # one process for many tests
        async with new_page(address, width=1440) as page:
            await page.open(url)
            await page.wait("document.querySelector('h1')")

Each page has a browser context of its own: no storage, no cookie of another test.
"""

from __future__ import annotations

import base64
import contextlib
import json
import math
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import trio
import trio_websocket

SECONDS = 60.0
"""For anything the browser is asked; much longer than it takes, as the machine may be busy."""

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--mute-audio",
    "--no-proxy-server",
    # A name that any DNS server could point at this machine.
    "--host-resolver-rules=MAP router.test 127.0.0.1",
    "--lang=en-US",
    "--remote-debugging-port=0",
)


@contextlib.contextmanager
def chromium(directory: Path) -> Iterator[str]:
    """A browser process; the address of its DevTools. `directory` gets its profile."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        raise RuntimeError("chromium is not installed; scripts/setup --system gets it")
    profile = directory / "profile"
    profile.mkdir()
    with (directory / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield _address(process, profile / "DevToolsActivePort")
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    deadline = time.monotonic() + SECONDS
    while True:
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("chromium did not start, see chromium.log")
        time.sleep(0.02)


class DevTools:
    """Commands to the browser, and the events it sends."""

    def __init__(self, socket: trio_websocket.WebSocketConnection) -> None:
        self._socket = socket
        self._number = 0
        self._answers: dict[int, dict[str, Any]] = {}
        self._waiting: dict[int, trio.Event] = {}
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    async def read(self) -> None:
        """Read messages until cancelled."""
        while True:
            message = json.loads(await self._socket.get_message())
            if "id" in message:
                self._answers[message["id"]] = message
                self._waiting.pop(message["id"]).set()
            else:
                self.events.append(message)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command. Raises RuntimeError if the browser refuses it."""
        self._number += 1
        number = self._number
        request: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            request["sessionId"] = self.session
        answered = self._waiting[number] = trio.Event()
        with trio.fail_after(SECONDS):
            await self._socket.send_message(json.dumps(request))
            await answered.wait()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result


NOT_YET = "if (error instanceof TypeError) return false; throw error"


class Page:
    """One tab."""

    def __init__(self, tools: DevTools) -> None:
        self.tools = tools

    async def open(self, url: str) -> None:
        """Go to a page and wait until it has loaded."""
        self.tools.events.clear()
        await self.tools.call("Page.navigate", url=url)
        await self.wait(
            f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'"
        )

    async def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page; a promise is awaited."""
        answer = await self.tools.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise AssertionError(details.get("exception", {}).get("description", details["text"]))
        return answer["result"].get("value")

    async def wait(self, expression: str, seconds: float = SECONDS) -> float:
        """Wait until JavaScript is truthy; returns how long it took.

        Checks after every change of the page.

        A missing element counts as false.
        """
        began = time.monotonic()
        guarded = (
            f"(() => {{ try {{ return Boolean({expression}) }} catch (error) {{ {NOT_YET} }} }})()"
        )
        while not await self.evaluate(guarded):
            if time.monotonic() - began > seconds:
                text = await self.evaluate("document.body?.innerText ?? ''")
                raise AssertionError(f"not so after {seconds} s: {expression}\n{text[:2000]}")
            await trio.sleep(0.02)
        return time.monotonic() - began

    async def text(self, selector: str) -> str:
        found = await self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText")
        assert found is not None, f"nothing is {selector}"
        return str(found)

    async def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        box = await self.evaluate(
            f"""(() => {{
                const node = document.querySelector({json.dumps(selector)});
                if (!node) return null;
                node.scrollIntoView({{block: "center"}});
                const {{x, y, width, height}} = node.getBoundingClientRect();
                return [x + width / 2, y + height / 2];
            }})()"""
        )
        assert box is not None, f"nothing is {selector}"
        for kind in ("mousePressed", "mouseReleased"):
            await self.tools.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=box[0],
                y=box[1],
                button="left",
                clickCount=1,
            )

    async def press(self, key: str, code: int = 0) -> None:
        """A key: a character, or a name such as Tab with its key code."""
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        await self.tools.call(
            "Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **text
        )
        await self.tools.call(
            "Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code
        )

    async def choose(self, selector: str, value: str) -> None:
        """Set a select element as a user would."""
        await self.evaluate(
            f"""(() => {{
                const node = document.querySelector({json.dumps(selector)});
                node.value = {json.dumps(value)};
                node.dispatchEvent(new Event("change", {{bubbles: true}}));
            }})()"""
        )

    async def dark(self, on: bool) -> None:
        """Emulate a system preference, such as the colour scheme."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        await self.tools.call("Emulation.setEmulatedMedia", features=[feature])

    async def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        await self.tools.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    async def metrics(self) -> dict[str, float]:
        """Seconds of CPU for script, layout and so on since the page was opened."""
        found = (await self.tools.call("Performance.getMetrics"))["metrics"]
        return {metric["name"]: metric["value"] for metric in found}

    async def screenshot(self, file: Path, *, whole: bool = False) -> None:
        shot = await self.tools.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole
        )
        file.write_bytes(base64.b64decode(shot["data"]))

    def problems(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, violated policies."""
        found = []
        for message in self.tools.events:
            details = message["params"]
            if message["method"] == "Runtime.exceptionThrown":
                found.append(str(details["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded":
                entry = details["entry"]
                if entry["level"] in ("error", "warning"):
                    found.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")
            elif message["method"] == "Runtime.consoleAPICalled" and details["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(f"console: {details['args']}")
        return found

    def requested(self) -> list[str]:
        """The URLs of all HTTP requests."""
        return [
            message["params"]["request"]["url"]
            for message in self.tools.events
            if message["method"] == "Network.requestWillBeSent"
        ]


@contextlib.asynccontextmanager
async def new_page(
    address: str, *, width: int = 1440, height: int = 900, mobile: bool = False
) -> AsyncIterator[Page]:
    """An empty tab; closed at the end."""
    async with trio_websocket.open_websocket_url(
        address, max_message_size=64 * 1024 * 1024
    ) as socket:
        tools = DevTools(socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tools.read)
            context = (await tools.call("Target.createBrowserContext"))["browserContextId"]
            target = await tools.call(
                "Target.createTarget", url="about:blank", browserContextId=context
            )
            attached = await tools.call(
                "Target.attachToTarget", targetId=target["targetId"], flatten=True
            )
            tools.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tools.call(f"{domain}.enable")
            # CPU time of the page's thread, which does not include other programs.
            await tools.call("Performance.enable", timeDomain="threadTicks")
            page = Page(tools)
            await page.size(width, height, mobile=mobile)
            # The same language on every machine.
            await tools.call("Emulation.setTimezoneOverride", timezoneId="UTC")
            try:
                yield page
            finally:
                tools.session = None
                with trio.CancelScope(shield=True), trio.move_on_after(5):
                    await tools.call("Target.disposeBrowserContext", browserContextId=context)
                nursery.cancel_scope.cancel()


def contrast(one: str, other: str) -> float:
    """The contrast of two opaque colours, `rgb(1, 2, 3)`, as WCAG 2.2 defines it."""
    lights = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lights[0] + 0.05) / (lights[1] + 0.05)


def _luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [
        part / 12.92 if part <= 0.04045 else math.pow((part + 0.055) / 1.055, 2.4) for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
