"""The darkroom command in a process of its own, on a terminal as a person has it or on pipes."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

from settings import REPO

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def start(data_dir, *arguments, cwd, **streams):
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("DARKROOM_")
    }
    environment |= {
        "PYTHONPATH": str(REPO),
        "TERM": "xterm-256color",
        "COLUMNS": "110",
        "LINES": "40",
    }
    command = [sys.executable, "-P", "-m", "cli", "--data-dir", str(data_dir), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **streams)


def piped(data_dir, *arguments, cwd):
    return start(
        data_dir, *arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


class Terminal:
    """A command on a terminal: what it shows, and keys that are pressed."""

    def __init__(self, data_dir, *arguments, cwd):
        self._fd, child = pty.openpty()
        self.process = start(data_dir, *arguments, cwd=cwd, stdin=child, stdout=child, stderr=child)
        os.close(child)
        self.raw = ""

    def read_until(self, *words, within_s=60):
        """Everything shown so far, once all the words were."""
        deadline = time.monotonic() + within_s
        while not all(word in self.shown for word in words):
            assert time.monotonic() < deadline, f"{words} not shown: {self.shown[-2000:]}"
            assert self._read(0.2), f"{words} not shown: {self.shown[-2000:]}"
        return self.shown

    def press_ctrl_c(self):
        self.process.send_signal(signal.SIGINT)

    def end(self, within_s=60):
        """The exit code."""
        deadline = time.monotonic() + within_s
        while self._read(0.2):
            assert time.monotonic() < deadline, self.shown[-2000:]
        code = self.process.wait(within_s)
        os.close(self._fd)
        return code

    @property
    def shown(self):
        return _ESCAPES.sub("", self.raw).replace("\r", "")

    def _read(self, wait_s):
        """False at the end."""
        if select.select([self._fd], [], [], wait_s)[0]:
            try:
                content = os.read(self._fd, 65536)
            except OSError:  # Linux says so when the other end is closed
                return False
            self.raw += content.decode(errors="replace")
            return bool(content)
        return True
