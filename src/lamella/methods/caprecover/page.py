"""Figures and summaries: accuracy of the attackers at every cut, or recovered captions with their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import counted, listed, number, percent
from lamella.report.figures import Figure, Images, Lines
from lamella.results import Evidence, Summary, Table


def figures(evidence: Evidence) -> list[Figure]:
    """Return attack accuracies over the cuts, or recovered captions with their images."""
    found = evidence.findings
    if "captions" in found:
        return [_saved_processor(found["samples"])]
    rows = found["attacks"] if "attacks" in found else found["tokens"]
    lines = {name: [100 * each["adaptive"]["mean"] for each in group] for name, group in _by_attacker(rows).items()}
    cuts = list(dict.fromkeys(row["cut"] for row in rows))
    target = "Classes" if "attacks" in found else "Tokens"
    caption = f"{target} recovered by attackers who know the defence."
    return [Lines("cut", "accuracy (%)", lines, positions=cuts, caption=caption)]


def _by_attacker(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = ", ".join(filter(None, (row.get("attacker"), row["guard"])))
        groups.setdefault(name, []).append(row)
    return groups


def _saved_processor(samples: Sequence[Mapping[str, Any]]) -> Images:
    names = list(samples[0]["recovered"])
    return Images(
        [each["image"] for each in samples],
        [[each["text"], *(each["recovered"][name] for name in names)] for each in samples],
        ["caption", *names],
        alt="an attacked image",
        caption="True and recovered captions.",
    )


def summary(evidence: Evidence) -> Summary:
    """Summarise what the attackers recover, and the recommended cut."""
    found = evidence.findings
    if "captions" in found:
        return _of_captions(found)
    return _of_tokens(found) if "tokens" in found else _of_classes(found)


def _of_tokens(found: Mapping[str, Any]) -> Summary:
    rows = [[each["cut"], each["guard"], *map(_spread, _both(each))] for each in found["tokens"]]
    worst = max(each["adaptive"]["mean"] for each in found["tokens"])
    verdict = (
        f"Up to {percent(worst, 0)} of the tokens are recovered; always guessing the most frequent token is right for "
        f"{percent(found['majority'], 0)}."
    )
    columns = ("cut", "defence", "attacker knows it", "attacker does not")
    return Summary(verdict, [Table("Recovered tokens (%)", columns, rows)])


def _of_classes(found: Mapping[str, Any]) -> Summary:
    best, limit = found["recommended"], f"{percent(found['max_leak'], 0)} of the classes"
    kinds = listed(list(dict.fromkeys(each["attacker"] for each in found["attacks"])))
    attack = f"attackers ({kinds}) with {counted(found['images']['attacker'], 'image')}"
    is_sure = all(each["converged"] for each in found["attacks"])
    verdict = f"No cut and no tested defence keeps {attack} from naming more than {limit}."
    if best:
        verdict = (
            f"Cut at {best['cut']} with the defence {best['guard']}: {attack}, trained until they stopped improving, "
            f"name no more than {limit}; others may name more."
        )
    elif not is_sure:
        verdict = "No cut is recommended."
    if not is_sure:
        verdict += " Some attackers were still improving when their training ended: give more steps."
    verdict += (
        f" The model names {percent(found['task'], 0)}; always guessing the most frequent class is right for "
        f"{percent(found['majority'], 0)}."
    )
    attacks = [
        [each["cut"], each["attacker"], each["guard"], *map(_spread, _both(each)), each["steps"]]
        for each in found["attacks"]
    ]
    links = [
        [
            each["cut"],
            each["guard"],
            each["bytes"],
            each["ratio"] or "",
            each["output_change"],
            100 * (each["task"] or 0),
        ]
        for each in found["links"]
    ]
    costs = ("cut", "defence", "bytes", "variance of features over noise", "output change", "task accuracy (%)")
    near = [[cut, 100 * value] for cut, value in found["nearest"].items()]
    return Summary(
        verdict,
        [
            Table(
                "Recovered classes (%)",
                ("cut", "attacker", "defence", "attacker knows it", "attacker does not", "steps"),
                attacks,
            ),
            Table("Costs of the defences", costs, links),
            Table("Retrieval baseline: class of the attacker's most similar image (%)", ("cut", "accuracy"), near),
        ],
    )


def _both(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row["adaptive"], row["static"]]


def _spread(figure: Mapping[str, Any]) -> str:
    mean, half = 100 * figure["mean"], 100 * (figure["high"] - figure["mean"])
    return f"{mean:.1f} ± {half:.1f}" if half else f"{mean:.1f}"


def _of_captions(found: Mapping[str, Any]) -> Summary:
    rows: list[list[Any]] = []
    for each in found["captions"]:
        ours, prior = each["scores"], each["prior"]
        gap = ours["rougeL"] - prior["rougeL"]
        near = each["retrieved"]["rougeL"]
        rows.append(
            [each["cut"], each["guard"], ours["rougeL"], prior["rougeL"], gap, near, ours["bleu"], prior["bleu"],
             each["steps"]]
        )  # fmt: skip
    gap, cut = max((row[4], row[0]) for row in rows)
    columns = ("cut", "defence", "ROUGE-L", "ROUGE-L, other images", "gap", "ROUGE-L, retrieved", "BLEU",
               "BLEU, other images", "steps")  # fmt: skip
    verdict = f"Captions leak most at {cut}: ROUGE-L is {number(gap)} points above captions from other images."
    if gap <= 0:
        verdict = "At no cut are captions better than captions generated from other images."
    return Summary(verdict, [Table("Scores of the captions (0 to 100)", columns, rows)])
