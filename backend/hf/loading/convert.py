"""A GGUF becomes a Hugging Face folder, once: whole or not at all, whoever else converts it too.

`python -m backend.hf.loading.convert SOURCE.gguf TARGET_FOLDER` does nothing when the target is
complete. Reading and writing are imported when needed, so that this answer takes no time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backend.hf.loading.folder import is_complete
from backend.interface import ModelBroken, ModelNotFound, StartFailed

# Raise it when the same GGUF converts to another folder: cached ones are then left alone.
FORMAT = 1
MAGIC = b"GGUF"

logger = logging.getLogger(__name__)


def convert(source: Path, target: Path) -> None:
    """Make `target` a complete conversion of `source`.

    It is written beside the target and renamed, one converter at a time. Raises ModelNotFound,
    ModelBroken, Unsupported, or StartFailed when the disk refuses.
    """
    if is_complete(target):
        return
    _check_magic(source)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(target.with_name(f".{target.name}.lock")):
            if not is_complete(target):  # another process may have been faster
                _convert(source, target)
    except OSError as error:
        raise StartFailed(f"cannot write {target}, converted from {source}: {error}") from error


def _check_magic(source: Path) -> None:
    """Before anything is made for `source`: it is there and begins as every GGUF does."""
    try:
        with source.open("rb") as file:
            found = file.read(len(MAGIC))
    except FileNotFoundError as error:
        raise ModelNotFound(f"{source} does not exist: name a .gguf file") from error
    except OSError as error:
        raise StartFailed(f"cannot read {source}: {error.strerror}") from error
    if found != MAGIC:
        raise ModelBroken(
            f"{source} is no GGUF, it begins with {found!r}: name a .gguf file or a model folder"
        )


def _convert(source: Path, target: Path) -> None:
    from backend.hf.loading.gguf_folder import write_folder  # late: brings torch

    if target.exists() and any(target.iterdir()):
        raise ModelBroken(
            f"{target} is no complete conversion of {source}: remove it or name another"
        )
    logger.info("converting %s into %s, once", source, target)
    start = time.monotonic()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a converter that was killed
    partial.mkdir()
    try:
        write_folder(source, partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("converted in %.1f s", time.monotonic() - start)


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold `lock` against every other process and thread; the system lets go when one dies."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_conversion(source: Path) -> Path:
    """The folder of `source` in the user's cache, converted now if it was not before.

    Its name changes with the file's place, size and time.
    """
    try:
        status = source.stat()
    except OSError as error:
        raise StartFailed(f"cannot read {source}: {error.strerror}") from error
    identity = f"{source.resolve()} {status.st_size} {status.st_mtime_ns} {FORMAT}"
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = home / "mini-sglang" / "converted" / f"{source.stem}-{digest}"
    convert(source, target)
    return target


def main() -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert a GGUF into a Hugging Face folder, once.")
    parser.add_argument("source", type=Path, metavar="SOURCE.gguf")
    parser.add_argument("target", type=Path, metavar="TARGET_FOLDER")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        convert(arguments.source, arguments.target)
    except StartFailed as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
