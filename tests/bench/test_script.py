"""How a script starts and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backend.interface import ModelNotFound
from bench.script import run_script
from config import ConfigError


@pytest.mark.parametrize("error", [ModelNotFound("no model there"), ConfigError("no model there")])
def test_an_error_of_ours_is_one_line_and_exit_code_1(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "no model there\n"


def test_an_error_of_nobody_keeps_its_traceback() -> None:
    def main() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_script(main)


def test_the_exit_code_is_what_main_says_and_130_after_ctrl_c() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    for main, code in ((lambda: 0, 0), (lambda: 1, 1), (interrupted, 130)):
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        assert ended.value.code == code


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_that_has_gone_is_141_without_a_word(root: Path, flush: bool) -> None:
    main = f"print('answer', flush={flush}) or 0"
    code = f"from bench.script import run_script; run_script(lambda: {main})"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
