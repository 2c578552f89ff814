"""Making sentencepiece models: training one with ALBERT's options, and rebuilding one from a tokenizer.json."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

SPECIAL_TOKENS = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")

# The options of the released vocabulary (google-research/albert, README).
ALBERT_OPTIONS: dict[str, Any] = {
    "model_type": "unigram",
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": -1,
    "eos_id": -1,
    "control_symbols": ["[CLS]", "[SEP]", "[MASK]"],
    "user_defined_symbols": ["(", ")", '"', "-", ".", "–", "£", "€"],
    "character_coverage": 0.99995,
    "shuffle_input_sentence": True,
    "minloglevel": 2,
}


class TokenizerError(ValueError):
    """A vocabulary that cannot be read, trained or used."""


def train(texts: Iterable[str], *, vocab_size: int, **options: Any) -> bytes:
    """Trains a unigram model as ALBERT's was.

    Args:
        texts: lines of text, cleaned up as the tokenizer will clean them.
        vocab_size: number of pieces, the five special ones included.
        options: of sentencepiece's trainer, in place of ALBERT's.

    Returns:
        the content of a .model file.

    Raises:
        TokenizerError: there is too little text for so many pieces, or too few pieces for its characters.
    """

    def lines() -> Iterator[str]:
        for text in texts:
            yield from (line for line in text.splitlines() if line.strip())

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=vocab_size, **{**ALBERT_OPTIONS, **options}
        )
    except (RuntimeError, OSError) as error:
        said = str(error)
        if "KeyboardInterrupt:" in said:  # while it asked for a line
            raise KeyboardInterrupt from None
        if "sentences_.empty()" in said:
            raise TokenizerError("there is no text to train a vocabulary on: give some") from error
        mend = "a larger vocab_size" if "smaller than required_chars" in said else "more text or a smaller vocab_size"
        raise TokenizerError(
            f"no vocabulary of {vocab_size} pieces can be trained on this text: give {mend}. sentencepiece says: {said}"
        ) from error
    return model.getvalue()


def from_tokenizer_json(path: str | os.PathLike[str]) -> bytes:
    """The sentencepiece model that a tokenizer.json with a Unigram vocabulary stands for.

    Raises:
        TokenizerError: the file is missing, damaged, or of another kind of tokenizer.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model = content["model"]
        kind, unk_id, vocab = model.get("type", "Unigram"), model["unk_id"], model["vocab"]
        special = {token["content"] for token in content.get("added_tokens", ()) if token.get("special")}
        pieces = [(str(piece), float(score)) for piece, score in vocab]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{path} is no tokenizer.json with a Unigram vocabulary ({error!r}): fetch it anew"
        ) from error
    if kind != "Unigram":
        raise TokenizerError(f"{path} has a {kind} vocabulary; ALBERT's is Unigram: is this another model's tokenizer?")
    special.update(piece for piece, _ in pieces if piece in SPECIAL_TOKENS)
    return _model_proto(pieces, unk_id, special)


def to_tokenizer_json(model: bytes, *, do_lower_case: bool, keep_accents: bool) -> str:
    """The tokenizer.json of a sentencepiece model, with ALBERT's clean-up before it.

    transformers 5 can read the .model alone, but then cuts the text at the user-defined symbols first, which puts a "▁"
    after each of them that ALBERT never saw. It takes a tokenizer.json as it is.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": quotes}, "content": '"'} for quotes in ("``", "''")
    ]
    if not keep_accents:
        # StripAccents would take the vowel signs that stand apart (Mc), too, and sentencepiece puts syllables together.
        accents = {"type": "Replace", "pattern": {"Regex": r"\p{Mn}"}, "content": ""}
        normalizers += [{"type": "NFKD"}, accents, {"type": "NFC"}]
    normalizers += [{"type": "Lowercase"}] if do_lower_case else []
    charsmap = b"".join(value for number, value in _fields(_normalizer_spec(model)) if number == 2)
    if charsmap:
        charsmap_text = base64.b64encode(charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap_text})
    ids = {token: processor.piece_to_id(token) for token in SPECIAL_TOKENS}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}

    def special(token: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": token, "type_id": segment}}

    def sequence(name: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    single = [special("[CLS]", 0), sequence("A", 0), special("[SEP]", 0)]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **plain} for token, i in sorted(ids.items(), key=lambda e: e[1])],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, sequence("B", 1), special("[SEP]", 1)],
            "special_tokens": {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in ("[CLS]", "[SEP]")},
        },
        "decoder": metaspace,
        "model": {
            "type": "Unigram",
            "unk_id": processor.unk_id(),
            "vocab": [[processor.id_to_piece(i), processor.get_score(i)] for i in range(len(processor))],
            "byte_fallback": False,
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a message in protobuf's wire format, as (number, content); others are passed
    over."""
    view, i = memoryview(message), 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = view[i]
            i += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while i < len(view):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            varint()
        elif kind == 2:
            size = varint()
            yield tag >> 3, bytes(view[i : i + size])
            i += size
        else:
            i += 8 if kind == 1 else 4


def _normalizer_spec(model: bytes) -> bytes:
    return b"".join(value for number, value in _fields(model) if number == 3)


# sentencepiece_model.proto's numbers of the fields and piece types that are written here.
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (2**64 - 1))


def _message(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _model_proto(pieces: list[tuple[str, float]], unk_id: int, special: set[str]) -> bytes:
    """A ModelProto in protobuf's wire format: five fields do not ask for a dependency on protobuf."""
    out = bytearray()
    for index, (piece, score) in enumerate(pieces):
        kind = _UNKNOWN if index == unk_id else _CONTROL if piece in special else _NORMAL
        out += _message(
            1, _message(1, piece.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + _integer(3, kind)
        )
    trainer = _integer(3, 1) + _integer(4, len(pieces)) + _integer(40, unk_id)  # unigram
    trainer += _integer(41, -1) + _integer(42, -1) + _integer(43, -1) + _message(45, pieces[unk_id][0].encode())
    normalizer = _message(1, b"identity") + _integer(3, 1) + _integer(4, 1) + _integer(5, 1)
    return bytes(out) + _message(2, trainer) + _message(3, normalizer)
