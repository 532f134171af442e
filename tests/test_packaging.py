"""What is installed: the wheel holds the whole tree, and declares what the tree imports."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = "api/static"  # files that are no modules
LOADED_BY_NAME = {"uvicorn", "uvloop", "httptools", "watchfiles"}  # the server, and what it uses
# the folder of each optional backend, which alone may import what its extra brings
EXTRA_FOLDERS = {"mlx": "backend/mlx", "sglang": "backend/sglang"}
PINNED = {"requirements.txt": ("",), "requirements-dev.txt": ("dev", "mlx")}  # file -> extras


def third_party(source: Path) -> set[str]:
    """Top-level names that a file imports from outside the standard library."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def requirements(path: Path) -> list[Requirement]:
    """The lines of a requirements file that name a package."""
    lines = path.read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-r"))]


@pytest.fixture(scope="module")
def wheel(root: Path, sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the tree stays clean and old builds stay out."""
    copy = tmp_path_factory.mktemp("copy")
    for path in sources:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, copy / path)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy / name)
    shutil.copytree(root / PAGE, copy / PAGE)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(copy)], check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> PathDistribution:
    """What the wheel says of itself."""
    (folder,) = (each for each in zipfile.Path(wheel).iterdir() if each.name.endswith(".dist-info"))
    return PathDistribution(folder)


def wanted(metadata: PathDistribution, extra: str = "") -> list[Requirement]:
    """The dependencies of an extra; without one, those that everybody gets."""
    every = [Requirement(line) for line in metadata.requires or ()]
    core = [each for each in every if each.marker is None or "extra" not in str(each.marker)]
    if not extra:
        return core
    return [each for each in every if f'extra == "{extra}"' in str(each.marker)]


def test_the_wheel_holds_every_module_of_the_tree(sources: list[Path], wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.endswith(".py")}
    assert inside == {path.as_posix() for path in sources}


def test_the_wheel_holds_the_page(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = {each: archive.read(each) for each in archive.namelist() if each.startswith(PAGE)}
    there = {path.relative_to(root).as_posix(): path for path in (root / PAGE).iterdir()}
    assert inside == {name: path.read_bytes() for name, path in there.items()}


def test_the_wheel_carries_the_license(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(name) == (root / "LICENSE").read_bytes()


def test_an_unpacked_wheel_answers_far_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from backend.interface import SamplingParams\n"
        "from config import BackendSettings, Settings\n"
        "from engine.llm import LLM\n"
        "with LLM(Settings(backend=BackendSettings(impl='fake'))) as llm:\n"
        "    (answer,) = llm.generate('hello', SamplingParams(max_new_tokens=4, ignore_eos=True))\n"
        "    assert len(answer.token_ids) == 4\n"
    )
    subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path)


def canonical_names(found: Iterable[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in found}


def distribution(module: str, providers: Mapping[str, Sequence[str]]) -> str:
    """What a top-level module is installed by. Of several, such as builds of mlx, it is the one
    that is called like it.
    """
    found = [canonicalize_name(each) for each in providers.get(module, [module])]
    same = canonicalize_name(module)
    return same if same in found else found[0]


def test_every_import_is_a_declared_dependency_and_every_dependency_is_imported(
    root: Path, sources: list[Path], metadata: PathDistribution
) -> None:
    ours = {path.parts[0].removesuffix(".py") for path in sources}
    providers = packages_distributions()
    extras = {extra: canonical_names(wanted(metadata, extra)) for extra in EXTRA_FOLDERS}
    used, used_of = set[str](), {extra: set[str]() for extra in extras}
    for path in sources:
        found = {distribution(each, providers) for each in third_party(root / path) - ours}
        for extra, folder in EXTRA_FOLDERS.items():
            if path.is_relative_to(folder):
                used_of[extra] |= found & extras[extra]
                found -= extras[extra]
        used |= found
    assert used_of == extras
    used.discard("pydantic-core")  # comes with pydantic, which pins it
    used.discard("triton")  # comes with the CUDA builds of torch, which pin it
    assert used | LOADED_BY_NAME == canonical_names(wanted(metadata))


def test_the_pins_are_the_dependencies_and_lie_within_their_ranges(
    root: Path, metadata: PathDistribution
) -> None:
    for file, extras in PINNED.items():
        declared = [each for extra in extras for each in wanted(metadata, extra)]
        ranges = {canonicalize_name(each.name): each.specifier for each in declared}
        pins = requirements(root / file)
        assert canonical_names(pins) == ranges.keys()
        for pin in pins:
            (exact,) = pin.specifier
            assert exact.operator == "=="
            assert ranges[canonicalize_name(pin.name)].contains(exact.version), pin


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_each_python_gets_each_pin_once(root: Path, python: str) -> None:
    for file in ("requirements.txt", "requirements-dev.txt"):
        names = [
            pin.name
            for pin in requirements(root / file)
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(names) == len(set(names))
        assert set(names) >= {pin.name for pin in requirements(root / file) if not pin.marker}


def test_the_readme_lists_every_extra(root: Path, metadata: PathDistribution) -> None:
    section = (root / "README.md").read_text().split("| extra |")[1].split("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert sorted(listed) == sorted(metadata.metadata.get_all("Provides-Extra") or ())


def test_no_file_is_left_out_of_git_by_accident(root: Path, sources: list[Path]) -> None:
    ignored = re.findall(r"^/?([\w.*-]+)/?$", (root / ".gitignore").read_text(), re.MULTILINE)
    assert not {path.parts[0] for path in sources} & set(ignored)
