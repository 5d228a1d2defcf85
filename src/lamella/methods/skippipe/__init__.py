"""SkipPipe: training over slow links by paths that leave out stages."""

from lamella.methods.skippipe.method import omit, plan, skippipe
from lamella.methods.skippipe.network import Load, Network, Node, published
from lamella.methods.skippipe.recipe import train
from lamella.methods.skippipe.schedule import Schedule

__all__ = ["Load", "Network", "Node", "Schedule", "omit", "plan", "published", "skippipe", "train"]
