"""Task scores with lm-evaluation-harness: Lamella's own tasks, the harness's, and custom task files."""

from lamella.evaluate.tasks.opening import OWN, open_tasks
from lamella.evaluate.tasks.scoring import TaskScore, score

__all__ = ["OWN", "TaskScore", "open_tasks", "score"]
