"""A tiny random model that every test here may read. Without mlx-lm, which wants Python 3.11, there
is nothing to import: the cases of tests/conformance say so when they are skipped.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conformance.cases import save_tiny_model

collect_ignore_glob = [] if find_spec("mlx_lm") else ["test_*.py"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of 96 tokens."""
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model("Llama", folder)
    return folder
