"""Pre-RMSNorm: a Pre-LN transformer as one with RMSNorm or CRMSNorm that computes the same.

Jiang, Gu, Zhu and Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
NeurIPS 2023, arXiv 2305.14858.

    Pre-LN         x_{l+1} = x_l + F_l(LN(x_l)),    LN(x) = g C x / sqrt(|C x|^2 / d + eps) + b,    C = I - 1 1^T / d
    LN(x + k 1)  = LN(x)                            the mean of the stream is never seen,
    LN(x)        = RMSNorm(x)  where mean(x) = 0    and where there is none, nothing need take it away
    so             whatever writes the stream writes C of it, and every norm on it becomes an RMSNorm

    Pre-CRMSNorm   u = x[:d-1]  says all of a zero-mean x:  x_d = -sum(u)

It is arithmetic: no data, no training, and equal to rounding. How a model is rewritten stands in rewrite.py; what it
needs to know of a model, which module reads the stream behind which norm and which one writes it, is the wiring in the
architecture table. A Post-LN model is refused: what its norms give is the stream.
"""

from __future__ import annotations

from dataclasses import asdict

from lamella.errors import MethodError, PlanError
from lamella.methods.pre_rmsnorm.checking import check_sees_no_mean, is_tied, precise
from lamella.methods.pre_rmsnorm.report import conversion
from lamella.methods.pre_rmsnorm.rewrite import Fold, Form, Norm, Tied
from lamella.plan import ModelReference, Plan, RewriteReference
from lamella.plan.export import check_floats
from lamella.registry import method
from lamella.results import Edit
from lamella.stack import Model

SLUG = "pre-rmsnorm"


@method("pre-rmsnorm", paper="2305.14858", purpose="rewrite", on="layernorm", brief={"norm": "rms"})
def pre_rmsnorm(
    model: Model, *, norm: Norm = "rms", fold: Fold | None = None, tied: Tied = "recentre", seed: int = 0
) -> Edit:
    """Write a Pre-LN model with RMSNorm or CRMSNorm in the place of LayerNorm, so that it computes the same.

    Every linear map, table and token that writes the stream is recentred, after which no norm need subtract a mean.
    Nothing is trained, and no data are needed. What an RMSNorm model allows comes with it: the stream can be rotated,
    and kernels for Llama fit. CRMSNorm leaves one entry of the stream out, since it follows from the others.

    The result is checked on random inputs, in float64 and in the model's own precision, and is not written if it
    differs. The folder gets a checkpoint with its modelling file, plan.json, and evidence.json: what was recentred,
    swapped, folded and untied, the error, and the parameters that it cost or saved.

    Example: lamella run pre-rmsnorm gpt2 -o gpt2-rms
    Example: lamella run pre-rmsnorm gpt2 --norm crms --tied untie -o gpt2-crms

    Args:
        model: the opened model; it is not changed.
        norm: rms, with the width as it is, or crms, one narrower.
        fold: what of each norm moves into the linear maps that read it: nothing, its bias (as Llama's norms have none;
            maps without a bias get one), or all of its affine. Left out, nothing for rms; crms needs the affine folded.
        tied: of an embedding that is also the head's weight: recentre what is looked up, or untie them, which costs a
            second table. With a folded affine they must be untied, or the embedding would be scaled with the head.
        seed: of the random inputs that it is checked on.

    Returns:
        A plan that says what the model is rewritten to.

    Raises:
        ExportError: for a model in int8.
        MethodError: for a model that was cut inside layers or rewritten, a Post-LN model, one whose layers see the mean
            of their stream, one with a module that nothing is known of, options that do not go together, or when the
            result differs.
    """
    check_floats(model)
    if any(stack.is_altered or stack.dropped for stack in model.stacks.values()):
        raise MethodError(f"{model.name} has layers that no config says: rewrite the model it was made of")
    exact = precise(model)
    for stack in exact.stacks.values():
        check_sees_no_mean(exact, stack, seed)
    form = formed(model, norm, fold, tied)
    plan = Plan(model=ModelReference.of(model), rewrite=RewriteReference(name=SLUG, params=asdict(form)))
    try:
        findings, notes = conversion(model, exact, plan, form, seed)
    except PlanError as error:
        raise MethodError(f"{model.name}: {error}") from None
    return Edit(stack=model, plan=plan, findings=findings, notes=notes)


def formed(model: Model, norm: Norm, fold: Fold | None, tied: Tied) -> Form:
    """What these options mean for a model: where nothing is tied, there is nothing to do about it.

    Raises:
        MethodError: for options that do not go together.
    """
    folded = fold or ("affine" if norm == "crms" else "nothing")
    try:
        return Form(norm, folded, tied if is_tied(model.model) else "untie")
    except ValueError as error:
        hint = "--tied untie" if folded == "affine" else "--fold affine"
        raise MethodError(f"{model.name}: {error} with {hint}") from None
