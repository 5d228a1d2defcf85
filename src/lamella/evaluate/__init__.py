"""Evaluation: fidelity, cost model, speed, memory and text metrics."""

from lamella.evaluate.answers import answered
from lamella.evaluate.budget import Budget
from lamella.evaluate.confidence import Interval
from lamella.evaluate.cost import PlanCost, StepTimes, cost, measure_step, step_times
from lamella.evaluate.drafting import DraftGain, drafted_prompts
from lamella.evaluate.fidelity import Estimate, Fidelity, FidelityTest
from lamella.evaluate.memory import Memory, peak_memory
from lamella.evaluate.per_byte import ByteLoss
from lamella.evaluate.speed import Ratio, Timing, bench, turns
from lamella.evaluate.texts import TextScores, rouge, sentence_bleu
from lamella.evaluate.writing import writing_cost

__all__ = [
    "Budget",
    "ByteLoss",
    "DraftGain",
    "Estimate",
    "Fidelity",
    "FidelityTest",
    "Interval",
    "Memory",
    "PlanCost",
    "Ratio",
    "StepTimes",
    "TextScores",
    "Timing",
    "answered",
    "bench",
    "cost",
    "drafted_prompts",
    "measure_step",
    "peak_memory",
    "rouge",
    "sentence_bleu",
    "step_times",
    "turns",
    "writing_cost",
]
