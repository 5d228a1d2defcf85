"""What ``chat`` and ``serve`` generate with: a model, its plan, its tokenizer and a draft."""

from __future__ import annotations

from typing import Any, NamedTuple

from lamella.inputs import check_changed
from lamella.runtime import Draft
from lamella.stack import Model
from lamella.zoo import NamedDraft, open_saved, open_tokenizer
from lamella.zoo.draft import OFF
from lamella.zoo.opening import tokenizer_of


class Generator(NamedTuple):
    """An open model that generates.

    Attributes:
        whole: the model without a plan.
        view: the model with its plan applied.
        tokenizer: the tokenizer of the view.
        draft: what proposes tokens; None without a draft.
    """

    whole: Model
    view: Any
    tokenizer: Any
    draft: Draft | None


def open_generator(model: str, plan: str | None, draft: str | None) -> Generator:
    """Open a model, with its plan applied.

    Args:
        model: the model; a folder written by Lamella runs with its plan.
        plan: a plan for it.
        draft: what proposes tokens.

    Raises:
        LamellaError: for something that cannot be opened, before the model is, or a draft that does not fit.
    """
    for name in (model, plan):
        check_changed(name)
    named = NamedDraft.open(draft or OFF)
    named.check(named.name)
    saved = open_saved(model)
    view, tokenizer = saved.running.model, open_tokenizer(saved.whole.path or model)
    if plan is not None:
        view, tokenizer = saved.view(plan), tokenizer_of(plan, tokenizer)
    return Generator(saved.whole, view, tokenizer, named.draft_of(view, tokenizer))
