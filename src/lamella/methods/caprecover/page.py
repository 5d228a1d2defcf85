"""From evidence to its figures: what is read at every cut, and captions beside their pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamella.formatting import number, percent
from lamella.report.figures import Figure, Images, Lines
from lamella.results import Evidence, Summary, Table


def figures(evidence: Evidence) -> list[Figure]:
    """Accuracies over the cuts, or captions beside their images."""
    found = evidence.findings
    if "captions" in found:
        return [_beside(found["samples"])]
    rows = found["attacks"] if "attacks" in found else found["tokens"]
    lines = {name: [100 * each["adaptive"]["mean"] for each in group] for name, group in _by_attacker(rows).items()}
    cuts = list(dict.fromkeys(row["cut"] for row in rows))
    read = "Classes" if "attacks" in found else "Tokens"
    caption = f"{read} that are read, in percent, by attackers who know the defence."
    return [Lines("cut", "percent", lines, positions=cuts, caption=caption)]


def _by_attacker(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = ", ".join(filter(None, (row.get("reader"), row["guard"])))
        groups.setdefault(name, []).append(row)
    return groups


def _beside(samples: Sequence[Mapping[str, Any]]) -> Images:
    names = list(samples[0]["written"])
    return Images(
        [each["picture"] for each in samples],
        [[each["text"], *(each["written"][name] for name in names)] for each in samples],
        ["caption", *names],
        alt="an image that was attacked",
        caption="What is shown, and what was written.",
    )


def summary(evidence: Evidence) -> Summary:
    """What leaks, and where the model may be cut."""
    found = evidence.findings
    if "captions" in found:
        return _of_captions(found)
    return _of_tokens(found) if "tokens" in found else _of_classes(found)


def _of_tokens(found: Mapping[str, Any]) -> Summary:
    rows = [[each["cut"], each["guard"], *map(_spread, _both(each))] for each in found["tokens"]]
    worst = max(each["adaptive"]["mean"] for each in found["tokens"])
    verdict = (
        f"Up to {percent(worst, 0)} of the tokens are read; the most frequent one is right for "
        f"{percent(found['majority'], 0)}."
    )
    return Summary(verdict, [Table("Tokens that are read, percent", ("cut", "defence", "knows it", "does not"), rows)])


def _of_classes(found: Mapping[str, Any]) -> Summary:
    best, most = found["recommended"], f"{percent(found['max_leak'], 0)} of the classes"
    verdict = f"At no cut and with no defence that was tried do attackers name at most {most}."
    if best:
        verdict = f"Cut at {best['cut']} with the defence {best['guard']}: no attacker names more than {most}."
    verdict += (
        f" The model names {percent(found['task'], 0)}; the most frequent class is right for "
        f"{percent(found['majority'], 0)}."
    )
    attacks = [[each["cut"], each["reader"], each["guard"], *map(_spread, _both(each))] for each in found["attacks"]]
    links = [
        [each["cut"], each["guard"], each["bytes"], each["ratio"] or "", each["moved"], 100 * (each["task"] or 0)]
        for each in found["links"]
    ]
    costs = ("cut", "defence", "bytes", "features over noise, variance", "output moves by", "task, percent")
    near = [[cut, 100 * value] for cut, value in found["nearest"].items()]
    return Summary(
        verdict,
        [
            Table("Classes that are named, percent", ("cut", "reader", "defence", "knows it", "does not"), attacks),
            Table("What a defence costs", costs, links),
            Table("Of the most similar picture of the attacker's, percent", ("cut", "class is right"), near),
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
        ours, prior = each["scores"], each["of other pictures"]
        gap = ours["rougeL"] - prior["rougeL"]
        rows.append([each["cut"], each["guard"], ours["rougeL"], prior["rougeL"], gap, ours["bleu"], prior["bleu"]])
    gap, cut = max((row[4], row[0]) for row in rows)
    columns = ("cut", "defence", "ROUGE-L", "of other pictures", "gap", "BLEU", "of other pictures")
    verdict = f"Captions say most at {cut}: {number(gap)} points of ROUGE-L more than captions of other pictures."
    if gap <= 0:
        verdict = "At no cut do captions say more of their pictures than captions of other pictures do."
    return Summary(verdict, [Table("Captions, in points of 100", columns, rows)])
