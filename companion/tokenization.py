"""Text to token ids and back, without loss.

A tokenizer first cuts text into pieces (words, digits, line breaks with their indentation), then
spells each piece in bytes and merges neighbouring bytes into longer tokens, in the order in which
the merges were learned: byte-pair encoding, arXiv:1508.07909. As all 256 bytes are tokens, no text
is unknown. One more token marks the end of a text; no text encodes to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from companion.checks import require, require_whole
from companion.storage import write_whole

END = "<|end|>"  # how the tokenizers that we train spell the end of a text

PIECES = "|".join(
    [
        r"\n+[ \t]*",  # line breaks with the indentation that follows
        r" ?[A-Za-z]+",  # a word with the space before it
        r" ?[0-9]",  # every digit alone, so that numbers have one spelling
        r" ?[^\sA-Za-z0-9]+",  # other signs, and letters beyond ASCII
        r"[^\S\n]+",  # other white space
    ]
)


class Tokenizer:
    """A `tokenizers.Tokenizer` whose one special token marks the end of a text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises ValueError unless the backend has exactly one special token."""
        added = backend.get_added_tokens_decoder()
        special = [index for index, token in added.items() if token.special]
        require(len(special) == 1, f"there are {len(special)} special tokens; one is expected")
        backend.encode_special_tokens = True  # its spelling within a text is text like any other
        self.backend = backend
        self.end = special[0]  # id of the token that ends a text
        self.vocab = backend.get_vocab_size()  # number of different ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text; `decode` gives the same text back. Raises ValueError for anything else."""
        _check_text(text)
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Bytes that are no whole UTF-8 character become U+FFFD.

        Raises ValueError for an id outside 0 to vocab - 1.
        """
        ids = list(map(int, ids))
        outside = [index for index in ids if not 0 <= index < self.vocab]
        require(not outside, f"token ids {outside[:5]} are outside 0 to {self.vocab - 1}")
        return self.backend.decode(ids, skip_special_tokens=False)

    def byte_length(self, index: int) -> int:
        """Bytes of UTF-8 one token stands for; byte-level tokens spell each byte as a character."""
        return 0 if index == self.end else len(self.backend.id_to_token(index))

    def save(self, path: str | Path) -> Path:
        """Write the format of the `tokenizers` library; the file appears whole or not at all."""
        text = self.backend.to_str(pretty=True)
        return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote. Raises FileNotFoundError, or ValueError for a damaged file."""
        data = Path(path).read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is damaged ({error}); restore or retrain it") from error
        return cls(backend)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab={self.vocab}, end={self.end})"


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Learn byte-pair merges from texts until there are `vocab` tokens, the end (id 0) among them.

    The same texts give the same tokenizer. Raises ValueError for a `vocab` below 257 (bytes and
    end), for one that the texts cannot fill, and for a text that is no string.
    """
    require_whole("vocab", vocab, least=257)
    backend = tokenizers.Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_checked(texts), trainer)
    learned = backend.get_vocab_size()
    require(learned == vocab, f"vocab is {vocab}, but these texts give only {learned} tokens")
    return Tokenizer(backend)


def _check_text(text: object) -> None:
    require(isinstance(text, str), f"text is of type {type(text).__name__}; a str is expected")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has no UTF-8 spelling at character {error.start}: {error}"
        ) from None


def _checked(texts: Iterable[str]) -> Iterator[str]:
    require(not isinstance(texts, str), "texts is one str; several texts are expected")
    for text in texts:
        _check_text(text)
        yield text
