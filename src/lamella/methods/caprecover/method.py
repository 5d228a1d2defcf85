"""CapRecover: feature inversion of split models (Xiu, Zhang, ACM Multimedia 2025, arXiv 2507.22828).

A model runs in two parts, the first on a device and the rest on a server. For every possible cut the audit measures how
much an eavesdropper on the link recovers from the transmitted features: classes, captions, or the input tokens. The
attacker owns labelled images and the front of the model, and trains a small network on its features::

    x --front--> F_k --defence--> F_k + e ~~~ link ~~~> (F_k + e) - e --rest--> output         (victim.py, guard.py)
                                    |
                                    +--> attacker --> class, caption or tokens    (attackers.py, captioner.py)

Attackers of several capacities are compared, since a weak one alone makes early cuts look safe, and a strong one alone
suggests that everything leaks. They are trained until they stop improving (convergence.py). A defence is evaluated with
attackers who know it and with attackers who do not. The audit is a tool for the owner of a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen

from lamella.data import LabelledImages
from lamella.files import Work
from lamella.methods.caprecover.attackers import AttackerKind
from lamella.methods.caprecover.audit import AuditData, measure_defences, nearest_accuracy, recommend_cut, run_attacks
from lamella.methods.caprecover.guard import LinkDefence
from lamella.methods.caprecover.victim import Victim
from lamella.registry import method
from lamella.results import Study
from lamella.train import TrainConfig

TRAINING = TrainConfig(schedule="constant", warmup=0, batch=64, weight_decay=1e-2)  # batch and decay are published
GUARDS = ("none", "uniform", "gaussian:3", "gaussian:10", "fixed:10")
COST_IMAGES = 256  # number of images on which the cost of a defence is measured


@method(
    "caprecover",
    paper="2507.22828",
    purpose="measure",
    on="any",
    brief={"cuts": ("stage1", "pooled"), "attackers": ("gap",), "guards": ("none", "gaussian:3"), "seeds": 1,
           "steps": 3, "count": 900},
)  # fmt: skip
def caprecover(
    model: Victim,
    images: LabelledImages,
    *,
    cuts: tuple[str, ...] = (),
    attackers: Annotated[tuple[AttackerKind, ...], MinLen(1)] = ("linear", "gap", "conv"),
    guards: tuple[str, ...] = GUARDS,
    seeds: Annotated[int, Ge(1)] = 3,
    max_leak: Annotated[float, Ge(0), Le(1)] = 0.3,
    max_bytes: Annotated[int, Ge(1)] | None = None,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
    seed: Annotated[int, Ge(0)] = 0,
) -> Study:
    """Audit a split model: classes that an eavesdropper recovers from the features at every cut.

    Args:
        model: the trained model; it is frozen and not changed.
        images: images with classes, such as an attacker may own; known training images of the model are excluded. One
            in five is used for testing.
        cuts: names of the cuts; all if empty.
        attackers: kinds of attackers, from weak to strong: ``linear``, ``gap`` (pooled), ``conv``.
        guards: defences: none, uniform, gaussian:10, fixed:10 (in units of a cut's standard deviation), bits:8,
            top:0.1, pooled.
        seeds: number of attackers of each kind, for the interval.
        max_leak: maximum accuracy of any attacker at the recommended cut.
        max_bytes: maximum number of bytes per request at the recommended cut; if None, no limit.
        config: training configuration of the attackers; by default they are trained at a high and then at a low rate,
            each until their loss on a fifth of their images stops improving. ``steps`` is the maximum at each rate.
        work: folder from which an interrupted run resumes.
        seed: random seed of the first attacker; the others use the following seeds.

    Returns:
        For each cut, attacker and defence the accuracy of attackers who know the defence and who do not; the cost of
        each defence; and a recommended cut, at which no attacker of these kinds, with these images, reaches
        ``max_leak``, and all had stopped improving.

    Raises:
        MethodError: for an unknown cut or defence.
        CalibrationError: for images without classes.
        ArchitectureError: for a cut that later layers bypass with a skip connection.
    """
    selected = model.select_cuts(cuts)
    defences = parse_defences(guards)
    train, test = model.unseen(images), list(images.part("test").items)
    sets = AuditData.of(model, train, test, selected, work, [model.describe(), images.describe()])
    x, labels = model.prepare(test[:COST_IMAGES]), sets.test_labels[:COST_IMAGES]
    model.check_cuts(x[:8], selected)
    links = measure_defences(model, x, labels, selected, defences)
    depends = [model.describe(), images.describe(), [str(each) for each in defences], str(config)]
    attacks = run_attacks(
        sets,
        cuts=selected,
        attackers=attackers,
        guards=defences,
        seeds=range(seed, seed + seeds),
        config=config,
        work=work,
        depends=depends,
    )
    findings: dict[str, Any] = {
        "attacks": attacks,
        "links": links,
        "nearest": {cut: nearest_accuracy(sets, cut) for cut in selected},
        "majority": sets.majority,
        "classes": sets.classes,
        "images": {"attacker": len(train), "judge": len(test)},
        "task": float((model.output(x).argmax(1) == labels).double().mean()),
        "recommended": recommend_cut(attacks, links, max_leak=max_leak, max_bytes=max_bytes),
        "max_leak": max_leak,
    }
    return Study(findings=findings)


def parse_defences(guards: Sequence[str]) -> list[LinkDefence]:
    """Parse the defences; the first one is always none.

    Args:
        guards: defences as in :func:`caprecover`.
    """
    found = [LinkDefence.parse(each) for each in guards]
    return [LinkDefence(), *(each for each in dict.fromkeys(found) if each.kind != "none")]
