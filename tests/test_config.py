"""The switches: read once, frozen, documented twice, and each of them read by somebody."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

import config

Parts = list[type[config.Part]]


def field_of(flag: str, parts: Parts) -> tuple[type[config.Part], str, FieldInfo]:
    """Where a flag ends up."""
    return next(
        (part, name, field)
        for part in parts
        for name, field in part.model_fields.items()
        if field.alias == flag
    )


def another_value(field: FieldInfo) -> object:
    """A legal value that is not the default."""
    if get_origin(field.annotation) is Literal:
        return next(choice for choice in get_args(field.annotation) if choice != field.default)
    if field.annotation is bool:
        return not field.default
    if field.annotation is int:
        return field.default + 1
    if field.annotation == SecretStr | None:
        return SecretStr("secret")
    if field.default == "auto":
        return 3  # or a number
    return 0.5 if field.annotation is float else "somewhere"


def as_text(value: object) -> str:
    """A value as the environment holds it."""
    if isinstance(value, bool):
        return f"{value:d}"
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def written(value: object) -> str:
    """A default as the documentation writes it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{value:d}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def documented(page: Path) -> dict[str, str]:
    """Flag and default of each row of the page's tables whose first cell is a flag."""
    rows = re.findall(r"^\| `([A-Z][A-Z_]+)` \| ([^|]+?) \|", page.read_text(), re.MULTILINE)
    assert len(rows) == len(dict(rows)), f"{page} has a flag twice"
    return dict(rows)


class Reader:
    """Which settings fields a module reads.

    The type of a name or attribute is what its annotations and assignments in this module say.
    """

    def __init__(self, source: str, parts: Parts) -> None:
        self.parts = {part.__name__: part for part in parts}
        self.known: dict[str, set[str]] = {}
        self.nodes = list(ast.walk(ast.parse(source)))

    def fields(self) -> set[tuple[str, str]]:
        """(part, field) pairs."""
        for node in self.nodes:
            if isinstance(node, ast.arg) and node.annotation is not None:
                self._learn(node.arg, self._named(node.annotation))
            if isinstance(node, ast.AnnAssign):
                self._learn(self._name(node.target), self._named(node.annotation))
        for _ in range(3):  # assignments that build on each other
            for node in self.nodes:
                if isinstance(node, ast.Assign):
                    self._learn(self._name(node.targets[0]), self._types(node.value))
        return {
            (part, node.attr)
            for node in self.nodes
            if isinstance(node, ast.Attribute)
            for part in self._types(node.value)
            if node.attr in self.parts[part].model_fields
        }

    def _learn(self, name: str, types: set[str]) -> None:
        self.known.setdefault(name, set()).update(types)

    def _named(self, annotation: ast.expr) -> set[str]:
        return self.parts.keys() & set(re.findall(r"\w+", ast.unparse(annotation)))

    @staticmethod
    def _name(target: ast.expr) -> str:
        return ast.unparse(target).split(".")[-1]

    def _types(self, value: ast.expr) -> set[str]:
        if isinstance(value, ast.BoolOp):
            return set().union(*map(self._types, value.values))
        if isinstance(value, ast.Call):
            name = self._name(value.func)
            return {"Settings"} if name == "read_settings" else self.parts.keys() & {name}
        if isinstance(value, ast.Attribute) and self._types(value.value):
            owners = [self.parts[part].model_fields for part in self._types(value.value)]
            annotations = [owner[value.attr].annotation for owner in owners if value.attr in owner]
            return self.parts.keys() & {getattr(each, "__name__", "") for each in annotations}
        return self.known.get(self._name(value), set())


@pytest.mark.parametrize("page", ["README.md", "docs/configuration.md"])
def test_a_page_lists_every_flag_with_its_default_and_no_other(
    page: str, root: Path, flags: dict[str, object]
) -> None:
    assert documented(root / page) == {flag: written(value) for flag, value in flags.items()}


def test_every_field_is_read_somewhere(
    root: Path, sources: list[Path], settings_parts: Parts
) -> None:
    read: set[tuple[str, str]] = set()
    for source in sources:
        if source != Path("config.py"):
            read |= Reader((root / source).read_text(), settings_parts).fields()
    fields = {(part.__name__, name) for part in settings_parts for name in part.model_fields}
    assert fields - read == set(), "nobody reads these"


def test_a_flag_reaches_its_field(
    flags: dict[str, object], settings_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in flags:
        part, name, field = field_of(flag, settings_parts)
        value = another_value(field)
        monkeypatch.setenv(flag, as_text(value))
        assert getattr(part(), name) == value != field.default
        monkeypatch.setenv(flag, "")
        assert getattr(part(), name) == field.default, "an empty flag is unset"


def test_a_value_that_nothing_understands_gives_one_line_that_names_the_flag(
    flags: dict[str, object], settings_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in flags:
        field = field_of(flag, settings_parts)[2]
        if field.annotation in (str, str | None, SecretStr | None):
            continue  # any text is a name or a path
        monkeypatch.setenv(flag, "perhaps")
        with pytest.raises(config.ConfigError) as caught:
            config.read_settings()
        assert str(caught.value).startswith(f"{flag}=perhaps: ")
        assert "\n" not in str(caught.value)
        monkeypatch.delenv(flag)


@pytest.mark.parametrize(
    ("flag", "most"),
    [("MAX_RUNNING", 4096), ("MAX_STEP_TOKENS", 1 << 20), ("PAGE_TOKEN_BUDGET", 1 << 28)],
)
def test_a_limit_that_no_memory_holds_is_refused_by_name(
    flag: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flag, str(most))
    config.read_settings()
    monkeypatch.setenv(flag, str(most + 1))
    with pytest.raises(config.ConfigError, match=rf"^{flag}={most + 1}: [^\n]*{most}$"):
        config.read_settings()


def test_all_wrong_flags_of_a_part_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_RUNNING", "-1")
    monkeypatch.setenv("MAX_STEP_TOKENS", "many")
    with pytest.raises(config.ConfigError, match=r"^MAX_RUNNING=-1: .*; MAX_STEP_TOKENS=many: .*$"):
        config.read_settings()


@pytest.mark.parametrize(
    ("device", "rows", "tokens"), [("cpu", 64, 512), ("mps", 64, 512), ("cuda", 256, 8192)]
)
def test_limits_that_are_not_given_suit_the_device(
    device: str, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limits(**given: Any) -> tuple[int, int]:
        found = config.resolve_limits(config.BatchSettings(**given), device)
        return found.max_running, found.max_step_tokens

    assert limits() == (rows, tokens)
    assert limits(max_running=7) == (7, tokens)
    monkeypatch.setenv("MAX_STEP_TOKENS", "100")
    assert limits() == (rows, 100)


def test_a_stray_variable_is_no_switch(
    settings_parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config.read_settings()
    for part in settings_parts:
        for name in part.model_fields:
            monkeypatch.setenv(name, "stray")
    monkeypatch.setenv("MINISGL_NOBODY_READS_THIS", "stray")
    assert config.read_settings() == plain


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="page_token"):
        config.CacheSettings.model_validate({"page_token": 8})


def test_settings_are_frozen(settings_parts: Parts) -> None:
    for part in settings_parts:
        settings = part()
        for name in part.model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(settings, name, getattr(settings, name))


@pytest.mark.parametrize(
    ("mps", "cuda", "best"),
    [
        (True, True, "mps"),
        (True, False, "mps"),
        (False, True, "cuda"),
        (False, False, "cpu"),
    ],
)
def test_the_best_device_is_mps_then_cuda_then_cpu(
    mps: bool, cuda: bool, best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert config.get_device() == best
