"""AlbertTokenizer: text -> ids, as ALBERT's sentencepiece vocabulary does it.

The clean-up before sentencepiece is transformers': `` and '' become ", NFKD, accents dropped, lower case. The released
models saw one rule more: a piece that ends in a comma after a digit ("▁2000,") is split again into the digits and ",".
transformers 5 dropped it, and ids equal to its ids are what most users want; `split_digit_comma=True` brings it back.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import unicodedata
import uuid
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import sentencepiece

from albert_fast import vocabulary
from albert_fast.vocabulary import SPECIAL_TOKENS, TokenizerError

if TYPE_CHECKING:
    import torch

MODEL_NAMES = ("spiece.model", "spm.model", "tokenizer.model")
TRUNCATIONS = ("longest_first", "only_first", "only_second")

# Before sentencepiece 0.2.1 the offsets came under another name.
_WITH_OFFSETS: dict[str, Any] = (
    {"return_type": "proto"}
    if "return_type" in inspect.signature(sentencepiece.SentencePieceProcessor.encode).parameters
    else {"out_type": "immutable_proto"}
)


class BatchEncoding(dict):
    """What the tokenizer returns: a dict whose keys are attributes too, and whose tensors move together."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name!r} here, only {', '.join(self)}") from None

    def __getstate__(self) -> dict[str, Any]:
        return dict(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)

    def to(self, device: torch.device | str) -> BatchEncoding:
        """The same with its tensors on `device`."""
        return BatchEncoding({k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()})


class _Tokens(NamedTuple):
    """One text: its ids, where each came from, and in a list of words which word."""

    ids: list[int]
    offsets: list[tuple[int, int]] | None
    words: list[int] | None

    def part(self, start: int, end: int) -> _Tokens:
        offsets = None if self.offsets is None else self.offsets[start:end]
        return _Tokens(self.ids[start:end], offsets, None if self.words is None else self.words[start:end])


class AlbertTokenizer:
    """Text to ids and back.

    Args:
        model: a sentencepiece .model file, or its content.
        do_lower_case: lower the case.
        keep_accents: keep accents and compatibility characters (no NFKD).
        split_digit_comma: the original's rule, see above.

    Raises:
        TokenizerError: the model is missing, damaged, or lacks a special token.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        do_lower_case: bool = True,
        keep_accents: bool = False,
        split_digit_comma: bool = False,
    ) -> None:
        name = "the model" if isinstance(model, bytes) else os.fspath(model)
        try:
            self._model = model if isinstance(model, bytes) else Path(model).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{name} cannot be read ({error.strerror}): give a sentencepiece .model file"
            ) from error
        try:
            self._spm = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (RuntimeError, ValueError) as error:
            raise TokenizerError(f"{name} is no sentencepiece model, or damaged ({error}): fetch it anew") from error
        self.do_lower_case = do_lower_case
        self.keep_accents = keep_accents
        self.split_digit_comma = split_digit_comma
        unknown = self._spm.unk_id()
        ids = {token: self._spm.piece_to_id(token) for token in SPECIAL_TOKENS}
        missing = [token for token, i in ids.items() if i >= len(self) or self._spm.id_to_piece(i) != token]
        if missing:
            raise TokenizerError(f"{name} has no {', '.join(missing)}: train it with vocabulary.ALBERT_OPTIONS")
        self.pad_token_id, self.unk_token_id = ids["<pad>"], unknown
        self.cls_token_id, self.sep_token_id, self.mask_token_id = ids["[CLS]"], ids["[SEP]"], ids["[MASK]"]
        self._special = {token: ids[token] for token in SPECIAL_TOKENS}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")

    # ------------------------------------------------------------------------------------------------ files and pieces

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Any) -> AlbertTokenizer:
        """From a Hugging Face directory: spiece.model, or the vocabulary in tokenizer.json; tokenizer_config.json is
        obeyed.

        `options` are the constructor's and take precedence.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise TokenizerError(f"{directory} is not a directory: give a local one, nothing is downloaded")
        settings: dict[str, Any] = {}
        config = directory / "tokenizer_config.json"
        if config.is_file():
            try:
                found = json.loads(config.read_text(encoding="utf-8"))
                settings = {k: found[k] for k in ("do_lower_case", "keep_accents", "split_digit_comma") if k in found}
            except (ValueError, TypeError) as error:
                raise TokenizerError(f"{config} is not valid JSON ({error}): fetch it anew") from error
        models = [directory / name for name in MODEL_NAMES if (directory / name).is_file()]
        models += sorted(directory.glob("*.model"))
        if models:
            return cls(models[0], **{**settings, **options})
        if (directory / "tokenizer.json").is_file():
            return cls(vocabulary.from_tokenizer_json(directory / "tokenizer.json"), **{**settings, **options})
        raise TokenizerError(f"{directory} has no vocabulary: looked for {', '.join(MODEL_NAMES)} and tokenizer.json")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes spiece.model, tokenizer.json and tokenizer_config.json, for this class and for transformers."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "AlbertTokenizer",
            "do_lower_case": self.do_lower_case,
            "keep_accents": self.keep_accents,
            "split_digit_comma": self.split_digit_comma,
        }
        tokenizer_json = vocabulary.to_tokenizer_json(
            self._model, do_lower_case=self.do_lower_case, keep_accents=self.keep_accents
        )
        files = {
            "spiece.model": self._model,
            "tokenizer.json": tokenizer_json.encode(),
            "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
        }
        for name, content in files.items():
            temporary = directory / f".{name}.{uuid.uuid4().hex}.tmp"
            try:
                temporary.write_bytes(content)
                temporary.replace(directory / name)
            finally:
                temporary.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_spm"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._spm = sentencepiece.SentencePieceProcessor(model_proto=self._model)

    @property
    def vocab_size(self) -> int:
        return self._spm.get_piece_size()

    def __len__(self) -> int:
        return self.vocab_size

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        if isinstance(tokens, str):
            return self._spm.piece_to_id(tokens)
        return [self._spm.piece_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        if isinstance(ids, int):
            return self._spm.id_to_piece(self._checked(ids))
        return [self._spm.id_to_piece(self._checked(int(i))) for i in ids]

    def _checked(self, i: int) -> int:
        if not 0 <= i < self.vocab_size:
            raise IndexError(f"ids holds {i}; 0 to {self.vocab_size - 1} was expected")
        return i

    @staticmethod
    def num_special_tokens_to_add(pair: bool = False) -> int:
        return 3 if pair else 2

    # --------------------------------------------------------------------------------------------------- text -> pieces

    def clean(self, text: str) -> str:
        """The text as sentencepiece gets it."""
        text = text.replace("``", '"').replace("''", '"')
        if not text.isascii():
            if not self.keep_accents:
                text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
            text = text.replace("Σ", "σ") if self.do_lower_case else text  # str.lower() would look at the neighbours
        return text.lower() if self.do_lower_case else text

    def _clean_with_origins(self, text: str) -> tuple[str, list[int], list[int]]:
        """`clean`, and for each byte of the result in UTF-8 the characters [start, end) of `text` that it came from."""
        cleaned, starts, ends = [], [], []
        i = 0
        while i < len(text):
            width = 2 if text[i : i + 2] in ("``", "''") else 1
            for c in self.clean(text[i : i + width]):
                cleaned.append(c)
                starts += [i] * len(c.encode())
                ends += [i + width] * len(c.encode())
            i += width
        return "".join(cleaned), starts, ends

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text, without special tokens around it."""
        pieces: list[str] = []
        for i, part in enumerate(self._special_pattern.split(_checked_text("text", text))):
            pieces += [part] if i % 2 else self._pieces(part)
        return pieces

    def _pieces(self, text: str) -> list[str]:
        pieces = self._spm.encode(self.clean(text), out_type=str)
        if not self.split_digit_comma:
            return pieces
        return [part for piece in pieces for part in self._split_comma(piece)]

    def _split_comma(self, piece: str) -> list[str]:
        if len(piece) < 2 or piece[-1] != "," or not piece[-2].isdigit():
            return [piece]
        parts = self._spm.encode(piece[:-1].replace("▁", ""), out_type=str)
        if not piece.startswith("▁") and parts[0].startswith("▁"):
            parts = [parts[0][1:], *parts[1:]] if len(parts[0]) > 1 else parts[1:]
        return [*parts, ","]

    def _ids(self, text: str) -> list[int]:
        """Ids of a text without special tokens in it."""
        if self.split_digit_comma:
            return [self._spm.piece_to_id(piece) for piece in self._pieces(text)]
        return self._spm.encode(self.clean(text))

    def _ids_and_offsets(self, text: str, base: int) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, and the characters [start, end) of each piece, counted from `base`."""
        cleaned, starts, ends = self._clean_with_origins(text)
        ids, offsets = [], []
        for piece in self._spm.encode(cleaned, **_WITH_OFFSETS).pieces:
            start, end = piece.begin, piece.end
            # A piece owns the blanks before it; the span is of what can be seen. A blank alone stands for what follows.
            while start < len(starts) and text[starts[start]].isspace():
                start += 1
            if start >= len(starts):
                continue
            span = (base + starts[start], base + ends[max(start, end - 1)])
            parts = self._split_comma(piece.piece) if self.split_digit_comma else ()
            if len(parts) > 1:
                comma = (span[1] - 1, span[1])
                ids += [self._spm.piece_to_id(part) for part in parts]
                lengths = [len(part.replace("▁", "")) for part in parts[:-1]]
                begins = [span[0] + sum(lengths[:i]) for i in range(len(lengths))]
                offsets += [*((begin, begin + n) for begin, n in zip(begins, lengths, strict=True)), comma]
            else:
                ids.append(piece.id)
                offsets.append(span)
        return ids, offsets

    def _tokens(self, text: str, with_offsets: bool) -> _Tokens:
        parts = self._special_pattern.split(text)
        if len(parts) == 1 and not with_offsets:
            return _Tokens(self._ids(text), None, None)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self._special[part])
                offsets.append((position, position + len(part)))
            elif with_offsets:
                found, spans = self._ids_and_offsets(part, position)
                ids += found
                offsets += spans
            else:
                ids += self._ids(part)
            position += len(part)
        return _Tokens(ids, offsets if with_offsets else None, None)

    def _word_tokens(self, words: Sequence[str], with_offsets: bool) -> _Tokens:
        """Pre-split text: offsets count within each word."""
        parts = [self._tokens(_checked_text("words", word), with_offsets) for word in words]
        numbers = [i for i, part in enumerate(parts) for _ in part.ids]
        offsets = [span for part in parts for span in part.offsets or ()] if with_offsets else None
        return _Tokens([i for part in parts for i in part.ids], offsets, numbers)

    def _batch_tokens(self, texts: Sequence[Any], split: bool, with_offsets: bool, name: str) -> list[_Tokens]:
        if split:
            return [self._word_tokens(words, with_offsets) for words in texts]
        for text in texts:
            _checked_text(name, text)
        plain = not with_offsets and not self.split_digit_comma
        if not plain or any(self._special_pattern.search(text) for text in texts):
            return [self._tokens(text, with_offsets) for text in texts]
        return [_Tokens(ids, None, None) for ids in self._spm.encode([self.clean(text) for text in texts])]

    # --------------------------------------------------------------------------------------------------- text ->
    # batches

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> list[int]:
        """The ids of one text or pair, `[CLS] A [SEP] B [SEP]`; options as `__call__`."""
        return self(text, text_pair, **options)["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        text_pair: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        stride: int = 0,
        return_overflowing_tokens: bool = False,
        pad_to_multiple_of: int | None = None,
        is_split_into_words: bool = False,
        return_tensors: str | None = None,
        return_token_type_ids: bool = True,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        return_word_ids: bool = False,
        return_length: bool = False,
    ) -> BatchEncoding:
        """One text, or a batch of them, or of pairs.

        Args:
            text: a str, or a list of them; with is_split_into_words a list of words, or a list of such lists.
            text_pair: the same for the second segment.
            add_special_tokens: `[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`.
            padding: True or "longest" to the longest of the batch, "max_length" to max_length.
            truncation: True or "longest_first" takes from the longer of a pair, "only_first", "only_second".
            max_length: in tokens, the special ones included.
            stride: tokens that neighbouring windows share, with return_overflowing_tokens.
            return_overflowing_tokens: what does not fit becomes further rows; overflow_to_sample_mapping says of
                which text.
            pad_to_multiple_of: padding goes on to a multiple of this.
            return_tensors: "pt" for torch, "np" for numpy, None for lists.
            return_offsets_mapping: offset_mapping, the characters [start, end) of each token in the text as it was
                given (within the word, for words), (0, 0) for special tokens.
            return_word_ids: word_ids, the word of each token, -1 for special tokens; with is_split_into_words.

        Returns:
            BatchEncoding: input_ids, token_type_ids (0 first, 1 second segment), attention_mask (0 at padding), and
            what was asked for; [batch, length] for a batch, [length] for one text without return_tensors.

        Raises:
            TypeError, TokenizerError: an argument does not fit; the message names it.
        """
        single = _is_single(text, is_split_into_words)
        texts: Sequence[Any] = [text] if single else list(text)
        pairs: Sequence[Any] | None = None
        if text_pair is not None:
            if _is_single(text_pair, is_split_into_words) != single:
                raise TypeError("text and text_pair must both be one text or both lists of texts")
            pairs = [text_pair] if single else list(text_pair)
            if len(pairs) != len(texts):
                raise TokenizerError(f"text has {len(texts)} entries and text_pair {len(pairs)}; as many were expected")
        if return_word_ids and not is_split_into_words:
            raise TokenizerError("return_word_ids needs is_split_into_words=True and lists of words")
        special = self.num_special_tokens_to_add(pairs is not None) if add_special_tokens else 0
        rule = _truncation_rule(truncation, max_length, special, stride, return_overflowing_tokens, pairs is not None)
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise TokenizerError(f"padding is {padding!r}; False, True, 'longest' or 'max_length' was expected")
        if padding == "max_length" and max_length is None:
            raise TokenizerError("padding is 'max_length' and max_length is None: say how long")
        if return_tensors not in (None, "pt", "np"):
            raise TokenizerError(f"return_tensors is {return_tensors!r}; None, 'pt' or 'np' was expected")

        first = self._batch_tokens(texts, is_split_into_words, return_offsets_mapping, "text")
        second: list[_Tokens] | list[None] = [None] * len(first)
        if pairs is not None:
            second = self._batch_tokens(pairs, is_split_into_words, return_offsets_mapping, "text_pair")
        rows: list[tuple[int, _Tokens, _Tokens | None]] = []
        for sample, (a, b) in enumerate(zip(first, second, strict=True)):
            if rule is None or max_length is None:
                rows.append((sample, a, b))
                continue
            windows = _truncated(a, b, rule, max_length - special, stride, return_overflowing_tokens)
            rows += [(sample, *window) for window in windows]

        wanted = {
            "input_ids": (True, self.pad_token_id),
            "token_type_ids": (return_token_type_ids, 0),
            "attention_mask": (return_attention_mask, 0),
            "special_tokens_mask": (return_special_tokens_mask, 1),
            "offset_mapping": (return_offsets_mapping, (0, 0)),
            "word_ids": (return_word_ids, -1),
        }
        columns: dict[str, list[Any]] = {
            name: [self._column(name, a, b, add_special_tokens) for _, a, b in rows]
            for name, (on, _) in wanted.items()
            if on
        }
        lengths = [len(ids) for ids in columns["input_ids"]]
        length = 0
        if padding in (True, "longest"):
            length = max(lengths, default=0)
        elif padding == "max_length":
            length = max_length or 0
        if padding not in (False, "do_not_pad"):
            multiple = pad_to_multiple_of or 1
            length = -(-length // multiple) * multiple
        for name, column in columns.items():
            columns[name] = [values + [wanted[name][1]] * (length - len(values)) for values in column]
        if return_length:
            columns["length"] = lengths
        if return_overflowing_tokens:
            columns["overflow_to_sample_mapping"] = [sample for sample, _, _ in rows]
        if return_tensors is not None:
            return BatchEncoding({name: _tensor(name, column, return_tensors) for name, column in columns.items()})
        if single and not return_overflowing_tokens:
            return BatchEncoding({name: column[0] for name, column in columns.items()})
        return BatchEncoding(columns)

    def _column(self, name: str, a: _Tokens, b: _Tokens | None, specials: bool) -> list[Any]:
        """One row of one output, with the values of the special tokens between."""

        def joined(first: list[Any], second: list[Any] | None, cls: Any, sep: Any, last: Any) -> list[Any]:
            if not specials:
                return first + (second or [])
            return [cls, *first, sep] + ([] if second is None else [*second, last])

        zero = (0, 0)
        if name == "input_ids":
            return joined(a.ids, b and b.ids, self.cls_token_id, self.sep_token_id, self.sep_token_id)
        if name == "offset_mapping":
            return joined(a.offsets or [], b and b.offsets, zero, zero, zero)
        if name == "word_ids":
            return joined(a.words or [], b and b.words, -1, -1, -1)
        if name == "token_type_ids":
            return joined([0] * len(a.ids), b and [1] * len(b.ids), 0, 0, 1)
        if name == "special_tokens_mask":
            return joined([0] * len(a.ids), b and [0] * len(b.ids), 1, 1, 1)
        return joined([1] * len(a.ids), b and [1] * len(b.ids), 1, 1, 1)

    # ---------------------------------------------------------------------------------------------------- ids -> text

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of ids (a list, or a 1-D tensor or array): lower-cased and without accents, as it was read."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        special = set(self._special.values())
        parts: list[str] = []
        run: list[int] = []
        for i in [*ids, None]:
            if i is not None and self._checked(i) not in special:
                run.append(i)
                continue
            if run:
                parts.append(self._spm.decode(run))
                run = []
            if i is not None and not skip_special_tokens:
                parts.append(self._spm.id_to_piece(i))
        return " ".join(part for part in parts if part)

    def batch_decode(self, batch: Any, skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each row."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]


def train_vocabulary(
    texts: Iterable[str],
    directory: str | os.PathLike[str],
    *,
    vocab_size: int = 30000,
    do_lower_case: bool = True,
    keep_accents: bool = False,
    **options: Any,
) -> AlbertTokenizer:
    """Trains a vocabulary as ALBERT's was, and saves it.

    Args:
        texts: texts of any length; their lines are the trainer's sentences.
        directory: where spiece.model and tokenizer_config.json go.
        vocab_size: number of pieces, the five special ones included.
        options: of sentencepiece's trainer, in place of `vocabulary.ALBERT_OPTIONS`.

    Raises:
        TokenizerError: there is too little text.
    """
    # Its clean-up is asked for before it has a vocabulary.
    cleaner = AlbertTokenizer.__new__(AlbertTokenizer)
    cleaner.do_lower_case, cleaner.keep_accents = do_lower_case, keep_accents
    model = vocabulary.train((cleaner.clean(text) for text in texts), vocab_size=vocab_size, **options)
    tokenizer = AlbertTokenizer(model, do_lower_case=do_lower_case, keep_accents=keep_accents)
    tokenizer.save_pretrained(directory)
    if not keep_accents:
        _warn_of_transformers(tokenizer)
    return tokenizer


def _warn_of_transformers(tokenizer: AlbertTokenizer) -> None:
    """transformers' class takes characters apart, syllables of Hangul and vowels of Indic scripts, and does not put
    them together again, as sentencepiece does: it would not find pieces that have them."""
    apart = {
        c
        for piece in map(tokenizer._spm.id_to_piece, range(tokenizer.vocab_size))
        for c in piece
        if not c.isascii() and (unicodedata.normalize("NFKD", c) != c or unicodedata.category(c) in ("Mc", "Me"))
    }
    if apart:
        warnings.warn(
            f"transformers' AlbertTokenizer will not find the pieces that have {' '.join(sorted(apart)[:10])}: its "
            "clean-up takes such characters apart. Texts in this script want keep_accents=True (--keep-accents)",
            stacklevel=3,
        )


def _checked_text(name: str, text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} holds {type(text).__name__} {text!r:.60}; str was expected")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"{name} has half a surrogate pair at character {error.start}: it was decoded wrongly; read it as UTF-8"
        ) from error
    return text


def _is_single(text: Any, split: bool) -> bool:
    if isinstance(text, str):
        if split:
            raise TypeError("text is a str; is_split_into_words=True needs a list of words")
        return True
    if not isinstance(text, list | tuple):
        raise TypeError(f"text is {type(text).__name__}; str or a list was expected")
    return split and all(isinstance(word, str) for word in text)


def _truncation_rule(
    truncation: bool | str, max_length: int | None, special: int, stride: int, overflow: bool, pair: bool
) -> str | None:
    """The rule's name, or None; raises for what does not go together."""
    rule = "longest_first" if truncation is True else truncation
    if rule in (False, "do_not_truncate"):
        if overflow:
            raise TokenizerError("return_overflowing_tokens needs truncation and max_length")
        return None
    if rule not in TRUNCATIONS:
        raise TokenizerError(
            f"truncation is {truncation!r}; True, False or one of {', '.join(TRUNCATIONS)} was expected"
        )
    if max_length is None:
        raise TokenizerError(f"truncation is {truncation!r} and max_length is None: say how long")
    if max_length < special:
        raise TokenizerError(f"max_length is {max_length}; at least {special}, the special tokens, was expected")
    if rule == "only_second" and not pair:
        raise TokenizerError("truncation is 'only_second' and there is no text_pair")
    if overflow and pair and rule == "longest_first":
        raise TokenizerError("return_overflowing_tokens of pairs needs truncation='only_first' or 'only_second'")
    if stride < 0:
        raise TokenizerError(f"stride is {stride}; at least 0 was expected")
    return str(rule)


def _truncated(
    a: _Tokens, b: _Tokens | None, rule: str, room: int, stride: int, overflow: bool
) -> list[tuple[_Tokens, _Tokens | None]]:
    """The pair cut to `room` tokens; with `overflow` also the windows of what was cut off."""
    size_a, size_b = len(a.ids), 0 if b is None else len(b.ids)
    if size_a + size_b <= room:
        return [(a, b)]
    if b is not None and rule == "longest_first":
        # The shorter one stays whole as long as the longer stays longer; then both get half, the odd one to the longer.
        short, long = sorted((size_a, size_b))
        long = max(short, room - short)
        if short + long > room:
            short, long = room // 2, room - room // 2
        keep_a, keep_b = (long, short) if size_a > size_b else (short, long)
        return [(a.part(0, keep_a), b.part(0, keep_b))]
    second = rule == "only_second"
    cut, other = (b, size_a) if second else (a, size_b)
    assert cut is not None
    width = room - other
    if width <= 0:
        names = ("text_pair", "text") if second else ("text", "text_pair")
        raise TokenizerError(
            f"truncation is {rule!r} and {names[1]} alone has {other} tokens, which leaves no room for {names[0]}: "
            "raise max_length or choose another rule"
        )
    if not overflow:
        windows = [cut.part(0, width)]
    else:
        if stride >= width:
            raise TokenizerError(f"stride is {stride}; less than the {width} tokens of a window was expected")
        windows = []
        for start in range(0, len(cut.ids), width - stride):
            windows.append(cut.part(start, start + width))
            if start + width >= len(cut.ids):
                break
    return [(a, window) if second else (window, b) for window in windows]


def _tensor(name: str, rows: list[Any], kind: str) -> Any:
    lengths = {len(row) for row in rows if isinstance(row, list)}
    if len(lengths) > 1:
        raise TokenizerError(
            f"{name} has rows of {min(lengths)} to {max(lengths)} tokens and return_tensors is {kind!r}: "
            "pass padding=True"
        )
    if kind == "np":
        import numpy as np

        return np.array(rows, dtype=np.int64)
    import torch

    return torch.tensor(rows, dtype=torch.int64)
