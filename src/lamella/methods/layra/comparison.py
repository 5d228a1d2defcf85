"""All controls on one new language, each with several rates: what a user runs before trusting the edges."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, MinLen

from lamella.errors import MethodError
from lamella.files import Work
from lamella.methods.layra.baselines import Course, arms, at_equal_loss, common_loss, follow
from lamella.methods.layra.edges import Edges
from lamella.methods.layra.languages import Language
from lamella.methods.layra.recipe import TRAINING
from lamella.registry import command
from lamella.results import Study
from lamella.search import pareto
from lamella.stack import Stack
from lamella.train import Sample, TrainConfig

RATES = (1e-4, 3e-4, 1e-3)  # around the paper's 3e-4 (ours)
POINTS = 10  # of each curve, where the training names none
CHOOSE = "{}, to choose by"


@dataclass(kw_only=True)
class Comparison(Study):
    """What every arm did with every rate.

    Attributes:
        language: the new one.
        old: the languages that the model had.
        courses: by arm, one for each rate.
    """

    language: str
    old: tuple[str, ...]
    courses: dict[str, list[Course]]

    def __post_init__(self) -> None:
        self.findings, self.notes = self._findings(), self._notes()

    def curves(self, course: Course, choose: bool) -> tuple[list[float], list[float]]:
        """Loss on the new language and mean loss on the old ones, on the text to choose by or to report on."""
        new, *old = (CHOOSE.format(name) if choose else name for name in (self.language, *self.old))
        return course.curve[new], [fmean(point) for point in zip(*(course.curve[name] for name in old), strict=True)]

    def best(self) -> dict[str, Course]:
        """Each arm with the rate that forgets least when all have learnt as much, on the text to choose by."""
        goal = common_loss({name: [self.curves(each, True)[0] for each in of] for name, of in self.courses.items()})
        found = {}
        for name, of in self.courses.items():
            losses = [(at_equal_loss(*self.curves(each, True), goal), place) for place, each in enumerate(of)]
            found[name] = of[min((loss, place) for loss, place in losses if loss is not None)[1]]
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
        """Where every arm ends with every rate: loss on the new language, and by how much the old ones have risen."""
        found = {}
        for name, of in self.courses.items():
            for each in of:
                rise = fmean(each.rows[-1][old] - each.rows[0][old] for old in self.old)
                found[name, each.lr] = (each.rows[-1][self.language], rise)
        return found

    def _notes(self) -> list[str]:
        goal, forgotten = self.at_equal_loss()
        order = sorted(forgotten, key=lambda name: forgotten[name])
        said = ", ".join(f"{name} {forgotten[name]:.3f}" for name in order)
        found = [f"At {goal:.3f} bits per byte of {self.language}, forgotten in bits per byte: {said}."]
        places = [name for name in order if name.startswith("lora, ") and "parameters" not in name]
        better = [name for name in places if forgotten[name] < forgotten["layra"]]
        if better:
            found.append(f"The edges are not the best place for this model: {better[0]} forgets less.")
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
            "courses": {name: [each.as_dict() for each in of] for name, of in self.courses.items()},
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
) -> Comparison:
    """Teach a model one language by LayRA and by its controls, each with several rates, and see what each forgets.

    One seed tells little: call it with several before believing a small difference.

    Args:
        stack: a pre-trained decoder; it is not changed.
        languages: the new language; a single one.
        old: what the model should keep. Half of all held-out text chooses the rates, the other half is reported on.
        first: how many layers at the bottom LayRA adapts; scaled to the depth when left out.
        last: how many at the top.
        rates: the highest rates to try of each arm.
        r: rank of LayRA's adapters.
        replay: share of old text in an arm that shows what replay would bring; it needs samples of old languages.
        config: length, batch and seed; its rate is not used.
        work: where an interrupted run goes on from.

    Raises:
        MethodError: for several languages, none to keep, or too little held-out text.
    """
    if len(languages) != 1 or not old:
        raise MethodError(f"{len(languages)} new and {len(old)} old languages: compare on one new, one old at least")
    name, language = next(iter(languages.items()))
    watched: dict[str, Language] = {}
    for each, known in {**old, name: language}.items():
        watched[CHOOSE.format(each)], watched[each] = halves(each, known)
    samples: list[Sample] = [sample for each in old.values() for sample in each.samples]
    config = config.with_steps(len(language.samples))
    config = replace(config, eval_every=config.eval_every or max(1, (config.steps or 1) // POINTS))
    courses: dict[str, list[Course]] = {}
    folder = work.directory()
    for arm in arms(Edges.of(len(stack), first, last), r, replay).values():
        for lr in rates:
            course, _ = follow(
                stack, arm, languages, watched, replace(config, lr=lr), work=folder / f"{arm.name} {lr:g}",
                curves=list(watched), old=samples if arm.replay else (),
            )  # fmt: skip
            courses.setdefault(arm.name, []).append(course)
    return Comparison(language=name, old=tuple(old), courses=courses)


def halves(name: str, language: Language) -> tuple[Language, Language]:
    """A language with every other held-out sample, and with the rest; bytes are shared by the number of labels."""
    if len(language.held_out) < 2:
        raise MethodError(f"'{name}' has one held-out sample: give two or more, to choose by and to report on")
    parts = [replace(language, held_out=language.held_out[start::2], size=1) for start in (0, 1)]
    sizes = [max(1, round(language.size * part.labels / language.labels)) for part in parts]
    first, second = (replace(part, size=size) for part, size in zip(parts, sizes, strict=True))
    return first, second
