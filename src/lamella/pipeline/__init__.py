"""What the commands do, as Python calls."""

from lamella.pipeline.healing import heal
from lamella.pipeline.job import DEFAULT_METHOD, compress
from lamella.pipeline.planning import first_reaching, make_plan

__all__ = ["DEFAULT_METHOD", "compress", "first_reaching", "heal", "make_plan"]
