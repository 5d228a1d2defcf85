"""What the commands do, as Python calls."""

from lamella.jobs.compress import DEFAULT_METHOD, compress
from lamella.jobs.heal import heal
from lamella.jobs.planning import first_reaching, make_plan

__all__ = [
    "DEFAULT_METHOD",
    "compress",
    "first_reaching",
    "heal",
    "make_plan",
]
