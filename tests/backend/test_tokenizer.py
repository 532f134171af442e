from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as Inner,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from backend.interface import ModelBroken, ModelNotFound, RequestRefused, Unsupported
from backend.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer, open_tokenizer
from engine.text import decode

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "def add(first, second):\n    return first + second\n",
    "Größe, naïve café, façade; 你好、世界。 こんにちは 🙂🙂",
] * 4
TEXTS = [
    "",
    " ",
    "Hello, world! The lazy dog.",
    "  two  spaces, a tab\t and\n\n\nlines  ",
    "你好、世界 — naïve café 🙂👩‍👩‍👧 \u0301",
    "<s>spelled out</s> <|user|> <tool>x</tool>",
    "ก ไม่อยู่ในคลัง \x00\x7f",
]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False},
}


def byte_level() -> Inner:
    """A GPT-2 style vocabulary that adds nothing to a prompt."""
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<s>", "</s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("</tool>")])
    return inner


def sentencepiece() -> Inner:
    """A Llama 2 style vocabulary: byte fallback, a dummy space in front, <s> added to a prompt."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Inner(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=200, limit_alphabet=60, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [(left, right) for left, right in model["merges"]]
    inner = Inner(
        models.BPE(
            vocab={token: id for id, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    inner.normalizer = normalizer
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>"])
    return inner


load_once = cache(HfTokenizer.load)


def write(folder: Path, inner: Inner, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | (config or {})))
    return folder


def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def assert_encodes_as_transformers_does(folder: Path) -> None:
    ours, theirs = HfTokenizer.load(folder), oracle(folder)
    for special in (True, False):
        wanted = [theirs.encode(text, add_special_tokens=special) for text in TEXTS]
        assert ours.encode_batch(TEXTS, add_special_tokens=special) == wanted
        assert [ours.encode(text, add_special_tokens=special) for text in TEXTS] == wanted


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("byte_level"), byte_level())


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sentencepiece"), sentencepiece())


KINDS = pytest.mark.parametrize("kind", ["byte_level_folder", "sentencepiece_folder"])


@KINDS
def test_ids_equal_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    assert_encodes_as_transformers_does(request.getfixturevalue(kind))


def test_ids_equal_transformers_for_the_small_model(small_model: Path) -> None:
    assert_encodes_as_transformers_does(small_model)
    assert open_tokenizer(str(small_model), 49152).stop_ids == (2,)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("flag", [True, False])
def test_the_post_processor_decides_what_a_prompt_gets_whatever_add_bos_token_says(
    make: Callable[[], Inner], flag: bool, tmp_path: Path
) -> None:
    write(tmp_path, make(), {"add_bos_token": flag, "add_eos_token": flag})
    assert_encodes_as_transformers_does(tmp_path)


def test_truncation_and_padding_in_the_file_do_not_touch_a_prompt(tmp_path: Path) -> None:
    inner = byte_level()
    inner.enable_truncation(4)
    inner.enable_padding(length=16)
    write(tmp_path, inner)
    assert_encodes_as_transformers_does(tmp_path)


def test_a_token_that_only_the_configuration_calls_special_is_special(tmp_path: Path) -> None:
    config = {"pad_token": "brown", "additional_special_tokens": ["lazy"]}
    folder = write(tmp_path, byte_level(), config)
    assert_encodes_as_transformers_does(folder)
    ours = HfTokenizer.load(folder)
    for word in ("brown", "lazy"):
        assert ours.special_ids.issuperset(ours.encode(word))


def test_special_tokens_of_an_older_folder_are_read_from_their_own_file(tmp_path: Path) -> None:
    write(tmp_path, byte_level(), {"eos_token": "<s>"})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    assert list(HfTokenizer.load(tmp_path).stop_ids) == [oracle(tmp_path).eos_token_id]


def test_special_and_stop_ids_are_those_of_the_files(byte_level_folder: Path) -> None:
    ours = HfTokenizer.load(byte_level_folder)
    assert ours.special_ids == {0, 1, 2}
    assert ours.stop_ids == (1,)
    assert not ours.has_chat_template


@given(text=st.text())
def test_bytes_of_a_byte_level_encoding_are_the_text(text: str, byte_level_folder: Path) -> None:
    ours = load_once(byte_level_folder)
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.bytes_of, ids)) == text.encode()


@given(text=st.text(min_size=1).filter(lambda text: "▁" not in text and "<" not in text))
def test_bytes_of_a_sentencepiece_encoding_are_a_space_and_the_text(
    text: str, sentencepiece_folder: Path
) -> None:
    ours = load_once(sentencepiece_folder)
    ids = ours.encode(text, add_special_tokens=False)
    assert b"".join(map(ours.bytes_of, ids)) == b" " + text.encode()
    assert ours.strips_leading_space


def test_an_added_token_stands_for_its_own_text_even_in_the_letters_of_the_byte_alphabet(
    tmp_path: Path,
) -> None:
    inner = byte_level()
    inner.add_tokens(["<é>", "a b"])
    ours = HfTokenizer.load(write(tmp_path, inner))
    for content in ("<tool>", "<é>", "a b"):
        (id,) = ours.encode(content)
        assert ours.bytes_of(id) == content.encode()
        assert id not in ours.special_ids


@pytest.mark.parametrize("config", [{"vocab_size": 500}, {"text_config": {"vocab_size": 500}}])
def test_the_table_covers_a_padded_vocabulary(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, byte_level())
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = HfTokenizer.load(tmp_path)
    assert ours.vocabulary == 500
    assert ours.bytes_of(499) == b""


@pytest.mark.parametrize(
    ("decoder", "strips"),
    [
        (decoders.Metaspace(prepend_scheme="always"), True),
        (decoders.Metaspace(prepend_scheme="never"), False),
        (
            decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            ),
            False,
        ),
    ],
)
def test_other_sentencepiece_decoders_say_whether_a_leading_space_goes(
    decoder: Any, strips: bool, tmp_path: Path
) -> None:
    inner = sentencepiece()
    inner.decoder = decoder
    assert HfTokenizer.load(write(tmp_path, inner)).strips_leading_space is strips


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Metaspace(replacement="_"), "Metaspace"),
        (decoders.Sequence([decoders.Replace(Regex("▁"), " "), decoders.Fuse()]), "Replace"),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]), "Strip"),
        (None, "none"),
    ],
)
def test_a_decoder_that_is_no_table_of_bytes_is_refused_by_name(
    decoder: Any, name: str, tmp_path: Path
) -> None:
    inner = byte_level()
    inner.decoder = decoder
    with pytest.raises(Unsupported, match=name):
        HfTokenizer.load(write(tmp_path, inner))


def test_a_folder_without_a_tokenizer_serves_ids_only_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelNotFound, match=f"{tmp_path} has no tokenizer.json"):
        HfTokenizer.load(tmp_path)
    ours = open_tokenizer(str(tmp_path), 1000)
    assert "token ids only" in caplog.text
    assert decode(ours, [0, 500, 999]) == ""
    with pytest.raises(RequestRefused, match="give token ids") as refused:
        ours.encode("hi")
    assert refused.value.param == "prompt"
    with pytest.raises(RequestRefused, match="no chat template"):
        ours.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"version": "1.0", "mod'),
        ("tokenizer_config.json", b'{"bos_token": '),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("tokenizer_config.json", b'{"chat_template": "{% for %}"}'),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_broken_file_is_refused_with_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    write(tmp_path, byte_level())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelBroken) as caught:
        HfTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("open_it", [ByteTokenizer, lambda: HfTokenizer(byte_level(), {}, {}, 0)])
def test_text_that_is_not_unicode_is_refused(open_it: Callable[[], Tokenizer]) -> None:
    with pytest.raises(RequestRefused, match="character 3") as caught:
        open_it().encode("abc\ud800")
    assert caught.value.param == "prompt"


@given(text=st.text().filter(lambda text: "<" not in text))  # no special token
@example(text="<|im_start")
def test_the_built_in_tokenizer_spells_text_in_bytes(text: str) -> None:
    ours = ByteTokenizer()
    assert bytes(ours.encode(text, add_special_tokens=False)) == text.encode()
    assert ours.encode(text) == [ByteTokenizer.BOS, *text.encode()]


def test_the_built_in_tokenizer_renders_and_reads_its_own_special_tokens() -> None:
    ours = open_tokenizer(None, 260)
    prompt = ours.render([{"role": "user", "content": "hi"}])
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = ours.encode(prompt, add_special_tokens=False)
    assert [id for id in ids if id > 255] == [258, 259, 258]
    assert b"".join(map(ours.bytes_of, ids)) == prompt.encode()
    assert ours.special_ids == {256, 257, 258, 259}
    assert ours.stop_ids == (257,)
    assert ours.vocabulary == 260
