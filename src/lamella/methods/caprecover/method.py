"""CapRecover: what can be read from the features of a split model (Xiu, Zhang, ACM Multimedia 2025, arXiv 2507.22828).

A model runs in two parts, the first on a device and the rest on a server. For every place where it may be cut the audit
says how much meaning an eavesdropper on the link reads from what is sent: classes, captions, or the very tokens. He has
pictures of his own, with what they show, and the model's front; from these he trains a small reader::

    x --front--> F_k --defence--> F_k + e ~~~ link ~~~> (F_k + e) - e --rest--> output         (victim.py, guard.py)
                                    |
                                    +--> reader --> class, caption or tokens         (readers.py, captioner.py)

Readers of several capacities stand side by side, since a weak one alone makes shallow cuts look safe and a strong one
alone says that everything leaks. A defence is judged by attackers who know it, beside those who do not. The audit is
for the owner of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen

from lamella.data import LabelledImages
from lamella.files import Work
from lamella.methods.caprecover.audit import Sets, audited, of_link, recommended, retrieved
from lamella.methods.caprecover.guard import Guard
from lamella.methods.caprecover.readers import Reader
from lamella.methods.caprecover.victim import Victim
from lamella.registry import method
from lamella.results import Study
from lamella.train import TrainConfig

TRAINING = TrainConfig(lr=1e-4, schedule="constant", warmup=0, batch=64, weight_decay=1e-2)
GUARDS = ("none", "uniform", "gaussian:3", "gaussian:10", "fixed:10")
LINKED = 256  # pictures on which the price of a defence is measured


@method(
    "caprecover",
    paper="2507.22828",
    purpose="measure",
    on="any",
    brief={"cuts": ("stage1", "pooled"), "readers": ("gap",), "guards": ("none", "gaussian:3"), "seeds": 1, "steps": 3,
           "count": 900},
)  # fmt: skip
def caprecover(
    model: Victim,
    images: LabelledImages,
    *,
    cuts: tuple[str, ...] = (),
    readers: Annotated[tuple[Reader, ...], MinLen(1)] = ("linear", "gap", "conv"),
    guards: tuple[str, ...] = GUARDS,
    seeds: Annotated[int, Ge(1)] = 3,
    max_leak: Annotated[float, Ge(0), Le(1)] = 0.3,
    max_bytes: Annotated[int, Ge(1)] | None = None,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Audit a split model: what an eavesdropper reads of the class at every cut, with and without defences.

    Args:
        model: trained, and frozen: nothing of it changes.
        images: pictures with classes, such as an attacker may own; those that the model was trained on, where that is
            known, are left out. One in five is kept to judge.
        cuts: by name; all when left out.
        readers: attackers, from weak to strong.
        guards: defences: none, uniform, gaussian:10, fixed:10 (in units of a cut's standard deviation), bits:8,
            top:0.1, pooled.
        seeds: attackers of each kind, for the interval.
        max_leak: the accuracy that no attacker may exceed at a cut that is recommended.
        max_bytes: that a request may send there; any number when left out.
        config: of the attackers: the published rate and batch, and 20 epochs, when left out.
        work: where an interrupted run goes on from.
        seed: of the first attacker; the others follow.

    Returns:
        By cut, reader and defence the accuracy of attackers who know the defence and who do not, what a defence costs,
        and a cut that may be taken.

    Raises:
        MethodError: for a cut or a defence that there is not.
        CalibrationError: for pictures without classes.
        ArchitectureError: for a place behind which the model still reads what comes before it.
    """
    chosen = model.chosen(cuts)
    defences = parsed(guards)
    train, test = model.unseen(images), list(images.part("test").items)
    sets = Sets.of(model, train, test, chosen, work, [model.describe(), images.describe()])
    x, labels = model.prepare(test[:LINKED]), sets.test_labels[:LINKED]
    model.check_cuts(x[:8], chosen)
    links = of_link(model, x, labels, chosen, defences)
    depends = [model.describe(), images.describe(), [str(each) for each in defences], str(config)]
    attacks = audited(
        sets,
        cuts=chosen,
        readers=readers,
        guards=defences,
        seeds=range(seed, seed + seeds),
        config=config,
        work=work,
        depends=depends,
    )
    findings: dict[str, Any] = {
        "attacks": attacks,
        "links": links,
        "nearest": {cut: retrieved(sets, cut) for cut in chosen},
        "majority": sets.majority,
        "classes": sets.classes,
        "pictures": {"attacker": len(train), "judge": len(test)},
        "task": float((model.output(x).argmax(1) == labels).double().mean()),
        "recommended": recommended(attacks, links, max_leak=max_leak, max_bytes=max_bytes),
        "max_leak": max_leak,
    }
    return Study(findings=findings)


def parsed(guards: Sequence[str]) -> list[Guard]:
    """The defences, and first of all none."""
    found = [Guard.parse(each) for each in guards]
    return [Guard(), *(each for each in dict.fromkeys(found) if each.kind != "none")]
