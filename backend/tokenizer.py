"""Text to ids, ids to bytes, conversations to prompts. Loads without torch and transformers.

Used by the front (`api`, `engine/llm.py`); the engine itself knows ids only. A checkpoint's
tokenizer.json decides everything about encoding, as it does in transformers 5: the special tokens
that a prompt gets are those of its post-processor.
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from backend.byte_table import ByteTable, Decoder, byte_table
from backend.chat_template import ChatTemplate, Message
from backend.interface import ModelBroken, ModelNotFound, RequestRefused

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
_CHAT_TEMPLATE_FILE = "chat_template.jinja"
_CHAT_TEMPLATE_FOLDER = "additional_chat_templates"


class Tokenizer(ABC):
    """A vocabulary and the conversation form of its model. Immutable; any thread may call it."""

    def __init__(
        self,
        table: ByteTable,
        special_ids: frozenset[int],
        stop_ids: tuple[int, ...],
        template: ChatTemplate | None,
    ) -> None:
        self.table = table.table  # index: id; ids without a token are empty
        self.visible = table.visible  # the same, special tokens empty
        self.longest = max(map(len, self.table), default=0)  # bytes of a token, at most
        self.strips_leading_space = table.strips_leading_space
        self.special_ids = special_ids
        self.stop_ids = stop_ids  # the tokenizer's own end token; a model may have more
        self._template = template

    @property
    def vocabulary(self) -> int:
        """Ids are below this."""
        return len(self.table)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render` can be called."""
        return self._template is not None

    @property
    def template_text(self) -> str:
        """The source of its chat templates; empty where there is none."""
        return "" if self._template is None else self._template.text

    def bytes_of(self, id: int) -> bytes:
        """What a token stands for. Not always whole characters."""
        return self.table[id]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens spelled out in it become their ids.

        Raises RequestRefused when the text is no Unicode text (holds half a surrogate pair).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` of each text. Other threads run meanwhile, however long the texts are."""
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise RequestRefused(
                f"text is not valid Unicode at character {error.start}: it holds half a surrogate "
                "pair",
                "prompt",
            ) from error
        return self._encode(texts, add_special_tokens)

    @abstractmethod
    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]: ...

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """The prompt of a conversation, special tokens spelled out: encode it without adding any.

        Raises RequestRefused naming `messages` when there is no template or it refuses them.
        """
        if self._template is None:
            raise RequestRefused(
                "this model has no chat template: give a prompt instead of messages", "messages"
            )
        return self._template.render(messages, tools, add_generation_prompt, template_kwargs)


class HfTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face folder."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        config: Mapping[str, Any],
        templates: Mapping[str, str],
        size: int,
    ) -> None:
        """`config` is tokenizer_config.json; the byte table has `size` entries at least.

        Raises Unsupported for a decoder that is not a concatenation of bytes, ModelBroken for a
        chat template that does not parse.
        """
        names = _special_tokens(config)
        _add_missing(inner, [*names.values(), *_extra_special_tokens(config)])
        inner.no_truncation()
        inner.no_padding()
        added = inner.get_added_tokens_decoder()
        special_ids = frozenset(id for id, token in added.items() if token.special)
        table = byte_table(
            _decoder(inner),
            inner.get_vocab(with_added_tokens=False),
            {id: token.content for id, token in added.items()},
            special_ids,
            size,
        )
        end = inner.token_to_id(names["eos_token"]) if "eos_token" in names else None
        super().__init__(
            table,
            special_ids,
            () if end is None else (end,),
            ChatTemplate(templates, names) if templates else None,
        )
        self._inner = inner

    @classmethod
    def load(cls, folder: Path) -> HfTokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat templates of `folder`.

        Raises ModelNotFound when there is no tokenizer, ModelBroken for a file that cannot be read,
        Unsupported for a decoder that nothing here knows.
        """
        file = folder / TOKENIZER_FILE
        if not file.is_file():
            raise ModelNotFound(
                f"{folder} has no tokenizer.json: add the tokenizer's files, or give token ids"
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ModelBroken(f"{file} cannot be read: {error}") from error
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_json(
                folder / "special_tokens_map.json"
            )  # where older folders name them
        model = _read_json(folder / "config.json")
        size = model.get("vocab_size") or model.get("text_config", {}).get("vocab_size") or 0
        return cls(inner, config, _chat_templates(folder, config), size)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # the batch call even for one text: it alone lets go of the interpreter
        encoded = self._inner.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [each.ids for each in encoded]


def _decoder(inner: tokenizers.Tokenizer) -> Decoder | None:
    """tokenizer.json's decoder, as the library writes it: what older files leave out is there."""
    if inner.decoder is None:
        return None
    decoder: Decoder = json.loads(inner.decoder.__getstate__())
    return decoder


def _read_text(file: Path) -> str:
    """Raises ModelBroken."""
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ModelBroken(f"{file} is not UTF-8: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; empty when there is no such file. Raises ModelBroken."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(_read_text(file))
    except ValueError as error:
        raise ModelBroken(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelBroken(f"{file} holds a {type(found).__name__}, an object is wanted")
    return found


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with `content`; else None."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens: bos_token, eos_token, and whatever else a model calls so."""
    extra = config.get("extra_special_tokens")
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    contents = ((key, _content(value)) for key, value in named.items())
    return {key: content for key, content in contents if content is not None}


def _extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """Special tokens without a name."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    contents = [_content(token) for token in extra] if isinstance(extra, list) else []
    return [content for content in contents if content is not None]


def _add_missing(inner: tokenizers.Tokenizer, contents: Sequence[str]) -> None:
    """Make special what the configuration calls so and tokenizer.json does not know as such."""
    known = {token.content for token in inner.get_added_tokens_decoder().values()}
    inner.add_special_tokens(
        [
            tokenizers.AddedToken(content, special=True, normalized=False)
            for content in dict.fromkeys(contents)
            if content not in known
        ]
    )


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files of their own come before those in tokenizer_config.json."""
    files = {file.stem: file for file in sorted((folder / _CHAT_TEMPLATE_FOLDER).glob("*.jinja"))}
    default = folder / _CHAT_TEMPLATE_FILE
    if default.is_file():
        files["default"] = default
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    template = config.get("chat_template")
    if not isinstance(template, list):
        return {} if template is None else {"default": template}
    try:
        return {each["name"]: each["template"] for each in template}
    except (KeyError, TypeError) as error:
        raise ModelBroken(
            f"{folder / 'tokenizer_config.json'}: each entry of chat_template needs a name and a "
            "template"
        ) from error


BYTE_TEMPLATE = r"""{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""


class ByteTokenizer(Tokenizer):
    """The built-in tokenizer, for a backend without a model: ids 0 to 255 are bytes, then the
    special tokens.
    """

    SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")  # ids 256 and up
    BOS = 256
    EOS = 257

    def __init__(self) -> None:
        self._ids = {token: 256 + place for place, token in enumerate(self.SPECIALS)}
        special_ids = frozenset(self._ids.values())
        table = [bytes([byte]) for byte in range(256)] + [token.encode() for token in self._ids]
        names = {"bos_token": self.SPECIALS[0], "eos_token": self.SPECIALS[1]}
        super().__init__(
            ByteTable.of(table, special_ids, strips_leading_space=False),
            special_ids,
            (self.EOS,),
            ChatTemplate({"default": BYTE_TEMPLATE}, names),
        )
        self._split = re.compile(f"({'|'.join(map(re.escape, self.SPECIALS))})").split

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        start = [self.BOS] if add_special_tokens else []
        return [
            start + [id for piece in self._split(text) for id in self._piece(piece)]
            for text in texts
        ]

    def _piece(self, piece: str) -> Sequence[int]:
        special = self._ids.get(piece)
        return piece.encode() if special is None else (special,)


class IdTokenizer(Tokenizer):
    """For a model that comes without a tokenizer: ids in, ids out, and no text."""

    def __init__(self, vocabulary: int) -> None:
        none: frozenset[int] = frozenset()
        table = ByteTable.of([b""] * vocabulary, none, strips_leading_space=False)
        super().__init__(table, none, (), None)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        raise RequestRefused(
            "this model has no tokenizer.json: give token ids instead of text", "prompt"
        )


def open_tokenizer(folder: str | None, vocabulary: int) -> Tokenizer:
    """The tokenizer of a model folder, for ids below `vocabulary`.

    A folder without one serves ids only, and says so; None (no model at all) is the built-in one.
    Raises StartFailed.
    """
    if folder is None:
        return ByteTokenizer()
    if not (Path(folder) / TOKENIZER_FILE).is_file():
        logger.warning("%s has no %s: token ids only, no text", folder, TOKENIZER_FILE)
        return IdTokenizer(vocabulary)
    return HfTokenizer.load(Path(folder))
