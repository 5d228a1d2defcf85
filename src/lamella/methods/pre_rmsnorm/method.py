"""Pre-RMSNorm: rewrite a Pre-LN transformer with RMSNorm or CRMSNorm, without changing what it computes.

Jiang, Gu, Zhu and Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers",
NeurIPS 2023, arXiv 2305.14858.

    Pre-LN         x_{l+1} = x_l + F_l(LN(x_l)),    LN(x) = g C x / sqrt(|C x|^2 / d + eps) + b,    C = I - 1 1^T / d
    LN(x + k 1)  = LN(x)                            the mean of the residual stream has no effect,
    LN(x)        = RMSNorm(x)  where mean(x) = 0    and where it is zero, no norm needs to subtract it
    so             every module that writes to the residual stream is recentred by C, and every norm becomes an RMSNorm

    Pre-CRMSNorm   u = x[:d-1]  determines a zero-mean x:  x_d = -sum(u)

The rewrite is arithmetic: no data, no training, and the result is equal up to rounding. The rewrite itself is in
rewrite.py; which module reads the residual stream after which norm and which one writes to it is the wiring in the
architecture table. A Post-LN model is refused: the output of its norms is the residual stream.
"""

from __future__ import annotations

from dataclasses import asdict

from lamella.errors import MethodError, PlanError
from lamella.methods.pre_rmsnorm.checking import check_ignores_mean, is_tied, precise
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
    """Rewrite a Pre-LN model with RMSNorm or CRMSNorm instead of LayerNorm, without changing what it computes.

    Every projection, embedding table and special token that writes to the residual stream is recentred, after which no
    norm needs to subtract a mean. Nothing is trained, and no data are needed. The result allows what RMSNorm models
    allow: the residual stream can be rotated, and kernels for Llama can be used. CRMSNorm drops one channel of the
    residual stream, since it follows from the others.

    The result is checked on random inputs, in float64 and in the model's own precision, and is not written if it
    differs. The folder gets a checkpoint with its modelling file, plan.json, and evidence.json with the recentred,
    replaced, folded and untied modules, the error, and the change in the number of parameters.

    Example: lamella run pre-rmsnorm gpt2 -o gpt2-rms
    Example: lamella run pre-rmsnorm gpt2 --norm crms --tied untie -o gpt2-crms

    Args:
        model: the opened model; it is not changed.
        norm: rms, with an unchanged hidden size, or crms, with a hidden size smaller by one.
        fold: part of each norm that is folded into the projections after it: nothing, its bias (Llama's norms have
            none; projections without a bias get one), or all of its affine. Defaults to nothing for rms; crms needs
            affine.
        tied: treatment of an embedding that shares its weight with the head: recentre the embedding after the lookup,
            or untie them, which costs a second table. With a folded affine they must be untied, or the embedding would
            be scaled with the head.
        seed: random seed of the inputs of the check.

    Returns:
        A plan with the rewrite.

    Raises:
        ExportError: for a model in int8.
        MethodError: for a model that was pruned inside layers or already rewritten, a Post-LN model, one whose layers
            depend on the mean of the residual stream, one with an unknown module, incompatible options, or when the
            result differs.
    """
    check_floats(model)
    if any(stack.is_altered or stack.dropped for stack in model.stacks.values()):
        raise MethodError(f"{model.name} has layers that no config can express: rewrite the original model instead")
    exact = next(precise(model))
    for stack in exact.stacks.values():
        check_ignores_mean(exact, stack, seed)
    del exact, stack
    form = form_of(model, norm, fold, tied)
    plan = Plan(model=ModelReference.of(model), rewrite=RewriteReference(name=SLUG, params=asdict(form)))
    try:
        findings, notes = conversion(model, plan, form, seed)
    except PlanError as error:
        raise MethodError(f"{model.name}: {error}") from None
    return Edit(stack=model, plan=plan, findings=findings, notes=notes)


def form_of(model: Model, norm: Norm, fold: Fold | None, tied: Tied) -> Form:
    """Return the form that the options select for a model; for untied models ``tied`` has no effect.

    Args:
        model: the model to rewrite.
        norm: ``rms`` for RMSNorm, ``crms`` for CRMSNorm.
        fold: part of a norm that is folded into its readers; if None, all of it (``affine``) for CRMSNorm, otherwise
            ``nothing``.
        tied: ``recentre`` an embedding that shares its weight with the head after every lookup, or ``untie`` it.

    Raises:
        MethodError: for incompatible options.
    """
    folded = fold or ("affine" if norm == "crms" else "nothing")
    try:
        return Form(norm, folded, tied if is_tied(model.model) else "untie")
    except ValueError as error:
        fix = "--tied untie" if folded == "affine" else "--fold affine"
        raise MethodError(f"{model.name}: {error} with {fix}") from None
