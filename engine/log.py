"""What a process of ours logs, and how a line looks. Called by entry points only."""

from __future__ import annotations

import logging

OURS = ("api", "backend", "engine", "ipc")


def start_log(level: str, who: str = "") -> None:
    """Our own messages from `level` on, other people's from WARNING on, to stderr.

    `who` is named in each line. Called again, it changes the level alone. Loggers that are set up
    by somebody else, as uvicorn's are, stay as they are.
    """
    form = " ".join(filter(None, ("%(levelname)s", who, "%(name)s: %(message)s")))
    logging.basicConfig(format=form, level=logging.WARNING)
    for package in OURS:
        logging.getLogger(package).setLevel(level)
