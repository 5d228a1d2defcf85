"""Measuring what was gained and lost."""

from lamella.evaluate.cost import Cost, StepTimes, cost, measure_step
from lamella.evaluate.diversity import Diversity, Variety, diversity
from lamella.evaluate.fidelity import Estimate, Fidelity, FidelityTest
from lamella.evaluate.forgetting import Answers, Forgetting, Guard, answers, membership, untrained_like, zrf
from lamella.evaluate.memory import Memory, peak_memory
from lamella.evaluate.speed import Ratio, Timing, bench

__all__ = [
    "Answers",
    "Cost",
    "Diversity",
    "Estimate",
    "Fidelity",
    "FidelityTest",
    "Forgetting",
    "Guard",
    "Memory",
    "Ratio",
    "StepTimes",
    "Timing",
    "Variety",
    "answers",
    "bench",
    "cost",
    "diversity",
    "measure_step",
    "membership",
    "peak_memory",
    "untrained_like",
    "zrf",
]
