"""Tokenizers of a smaller vocabulary, which still encode every text.

Byte-pair encoding (BPE) starts from characters or bytes and merges one pair after the other, always the pair whose
merge has the lowest rank:

    l o w e r  ->  lo w e r  ->  low e r  ->  low er  ->  lower

A tokenizer without the token ``lower`` stops before it, so nothing has to be trained again: the tokens that are not
kept are removed, together with the merges that make them or need them. Three kinds of tokens are always kept:

- the bytes, into which every text can be divided;
- the tokens that were added to the merged ones: those of chat formats, the beginning and the end of a text;
- the parts of kept tokens, from which they are merged. A text whose tokens are all kept is therefore encoded as before,
  since the merges that lead to them are the same ones in the same order.

Supported are tokenizers of the tokenizers library that merge bytes (GPT-2, Llama 3, Qwen, SmolLM2), and those that
merge characters and fall back to bytes (Llama 2, Gemma).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from lamella.errors import PlanError
from lamella.plan.checkpoint import read_json

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OTHER_FORMS = ("vocab.json", "merges.txt", "added_tokens.json", "*.model")  # of what FILE contains
SPACE = "▁"  # stands for a space where characters are merged


class Merges:
    """The tokens of a BPE tokenizer, and how they are merged.

    Args:
        settings: content of its ``tokenizer.json``.

    Attributes:
        ids: ids of the tokens that are bytes, characters or merged from them.
        ranks: for each pair of tokens that is merged, its rank.
        always: ids of the tokens that every smaller vocabulary keeps.

    Raises:
        PlanError: for a tokenizer of another kind.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        model = settings["model"]
        check_kind(settings)
        self.ids: dict[str, int] = model["vocab"]
        self._tokens = {index: token for token, index in self.ids.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(_pairs(model))}
        basic = {*_bytes(settings), SPACE} if model.get("byte_fallback") else _bytes(settings)
        self.always = {self.ids[token] for token in (*basic, model.get("unk_token")) if token in self.ids}
        self.always |= {each["id"] for each in settings["added_tokens"]}

    def parts(self, token: int) -> set[int]:
        """Return a token and the tokens from which it is merged, in one or several steps.

        Args:
            token: id of the token.
        """
        if token not in self._tokens:  # an added token, or a row of the embedding without a token
            return {token}
        whole = self._tokens[token]
        symbols, seen = list(whole), set(whole)
        while True:
            known = [(self.ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in self.ranks]
            if not known:
                break
            _, index = min(known)
            symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]
            seen.add(symbols[index])
        # Some tokens are not made by merges: those that text is divided into before.
        return {token} if symbols != [whole] else {self.ids[part] for part in seen}

    def closed(self, tokens: Iterable[int]) -> list[int]:
        """Return the smallest vocabulary with these tokens, ascending.

        Args:
            tokens: their ids.
        """
        return sorted(self.always.union(*(self.parts(token) for token in tokens)))


def check_kind(settings: Mapping[str, Any]) -> None:
    """Check that a tokenizer merges bytes, or characters with bytes to fall back to.

    Args:
        settings: content of its ``tokenizer.json``.

    Raises:
        PlanError: if it does not.
    """
    model = settings["model"]
    kind = model["type"]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    on_bytes = "ByteLevel" in _types(settings["pre_tokenizer"]) | _types(settings["normalizer"])
    complete = on_bytes or (model.get("byte_fallback") and _bytes(settings) <= set(model["vocab"]))
    if kind != "BPE" or affixes or not complete:
        raise PlanError(
            f"width: vocab: this tokenizer ({kind}) does not merge bytes, so with fewer tokens it could not encode "
            "every text: only tokenizers with merges on bytes, or with all bytes to fall back to, can be cut"
        )


def _types(step: Mapping[str, Any] | None) -> set[str]:
    """Return the types of the steps of a normalizer or pre-tokenizer."""
    if step is None:
        return set()
    return {step["type"]}.union(*map(_types, step.get("pretokenizers") or step.get("normalizers") or []))


def _bytes(settings: Mapping[str, Any]) -> set[str]:
    """Return the tokens of single bytes."""
    if settings["model"].get("byte_fallback"):
        return {f"<0x{byte:02X}>" for byte in range(256)}
    return set(pre_tokenizers.ByteLevel.alphabet())


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def cut_settings(settings: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the ``tokenizer.json`` of a smaller vocabulary, in which the id of a token is its index in ``kept``.

    Args:
        settings: content of the original's.
        kept: ids of the kept tokens, ascending; other rows of the embedding may be among them.

    Raises:
        PlanError: if a token is missing without which some text, or a kept token, could not be encoded; or for a
            tokenizer of another kind.
    """
    merges = Merges(settings)
    lacking = sorted(set(merges.closed(kept)) - set(kept))
    if lacking:
        raise PlanError(
            f"width: vocab: lacks {len(lacking)} tokens without which the tokenizer cannot encode every text, such as "
            f"{lacking[0]}: keep bytes, added tokens and the parts of tokens, as `lamella vocab` does"
        )
    new = {old: index for index, old in enumerate(kept)}
    found = copy.deepcopy(dict(settings))
    vocab = {token: new[index] for token, index in merges.ids.items() if index in new}
    pairs = [list(pair) for pair in merges.ranks if vocab.keys() >= {*pair, "".join(pair)}]
    found["model"] |= {"vocab": vocab, "merges": pairs}
    found["added_tokens"] = [each | {"id": new[each["id"]]} for each in settings["added_tokens"]]
    _rename(found["post_processor"], new)
    if found["padding"] is not None:
        found["padding"]["pad_id"] = new[found["padding"]["pad_id"]]
    return found


def _rename(step: dict[str, Any] | None, new: Mapping[int, int]) -> None:
    """Replace the ids of tokens in a post-processor."""
    if step is None:
        return
    for each in step.get("processors", []):
        _rename(each, new)
    if step["type"] == "TemplateProcessing":
        for token in step["special_tokens"].values():
            token["ids"] = [new[each] for each in token["ids"]]
    for name in ("sep", "cls"):  # of BERT and RoBERTa
        if name in step:
            step[name][1] = new[step[name][1]]


def settings_of(tokenizer: Any) -> dict[str, Any]:
    """Return the content of the ``tokenizer.json`` of a tokenizer of transformers.

    Args:
        tokenizer: the tokenizer.

    Raises:
        PlanError: for a tokenizer that is not one of the tokenizers library.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PlanError(
            f"width: vocab: a {type(tokenizer).__name__} has no {FILE}: only those that have one can be cut"
        )
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def cut_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """Return the tokenizer of a smaller vocabulary; see :func:`cut_settings`.

    Args:
        tokenizer: a tokenizer of transformers, which is not changed.
        kept: ids of the kept tokens, ascending.

    Raises:
        PlanError: for a tokenizer of another kind, or if a token is missing.
    """
    smaller = copy.deepcopy(tokenizer)
    smaller._tokenizer = _opened(cut_settings(settings_of(tokenizer), kept))
    return smaller


def _opened(settings: Mapping[str, Any]) -> Tokenizer:
    """Open a tokenizer, and check that its added tokens have the ids that the file gives them."""
    opened = Tokenizer.from_str(json.dumps(settings))
    wrong = [each for each in settings["added_tokens"] if opened.token_to_id(each["content"]) != each["id"]]
    if wrong:  # the library numbers them by itself, from the number of merged tokens on
        raise PlanError(
            f"width: vocab: the tokenizer's added token {wrong[0]['content']} does not follow its other tokens, so it "
            "would get another id: keep all tokens"
        )
    return opened


def cut_files(folder: Path, kept: Sequence[int]) -> None:
    """Replace the tokenizer in a folder by that of a smaller vocabulary; nothing happens if there is none.

    Args:
        folder: folder of a checkpoint.
        kept: ids of the kept tokens, ascending.

    Raises:
        PlanError: for a tokenizer of another kind, or if a token is missing.
    """
    others = [path for pattern in OTHER_FORMS for path in folder.glob(pattern)]
    if (folder / FILE).is_file():
        settings = cut_settings(read_json(folder / FILE), kept)
        _opened(settings)
        (folder / FILE).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    elif others:
        raise PlanError(f"width: vocab: the model has a tokenizer without a {FILE}, which cannot be cut: add that file")
    for path in others:
        path.unlink()
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if "added_tokens_decoder" in settings:
        new = {old: index for index, old in enumerate(kept)}
        settings["added_tokens_decoder"] = {
            str(new[int(old)]): token for old, token in settings["added_tokens_decoder"].items()
        }
        (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
