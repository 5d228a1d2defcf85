"""Tokenizers in the form that llama.cpp reads from a GGUF file.

How text is split before tokens are merged is hard-coded in llama.cpp and selected by name, so a tokenizer that splits
differently from all of :data:`SPLITTERS` is refused: the model would see other tokens than in training.
"""

from __future__ import annotations

import json
from typing import Any

from gguf import GGUFWriter, TokenType

from lamella.errors import ExportError
from lamella.plan.tokenizer import SPACE

# How tokenizers split text before they merge tokens, as in their files, and llama.cpp's name for it.
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
BYTES, PIECES = "gpt2", "llama"  # llama.cpp's names for byte-level BPE and SentencePiece


def add_tokenizer(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write tokens, merges, special tokens and chat template.

    Args:
        writer: writer of the GGUF file.
        tokenizer: a tokenizer of transformers with merges (BPE).
        size: number of rows of the embedding; rows beyond the last token get unused tokens.

    Raises:
        ExportError: for a tokenizer that llama.cpp cannot express, or that has more tokens than there are rows.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError(
            "a GGUF file takes its tokens from a tokenizer.json, which this model lacks: add one to its folder"
        )
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    model = settings["model"]
    if model["type"] != "BPE":
        raise ExportError(f"a GGUF file supports tokenizers with merges (BPE), but this one is {model['type']}")
    ids: dict[str, int] = tokenizer.get_vocab()
    if max(ids.values()) >= size:
        raise ExportError(f"the tokenizer has a token {max(ids.values())}, but the embedding {size} rows: get it again")
    pieces = bool(model.get("byte_fallback"))
    tokens = [f"[PAD{row}]" for row in range(size)]
    kinds = [TokenType.UNUSED] * size
    added = {each["id"]: each["special"] for each in settings["added_tokens"]}
    for token, row in ids.items():
        kind = _kind(token, row, added, pieces)
        # llama.cpp looks for added tokens in the text itself, in which spaces are still spaces.
        tokens[row] = token.replace(SPACE, " ") if pieces and kind == TokenType.USER_DEFINED else token
        kinds[row] = kind
    if model.get("unk_token") in ids and pieces:
        kinds[ids[model["unk_token"]]] = TokenType.UNKNOWN

    writer.add_tokenizer_model(PIECES if pieces else BYTES)
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    if pieces:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(settings))
    else:
        writer.add_tokenizer_pre(_splitter(settings))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (row := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(row)
    example = tokenizer("a").input_ids
    writer.add_add_bos_token(example[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(example[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _kind(token: str, row: int, added: dict[int, bool], pieces: bool) -> TokenType:
    if row in added:
        return TokenType.CONTROL if added[row] else TokenType.USER_DEFINED
    return TokenType.BYTE if pieces and len(token) == 6 and token.startswith("<0x") else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Return the scores of tokens for SentencePiece.

    SentencePiece merges the pair with the highest score first; a tokenizer's file lists it first.
    """
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]


def _adds_space(settings: dict[str, Any]) -> bool:
    """Return whether text is tokenized as if it began with a space."""
    parts = [part for step in ("normalizer", "pre_tokenizer") for part in _parts(settings[step])]
    return any(
        part["type"] == "Prepend" or (part["type"] == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def _splitter(settings: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text."""
    steps = []
    for part in _parts(settings["pre_tokenizer"]):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            steps += ["bytes"] if part["use_regex"] else []
        elif part["type"] == "Digits" and part["individual_digits"]:
            steps.append("digits")
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            steps.append(part["pattern"].get("Regex", ""))
        else:
            steps.append(part["type"])
    normalised = [part["type"] for part in _parts(settings["normalizer"])]
    name = SPLITTERS.get(tuple(steps))
    if name is None or normalised not in ([], ["NFC"] if name == "qwen2" else []):
        raise ExportError(
            f"this tokenizer splits text by {', '.join([*normalised, *steps]) or 'nothing'}, which llama.cpp does "
            f"not support; supported are {', '.join(SPLITTERS.values())}"
        )
    return name


def _parts(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer."""
    if step is None:
        return []
    return step.get("pretokenizers") or step.get("normalizers") or [step]
