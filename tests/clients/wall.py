"""`make client-wall`: a server with the small model, one with the fake backend, and pytest of
another environment over both.

python -m tests.clients.wall .venv-clients/bin/python [pytest's arguments]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.server_process import own_server

HERE = Path(__file__).resolve().parent
OPTIONS = ("--confcutdir", str(HERE), "-o", "addopts=--import-mode=importlib", "-rs")


def main(python: str, *arguments: str) -> int:
    """Exit code of the tests."""
    with own_server() as url, own_server(BACKEND_IMPL="fake") as fake_url:
        servers = ("--server", url, "--fake-server", fake_url)
        command = [python, "-m", "pytest", *OPTIONS, *servers, *(arguments or (str(HERE),))]
        return subprocess.run(command, cwd=HERE.parent.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
