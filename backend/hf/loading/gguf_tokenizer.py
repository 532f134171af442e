"""tokenizer.json and tokenizer_config.json from the metadata of a GGUF.

Two kinds: byte-level BPE ("gpt2"), where the file names a pre-tokenizer that is looked up here, and
sentencepiece BPE ("llama"), where the merges follow from the scores of the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers as pre,
)
from tokenizers.processors import TemplateProcessing

from backend.hf.loading.gguf_config import CONTROL, token_ids
from backend.hf.loading.gguf_file import GgufFile
from backend.interface import ModelBroken, StartFailed, Unsupported

NORMAL, UNKNOWN, USER_DEFINED, UNUSED = 1, 2, 4, 5  # in tokenizer.ggml.token_type, beside CONTROL
SPACE = "\u2581"  # sentencepiece's mark for a space

# How a text is cut into words before byte-level BPE; published in the tokenizer.json of the family.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class ByteLevel:
    """What a name in `tokenizer.ggml.pre` stands for."""

    words: str = ""  # regular expression of a word; "": GPT-2's, built into the library
    single_digits: bool = False  # each digit is a word, before GPT-2's expression
    whole_words: bool = False  # a word that is a token needs no merges
    composed: bool = False  # text is brought to Unicode's NFC first
    adds_bos: bool = False  # unless the file says otherwise

    def pre_tokenizer(self) -> pre.PreTokenizer:
        if self.words:
            split = pre.Split(Regex(self.words), behavior="isolated")
            return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
        gpt2 = pre.ByteLevel(add_prefix_space=False, use_regex=True)
        return (
            pre.Sequence([pre.Digits(individual_digits=True), gpt2]) if self.single_digits else gpt2
        )


LLAMA3 = ByteLevel(LLAMA3_WORDS, whole_words=True, adds_bos=True)
PRE_TOKENIZERS: dict[str, ByteLevel] = {
    "default": ByteLevel(),
    "gpt-2": ByteLevel(),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "qwen2": ByteLevel(QWEN2_WORDS, composed=True),
    "smollm": ByteLevel(single_digits=True),
    "starcoder": ByteLevel(single_digits=True),
    "tekken": ByteLevel(TEKKEN_WORDS, whole_words=True, adds_bos=True),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The token lists of the file, parallel, by id."""

    texts: list[str]
    kinds: list[int]

    @classmethod
    def read(cls, file: GgufFile, size: int) -> Vocabulary:
        """Raises ModelBroken when the lists contradict each other or the embedding of `size`."""
        texts = file.get("tokenizer.ggml.tokens", list)
        kinds = file.get("tokenizer.ggml.token_type", list, [NORMAL] * len(texts))
        if len(kinds) != len(texts) or len(texts) > size:
            raise ModelBroken(
                f"{file.path} has {len(texts):,} tokens, {len(kinds):,} token types "
                f"and an embedding of {size:,} rows"
            )
        return cls(texts, kinds)

    def added(self) -> list[AddedToken]:
        """Tokens found in a text as they stand, before anything else; all but the user's own are
        special.
        """
        return [
            AddedToken(text, special=kind != USER_DEFINED, normalized=False)
            for text, kind in zip(self.texts, self.kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ]


def has_tokenizer(file: GgufFile) -> bool:
    """Whether the file brings a tokenizer at all."""
    return file.get("tokenizer.ggml.model", str, "no_vocab") not in ("no_vocab", "none")


def tokenizer(file: GgufFile, size: int) -> Tokenizer:
    """The tokenizer of a model with an embedding of `size` rows.

    Raises Unsupported for a kind or pre-tokenizer that is not known here.
    """
    kind = file.get("tokenizer.ggml.model", str)
    if kind not in BUILDERS:
        raise Unsupported(
            f"{file.path}: tokenizer.ggml.model {kind!r}, only {' and '.join(BUILDERS)} are known"
        )
    vocabulary = Vocabulary.read(file, size)
    try:
        built, adds_bos = BUILDERS[kind](file, vocabulary)
        built.add_tokens(vocabulary.added())
        _frame(file, vocabulary, built, adds_bos)
    except StartFailed:
        raise
    except Exception as error:  # the library raises this bare class for a merge of unknown parts
        reason = " ".join(str(error).split())  # it may quote a token with a line break
        raise ModelBroken(f"{file.path}: its tokenizer does not fit together: {reason}") from error
    return built


def _byte_level(file: GgufFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre", str, "")
    if name not in PRE_TOKENIZERS:
        raise Unsupported(
            f"{file.path}: tokenizer.ggml.pre {name!r}, "
            f"known are {', '.join(PRE_TOKENIZERS)}: use the model's safetensors"
        )
    form = PRE_TOKENIZERS[name]
    ids = {
        text: id
        for id, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds, strict=True))
        if kind != UNUSED  # padding of the embedding
    }
    merges = [_pair(merge) for merge in file.get("tokenizer.ggml.merges", list)]
    built = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=form.whole_words))
    if form.composed:
        built.normalizer = normalizers.NFC()
    built.pre_tokenizer = form.pre_tokenizer()
    built.decoder = decoders.ByteLevel()
    return built, form.adds_bos


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ")
    return left, right


def _sentencepiece(file: GgufFile, vocabulary: Vocabulary) -> tuple[Tokenizer, bool]:
    scores = file.get("tokenizer.ggml.scores", list)
    ids = {text: id for id, text in enumerate(vocabulary.texts)}
    unknown = token_ids(file).get("unk_token_id", 0)
    built = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges(vocabulary, scores, ids),
            unk_token=vocabulary.texts[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    built.normalizer = (
        normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return built, True


def _merges(
    vocabulary: Vocabulary, scores: list[float], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, the best piece first.

    Sentencepiece joins the neighbours whose union scores highest; as ranked merges that is the same
    rule.
    """
    ranked = [
        (-score, ids[text[:cut]], ids[text[cut:]], text, cut)
        for text, kind, score in zip(vocabulary.texts, vocabulary.kinds, scores, strict=True)
        if kind == NORMAL
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(text[:cut], text[cut:]) for *_, text, cut in sorted(ranked)]


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _frame(file: GgufFile, vocabulary: Vocabulary, built: Tokenizer, adds_bos: bool) -> None:
    """Let `built` put the first and end tokens around a prompt, as far as the file wants them."""
    ids = token_ids(file)
    wanted = {
        "bos": file.get("tokenizer.ggml.add_bos_token", bool, adds_bos),
        "eos": file.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    frame = {
        name: vocabulary.texts[ids[f"{name}_token_id"]]
        for name, add in wanted.items()
        if add and f"{name}_token_id" in ids
    }
    bos, eos = frame.get("bos", ""), frame.get("eos", "")
    if frame:
        built.post_processor = TemplateProcessing(
            single=f"{bos} $A {eos}".split(),
            pair=f"{bos} $A {eos} $B:1 {eos}".split(),
            special_tokens=[(text, ids[f"{name}_token_id"]) for name, text in frame.items()],
        )


def tokenizer_config(file: GgufFile, context: int) -> dict[str, Any]:
    """tokenizer_config.json: special tokens by role, and the chat template.

    The class is the generic one: a family's own class would build its own pre-tokenizer.
    """
    texts = file.get("tokenizer.ggml.tokens", list)
    roles = {
        key.replace("_id", ""): texts[id] for key, id in token_ids(file).items() if id < len(texts)
    }
    template = file.get("tokenizer.chat_template", str, "")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **roles,
        **({"chat_template": template} if template else {}),
    }
