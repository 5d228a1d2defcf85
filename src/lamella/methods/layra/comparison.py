"""Compare LayRA with all baselines on one new language, each with several learning rates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, MinLen

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.layra.baselines import ArmResult, arms, at_equal_loss, common_loss, follow
from lamella.methods.layra.edges import Edges
from lamella.methods.layra.languages import Language
from lamella.methods.layra.recipe import TRAINING
from lamella.registry import command
from lamella.results import Study
from lamella.search import pareto
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig

RATES = (1e-4, 3e-4, 1e-3)  # around the paper's 3e-4 (ours)
POINTS = 10  # evaluations per curve, if the training settings define none
CHOOSE = "{}, to choose by"  # the half of the held-out text for choosing the learning rate


@dataclass(kw_only=True)
class ArmComparison(Study):
    """Results of every arm with every learning rate.

    Attributes:
        language: the new language.
        old: the languages that the model had.
        results: by arm, one per learning rate.
    """

    language: str
    old: tuple[str, ...]
    results: dict[str, list[ArmResult]]

    def __post_init__(self) -> None:
        self.findings, self.notes = self._findings(), self._notes()

    def curves(self, result: ArmResult, choose: bool) -> tuple[list[float], list[float]]:
        """Loss on the new language and mean loss on the old ones.

        Args:
            result: results of an arm.
            choose: use the half of the text for choosing learning rates instead of the other half.
        """
        new, *old = (CHOOSE.format(name) if choose else name for name in (self.language, *self.old))
        return result.curve[new], [fmean(point) for point in zip(*(result.curve[name] for name in old), strict=True)]

    def best(self) -> dict[str, ArmResult]:
        """Each arm with the learning rate that forgets least at equal learning, on the text for choosing."""
        goal = common_loss({name: [self.curves(each, True)[0] for each in of] for name, of in self.results.items()})
        found = {}
        for name, of in self.results.items():
            losses = [(at_equal_loss(*self.curves(each, True), goal), index) for index, each in enumerate(of)]
            found[name] = of[min((loss, index) for loss, index in losses if loss is not None)[1]]
        return found

    def at_equal_loss(self) -> tuple[float, dict[str, float]]:
        """The loss on the new language that all reach with their best rates, and what each has forgotten there."""
        curves = {name: self.curves(each, False) for name, each in self.best().items()}
        goal = common_loss({name: [new] for name, (new, _) in curves.items()})
        found = {}
        for name, (new, old) in curves.items():
            loss = at_equal_loss(new, old, goal)
            assert loss is not None  # all of them reach it
            found[name] = loss - old[0]
        return goal, found

    def ends(self) -> dict[tuple[str, float], tuple[float, float]]:
        """End point of every arm with every rate: loss on the new language, and rise of the loss on the old ones."""
        found = {}
        for name, of in self.results.items():
            for each in of:
                rise = fmean(each.rows[-1][old] - each.rows[0][old] for old in self.old)
                found[name, each.lr] = (each.rows[-1][self.language], rise)
        return found

    def _notes(self) -> list[str]:
        goal, forgotten = self.at_equal_loss()
        order = sorted(forgotten, key=lambda name: forgotten[name])
        summary_text = ", ".join(f"{name} {forgotten[name]:.3f}" for name in order)
        found = [f"At {goal:.3f} bits per byte of {self.language}, forgotten in bits per byte: {summary_text}."]
        places = [name for name in order if name.startswith("lora, ") and "parameters" not in name]
        better = [name for name in places if forgotten[name] < forgotten["layra"]]
        if better:
            found.append(f"The edges are not the best layers for this model: {better[0]} forgets less.")
        return found

    def _findings(self) -> dict[str, Any]:
        goal, forgotten = self.at_equal_loss()
        ends = self.ends()
        return {
            "language": self.language,
            "old": list(self.old),
            "equal_loss": goal,
            "forgotten": forgotten,
            "ends": [[*name, *point] for name, point in ends.items()],
            "front": [list(name) for name in pareto(ends)],
            "courses": {name: [each.as_dict() for each in of] for name, of in self.results.items()},
        }


@command("layra", "compare", brief={"steps": 1, "rates": (1e-3,), "sequences": 4})
def compare(
    stack: Stack,
    languages: dict[str, Language],
    old: dict[str, Language],
    *,
    first: Annotated[int, Ge(0)] | None = None,
    last: Annotated[int, Ge(0)] | None = None,
    rates: Annotated[tuple[Annotated[float, Gt(0)], ...], MinLen(1)] = RATES,
    r: Annotated[int, Ge(1)] = 8,
    replay: Annotated[float, Ge(0), Lt(1)] = 0.0,
    config: TrainConfig = TRAINING,
    work: Work = Work(),
) -> ArmComparison:
    """Train LayRA and its baselines on one new language, each with several learning rates, and measure forgetting.

    A single seed is not reliable: repeat it with several before interpreting a small difference.

    Args:
        stack: a pre-trained decoder; it is not changed.
        languages: the new language; exactly one.
        old: languages to keep. Half of all held-out text is for choosing the learning rates, the other half is
            reported.
        first: number of layers at the bottom that LayRA adapts; scaled to the depth by default.
        last: number of layers at the top; scaled to the depth by default.
        rates: learning rates to try for each arm.
        r: rank of LayRA's adapters.
        replay: fraction of old text in an arm that shows the effect of replay; it needs samples of old languages.
        config: length, batch and seed; its learning rate is not used.
        work: folder from which an interrupted run resumes.

    Returns:
        The results of all arms.

    Raises:
        MethodError: for several languages, none to keep, or too little held-out text.
    """
    if len(languages) != 1 or not old:
        raise MethodError(
            f"{len(languages)} new and {len(old)} old languages: give one new and at least one old language"
        )
    name, language = next(iter(languages.items()))
    watched: dict[str, Language] = {}
    for each, known in {**old, name: language}.items():
        watched[CHOOSE.format(each)], watched[each] = halves(each, known)
    samples: list[Sample] = [sample for each in old.values() for sample in each.samples]
    config = config.with_steps(len(language.samples))
    config = replace(config, eval_every=config.eval_every or max(1, (config.steps or 1) // POINTS))
    results: dict[str, list[ArmResult]] = {}
    folder = work.directory()
    for arm in arms(Edges.of(len(stack), first, last), r, replay).values():
        for lr in rates:
            result, _ = follow(
                stack, arm, languages, watched, replace(config, lr=lr), work=folder / f"{arm.name} {lr:g}",
                curves=list(watched), old=samples if arm.replay else (),
            )  # fmt: skip
            results.setdefault(arm.name, []).append(result)
    return ArmComparison(language=name, old=tuple(old), results=results)


def halves(name: str, language: Language) -> tuple[Language, Language]:
    """Split the held-out samples of a language alternately; bytes are divided by the number of labels.

    Args:
        name: name of the language for messages.
        language: the language.
    """
    if len(language.held_out) < 2:
        raise MethodError(f"'{name}' has one held-out sample: give at least two, for choosing and for reporting")
    parts = [replace(language, held_out=language.held_out[start::2], size=1) for start in (0, 1)]
    sizes = [max(1, round(language.size * part.labels / language.labels)) for part in parts]
    first, second = (replace(part, size=size) for part, size in zip(parts, sizes, strict=True))
    return first, second
