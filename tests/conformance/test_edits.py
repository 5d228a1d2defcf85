"""Every edit: a changed model in a plan that can be undone, and a checkpoint that computes the same."""

from __future__ import annotations

import pytest
import torch
from worlds import IDS, MASK, logits, made, of_suite, on_families, opened

import lamella
from lamella.plan import ModelReference, Plan
from lamella.plan.rewriting import code_of
from lamella.runtime import apply

EDITING = of_suite("edits")


@pytest.mark.parametrize(("command", "name"), on_families(EDITING))
def test_an_edit_leaves_the_model_as_it_is_and_is_undone_with_its_view(command: str, name: str) -> None:
    stack = opened(name)
    original = logits(stack.model)
    done = made(command, name)
    changed, plan = done.outcome.result.stack, Plan.read(done.out / "plan.json")
    assert done.changed == []
    edits = plan.weights or plan.drop or plan.modules or plan.rewrite or changed is not stack
    assert edits, "nothing was edited: give an example on which it does"
    assert plan.provenance["method"] == done.outcome.evidence.method and plan.model == ModelReference.of(changed)
    view = apply(changed, plan)
    assert torch.isfinite(logits(view)).all() and not torch.equal(logits(view), original)
    if keeps(plan):  # it promises another form of the same function
        assert torch.allclose(logits(view), original, rtol=0, atol=1e-4 * float(original.abs().max()))
    out = view.generate(IDS, attention_mask=MASK, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert out.shape == (3, 14)
    del view
    assert torch.equal(logits(stack.model), original)


@pytest.mark.parametrize(("command", "name"), on_families(EDITING))
def test_its_checkpoint_computes_what_its_plan_does(command: str, name: str) -> None:
    done = made(command, name)
    view = apply(done.outcome.result.stack, Plan.read(done.out / "plan.json"))
    assert torch.equal(logits(lamella.load(done.out).model), logits(view))
    kl = done.outcome.evidence.fidelity["kl"]["mean"]  # it was judged, and differs; what is rewritten, by rounding
    assert abs(kl) < 1e-6 if keeps(done.outcome.result.plan) else kl > 0


def keeps(plan: Plan) -> bool:
    """Whether a plan writes the model otherwise, and its method says that it computes the same."""
    return plan.rewrite is not None and code_of(plan.rewrite).EXACT
