"""Commands on a real terminal, drawn by tmux, with a readable screen.

    with terminal("vllm-router ...", width=80, height=24) as screen:
        screen.wait("live")
        screen.type("q")

After the command's end the screen shows `rc=` and the terminal's modes.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SECONDS = 120.0
"""For anything to appear; much longer than it takes, as the machine may be busy."""

_END = "-- that was all --"


class Terminal:
    """A tmux server of its own with one pane."""

    def __init__(
        self, command: Sequence[str], width: int, height: int, cwd: Path, socket: Path
    ) -> None:
        program = shutil.which("tmux")
        if program is None:
            raise RuntimeError("tmux is not installed; scripts/setup --system gets it")
        self._tmux = [program, "-f", "/dev/null", "-S", str(socket)]
        # The exit code and the modes are the last lines on the screen.
        after = f"echo rc=$?; stty -a; echo {_END}; read -r forever"
        script = f"trap : INT; {shlex.join(command)}; {after}"
        root = str(Path(__file__).parents[2])
        environment = os.environ | {"PYTHONPATH": root, "LC_ALL": "C.UTF-8", "TERM": "xterm"}
        environment["XDG_STATE_HOME"] = str(cwd / ".state")
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        subprocess.run(
            [
                *(*self._tmux, "-u", "new-session", "-d", "-x", str(width), "-y", str(height)),
                *("-c", str(cwd), "sh", "-c", script),
                *(";", "set", "-g", "history-limit", "5000"),
            ],
            check=True,
            env=environment,
        )

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments], check=True, capture_output=True, text=True, timeout=SECONDS
        )
        return done.stdout

    def screen(self, *, colours: bool = False) -> str:
        """The visible text."""
        return self._ask("capture-pane", "-p", *(["-e"] if colours else []))

    def all(self) -> str:
        """The visible text and the scrollback; long lines joined."""
        return self._ask("capture-pane", "-p", "-J", "-S", "-")

    def wait(self, *texts: str, gone: str = "") -> str:
        """Wait until all of the texts are visible and `gone` is not."""
        deadline = time.monotonic() + SECONDS
        while True:
            screen = self.screen()
            if all(text in screen for text in texts) and not (gone and gone in screen):
                return screen
            assert time.monotonic() < deadline, f"no {texts} or still {gone!r} in:\n{screen}"
            time.sleep(0.02)

    def type(self, *keys: str) -> None:
        """Send keys by tmux's names: `q`, `C-c`, `Down`."""
        self._ask("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._ask("resize-window", "-x", str(width), "-y", str(height))

    def full_screen(self) -> bool:
        """Whether the alternate screen is shown."""
        return self._ask("display-message", "-p", "#{alternate_on}").strip() == "1"

    def ended(self) -> int:
        """The exit code, once the command has ended and the terminal is restored."""
        self.wait(_END)
        assert not self.full_screen()
        assert self._ask("display-message", "-p", "#{cursor_flag}").strip() == "1"
        text = self.all()
        before, _, modes = text.rpartition("rc=")
        code, *words = modes.replace(";", " ").split()
        assert {"icanon", "echo", "isig", "ixon", "icrnl", "opost", "iexten"} <= set(words), modes
        assert "Traceback" not in before or code != "0"
        return int(code)

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], check=False, capture_output=True)


@contextlib.contextmanager
def terminal(
    command: Sequence[str], cwd: Path, *, width: int = 80, height: int = 24
) -> Iterator[Terminal]:
    # A socket path may have 107 bytes; pytest's directories are longer.
    with tempfile.TemporaryDirectory(prefix="tmux-") as directory:
        started = Terminal(command, width, height, cwd, Path(directory) / "socket")
        try:
            yield started
        finally:
            started.close()
