"""Figures and summaries of MuraNet: training losses, plans with their ground truth, and gradients by stage."""

from __future__ import annotations

from typing import Any

from lamella.formatting import counted, listed, number, percent
from lamella.report.figures import Figure, Images, Lines
from lamella.results import Evidence, Summary, Table

TRAINED, READ = "recogniser", "readings"


def figures(evidence: Evidence) -> list[Figure]:
    """Draw the losses of a training, plans with their ground truth, or gradients by stage."""
    found = evidence.findings
    if "curves" in found:
        return _training(found)
    if "images" in found:
        return [_plan(each) for each in found["images"]]
    return [_agreement(found["stages"])] if "split" in found else []


def _training(found: dict[str, Any]) -> list[Figure]:
    losses = {name: found["curves"][name] for name in ("walls", "openings") if name in found["curves"]}
    lines = {name.rpartition(", ")[2]: values for name, values in found["curves"].items() if name.startswith("cosine")}
    caption = "Cosine between the gradients of the two tasks on each shared stage, during training."
    return [
        Lines("point of the log", "loss", {"both": found["loss"], **losses}),
        Lines("point of the log", "cosine", lines, caption=caption),
    ]


def _plan(each: dict[str, Any]) -> Images:
    parts = "the plan, the prediction, and the ground truth" if each["truth"] else "the plan and the prediction"
    alt = f"{each['plan']}: {parts}"
    return Images([each["image"]], alt=alt, caption=f"{alt}. Doors are orange, windows blue.")


def _agreement(rows: list[dict[str, float]]) -> Lines:
    lines = {
        "mean": [row["cosine"] for row in rows],
        "one standard deviation above": [row["cosine"] + row["spread"] for row in rows],
        "one standard deviation below": [row["cosine"] - row["spread"] for row in rows],
    }
    caption = "Cosine between the gradients of walls and of openings on each shared stage, with its spread over groups."
    return Lines("stage", "cosine", lines, positions=[row["stage"] for row in rows], caption=caption)


def summary(evidence: Evidence) -> Summary:
    """Summarise a training, an evaluation, a recognition, or a study of stages."""
    found = evidence.findings
    if evidence.kind == TRAINED:
        return _trained(found)
    if evidence.kind == READ:
        return _read(found)
    if "split" in found:
        return _branch(found)
    return _stages(found) if "gains" in found else _judged(found)


def _trained(found: dict[str, Any]) -> Summary:
    last = f"; the loss ends at {number(found['loss'][-1])}" if found["loss"] else ""
    rows = [[name, values[0], values[-1]] for name, values in found["curves"].items() if values]
    table = Table("Losses at the first and the last point of the log", ["", "first", "last"], rows)
    return Summary(f"A network of {counted(found['parameters'], 'parameter')} was trained{last}.", [table])


def _judged(found: dict[str, Any]) -> Summary:
    tables, results = [], []
    if "wall iou" in found:
        results.append(f"walls at an IoU of {percent(found['wall iou'])}")
        grey = [[f"grey below {threshold}", 100 * iou] for threshold, iou in found["grey"].items()]
        rows = [["the network", 100 * found["wall iou"]], *grey]
        tables.append(Table("Wall IoU over all pixels, in percent", ["", "IoU"], rows))
    if "openings" in found:
        rows = [[name, *(_hundred(each[at]) for at in ("ap50", "ap75", "ap")), each["boxes"]]
                for name, each in found["openings"].items()]  # fmt: skip
        tables.append(Table("Average precision of openings, in percent",
                            ["", "at IoU 0.5", "at 0.75", "0.5 to 0.95", "boxes"], rows))  # fmt: skip
        known = [each["ap50"] for each in found["openings"].values() if each["ap50"] is not None]
        results += [f"openings at an AP50 of {percent(sum(known) / len(known))}"] if known else []
    box = found["median box"]
    lines = [] if box is None else [f"The median opening is {box[0]:.3g} x {box[1]:.3g} pixels."]
    verdict = f"On {counted(found['plans'], 'plan')} the network recognises {listed(results)}."
    return Summary(verdict, tables, lines)


def _hundred(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _read(found: dict[str, Any]) -> Summary:
    kinds = list(found["plans"][0]["openings"]) if found["plans"] else []
    rows = [
        [each["plan"], _hundred(each["walls"]), each["outlines"], *each["openings"].values(), each["snapped"]]
        for each in found["plans"]
    ]
    heads = ["plan", "wall, percent", "outlines", *kinds, "openings in a wall"]
    return Summary(
        f"The network has recognised {counted(len(rows), 'plan')}.", [Table("Recognised objects", heads, rows)]
    )


def _branch(found: dict[str, Any]) -> Summary:
    split, shared = found["split"], found["shared"]
    verdict = (
        f"The gradients of the tasks agree on all shared stages: {counted(shared, 'stage')}."
        if split == shared
        else f"The gradients disagree from stage {split} on: `tune --split {split}` gives each task its own stages."
    )
    rows = [
        [row["stage"], row["walls"], row["openings"], row["cosine"], row["spread"], 100 * row["negative"],
         row["parameters"]]
        for row in found["stages"]
    ]  # fmt: skip
    heads = [
        "stage",
        "norm, walls",
        "norm, openings",
        "cosine",
        "spread",
        "negative, percent",
        "parameters if split here",
    ]
    costs = found["parameters"]
    line = (
        f"Sharing all stages takes {counted(costs['shared'], 'parameter')}, the proposed split "
        f"{counted(costs['split'], 'parameter')}."
    )
    return Summary(verdict, [Table(f"Gradients over {counted(found['groups'], 'group')}", heads, rows)], [line])


def _stages(found: dict[str, Any]) -> Summary:
    best = found["gains"][0]
    rows = [
        [row["stage"], row["before"], row["after"], row["gain"], row["walls"], row["openings"], row["parameters"]]
        for row in found["gains"]
    ]
    heads = ["after stage", "loss before", "after", "gain", "gain, walls", "gain, openings", "parameters"]
    table = Table(
        f"Training one block alone, {counted(found['steps'], 'step')} on {counted(found['plans'], 'plan')}", heads, rows
    )
    verdict = f"Attention helps most after stage {best['stage']}: the loss falls by {number(best['gain'])}."
    if best["gain"] <= 0:
        verdict = "Attention lowers the loss after none of these stages."
    return Summary(verdict, [table])
