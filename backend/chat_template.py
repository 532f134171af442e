"""Conversations to prompts, by the template that a checkpoint brings along.

The environment is the one that checkpoints' templates are written for: jinja2's immutable sandbox
with the filters, globals and tags of transformers' `apply_chat_template`. A template is code from
outside: callers hand it plain JSON values, never live objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from backend.interface import ModelBroken, RequestRefused

Message = Mapping[str, Any]  # JSON values: strings, numbers, lists, dicts

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; the first counts


class GenerationBlock(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its body is rendered
    and no more.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it on the instance)

    def parse(self, parser: Parser) -> nodes.Node:
        """A scope around the body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PublicNamespace(Namespace):
    """jinja2's namespace without underscored names, which could pose as Python's own attributes
    and so deceive the sandbox.
    """

    def __init__(self, /, *args: Any, **names: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **names).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: rename it")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": PublicNamespace,
    }
    return environment


class ChatTemplate:
    """Compiled templates by name, and the special tokens that they may print.

    `default` renders everything but conversations with tools when there is a `tool_use`.
    """

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """Raises ModelBroken when a template does not parse."""
        self.text = "\n".join(sources.values())
        self._variables = variables
        self._templates = {name: _compile(name, source) for name, source in sources.items()}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        options: Mapping[str, Any],
    ) -> str:
        """The prompt. `options` are further variables of the template, such as enable_thinking.

        Raises RequestRefused naming `messages` when there are none or the template refuses them.
        """
        if not messages:
            raise RequestRefused("messages is empty: give at least one message", "messages")
        template = self._choose(tools is not None)
        variables = {**self._variables, "documents": None, **options}
        try:
            return template.render(
                variables,
                messages=[_normalised(message) for message in messages],
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # the checkpoint's code: it may raise anything about its input
            raise RequestRefused(
                f"the chat template cannot render these messages: {error}", "messages"
            ) from error

    def _choose(self, with_tools: bool) -> Template:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise RequestRefused(
                f"the checkpoint has the chat templates {', '.join(sorted(self._templates))} and "
                "no default: give a prompt instead of messages",
                "messages",
            )
        return self._templates[name]


def _compile(name: str, source: str) -> Template:
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise ModelBroken(
            f"chat template {name!r} does not parse: line {error.lineno}: {error.message}"
        ) from error


def _normalised(message: Message) -> dict[str, Any]:
    """A message without its null fields, which templates would print as "None", and with its
    reasoning under every name that templates look for it.
    """
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING if name in given), None)
    if reasoning is None:
        return given
    return {"thinking": reasoning, **given, "reasoning_content": reasoning}
