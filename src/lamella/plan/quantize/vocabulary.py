"""A tokenizer as llama.cpp reads it from a GGUF file.

How text is split before tokens are merged is code of llama.cpp's own, chosen by a name, so a tokenizer that splits
differently from all of :data:`SPLITTERS` is refused: the model would read other tokens than it was trained on.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from lamella.errors import ExportError

# What tokenizers split text by before they merge, as their files say it, and what llama.cpp calls it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITTERS = {
    ("bytes",): "gpt-2",
    ("digits", "bytes"): "smollm",
    (_LLAMA3,): "llama-bpe",
    (_LLAMA3.replace("{1,3}", ""),): "qwen2",
    (_TEKKEN,): "tekken",
}
BYTES, PIECES = "gpt2", "llama"  # llama.cpp's names of byte-level merges, and of SentencePiece's


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write tokens, merges, special tokens and chat template.

    Args:
        tokenizer: of transformers, with merges (BPE).
        size: rows of the embedding; those beyond the last token are filled up with tokens that nothing encodes to.

    Raises:
        ExportError: for a tokenizer that llama.cpp has no form of, or that has more tokens than there are rows.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError("a GGUF file takes its tokens from a tokenizer.json, which this model lacks: put one there")
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model["type"] != "BPE":
        raise ExportError(f"a GGUF file holds tokenizers with merges (BPE), and this one is {model['type']}")
    ids: dict[str, int] = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise ExportError(f"the tokenizer has a token {max(ids.values())}, and the embedding {size} rows: get it again")
    pieces = bool(model.get("byte_fallback"))
    tokens = [f"[PAD{row}]" for row in range(size)]
    kinds = [TokenType.UNUSED] * size
    added = {each["id"]: each["special"] for each in said["added_tokens"]}
    for token, row in ids.items():
        tokens[row], kinds[row] = token, _kind(token, row, added, pieces)
    if model.get("unk_token") in ids and pieces:
        kinds[ids[model["unk_token"]]] = TokenType.UNKNOWN

    writer.add_tokenizer_model(PIECES if pieces else BYTES)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_puts_a_space_before(said))
    else:
        writer.add_tokenizer_pre(_splitter(said))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (row := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(row)
    begun = tokenizer("a").input_ids
    writer.add_add_bos_token(begun[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(begun[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _kind(token: str, row: int, added: dict[int, bool], pieces: bool) -> TokenType:
    if row in added:
        return TokenType.CONTROL if added[row] else TokenType.USER_DEFINED
    return TokenType.BYTE if pieces and len(token) == 6 and token.startswith("<0x") else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges the pair with the highest score first, and a tokenizer's file the one named first."""
    first: dict[str, int] = {}
    for place, pair in enumerate(merges):
        first.setdefault("".join(pair), place)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _puts_a_space_before(said: dict[str, Any]) -> bool:
    """Whether text begins as if a space stood before it."""
    parts = [part for place in ("normalizer", "pre_tokenizer") for part in _parts(said[place])]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _splitter(said: dict[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits text."""
    steps = []
    for part in _parts(said["pre_tokenizer"]):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            steps += ["bytes"] if part["use_regex"] else []
        elif part["type"] == "Digits" and part["individual_digits"]:
            steps.append("digits")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            steps.append(part["pattern"].get("Regex", ""))
        else:
            steps.append(part["type"])
    normalised = [part["type"] for part in _parts(said["normalizer"])]
    name = SPLITTERS.get(tuple(steps))
    if name is None or normalised not in ([], ["NFC"] if name == "qwen2" else []):
        raise ExportError(
            f"this tokenizer splits text by {', '.join([*normalised, *steps]) or 'nothing'}, which llama.cpp is not "
            f"known to do; known are {', '.join(SPLITTERS.values())}"
        )
    return name


def _parts(said: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if said is None:
        return []
    return said.get("pretokenizers") or said.get("normalizers") or [said]
