"""What the commands do, as Python calls."""

from lamella.pipeline.forgetting import forget
from lamella.pipeline.healing import heal
from lamella.pipeline.job import DEFAULT_METHOD, compress
from lamella.pipeline.planning import first_reaching, make_plan
from lamella.pipeline.repairing import repair
from lamella.pipeline.restoring import restore

__all__ = ["DEFAULT_METHOD", "compress", "first_reaching", "forget", "heal", "make_plan", "repair", "restore"]
