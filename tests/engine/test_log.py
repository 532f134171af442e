"""What a process of ours logs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = "import logging; from engine.log import start_log\n"


def logged(root: Path, program: str) -> list[str]:
    """Lines on stderr of a program that begins with our imports."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + program],
        capture_output=True,
        text=True,
        cwd=root,
        check=True,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("ours", ["api.server", "backend.fake", "engine.worker", "ipc.messages"])
def test_our_own_messages_count_from_the_level_and_others_from_warning(
    root: Path, ours: str
) -> None:
    program = (
        "start_log('INFO')\n"
        f"for name in ('{ours}', 'somebody'):\n"
        "    for level in (10, 20, 30):\n"
        "        logging.getLogger(name).log(level, 'said')\n"
    )
    expected = [f"INFO {ours}: said", f"WARNING {ours}: said", "WARNING somebody: said"]
    assert logged(root, program) == expected


def test_each_line_says_who_speaks(root: Path) -> None:
    program = "start_log('INFO', 'engine 3'); logging.getLogger('ipc').error('lost')"
    assert logged(root, program) == ["ERROR engine 3 ipc: lost"]


def test_called_again_it_changes_the_level_and_doubles_no_line(root: Path) -> None:
    program = (
        "start_log('ERROR'); start_log('DEBUG')\n"
        "logging.getLogger('api').debug('once')\n"
        "start_log('WARNING')\n"
        "logging.getLogger('api').info('never')\n"
    )
    assert logged(root, program) == ["DEBUG api: once"]


def test_the_loggers_of_the_web_server_stay_as_they_are(root: Path) -> None:
    program = (
        "import logging.config, uvicorn.config\n"
        "logging.config.dictConfig(uvicorn.config.LOGGING_CONFIG)\n"
        "start_log('INFO')\n"
        "logging.getLogger('uvicorn.error').info('Started')\n"
        "logging.getLogger('api').info('ours')\n"
    )
    assert logged(root, program) == ["INFO:     Started", "INFO api: ours"]
