"""References to the model that a plan is made for, and to its named stacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from lamella.errors import PlanError
from lamella.plan import fingerprint
from lamella.plan.document import JsonDocument
from lamella.stack import Blocks, Group, Model, Position, Stack, positions_at, positions_of, sites_of
from lamella.stack.wiring import Sizes

EMBED, NORM, HEAD = "embed", "norm", "head"  # sites of weights outside the layers


class StackReference(JsonDocument):
    """One stack of a model.

    Attributes:
        family: name of its architecture.
        layers: number of layers.
        sublayers: names of the sublayers of each layer, in order.
        sizes: widths of its layers, if they are all alike and the architecture can be narrowed; else None.
        vocab: number of tokens that its embedding has, if they can be removed; else None.
    """

    family: str
    layers: Annotated[int, Field(ge=1, le=10_000)]
    sublayers: Annotated[list[Annotated[str, Field(pattern="^[a-z]+$")]], Field(min_length=1)] = Field(
        default_factory=lambda: ["attn", "mlp"]
    )
    sizes: Sizes | None = None
    vocab: Annotated[int, Field(ge=1)] | None = None

    @property
    def positions(self) -> tuple[Position, ...]:
        """The sublayers of all layers, in the order in which they run."""
        return positions_of(self.layers, self.sublayers)

    @classmethod
    def of(cls, stack: Stack) -> StackReference:
        """Return the reference of a stack."""
        known = stack.architecture.cuttable and not stack.is_altered
        return cls(
            family=stack.architecture.name,
            layers=len(stack),
            sublayers=list(stack.architecture.names),
            sizes=stack.architecture.sizes_of(stack.config) if known else None,
            vocab=_removable_tokens(stack),
        )


def _removable_tokens(stack: Stack) -> int | None:
    """Return the number of tokens of a decoder that is a model by itself; None for any other stack."""
    whole, architecture = stack.model, stack.architecture
    alone = len(stack.architectures) == 1 and not architecture.config
    if not alone or not architecture.causal or architecture.modality != "text":
        return None
    embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    tokens = getattr(stack.config, "vocab_size", None)
    alike = isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear) and embedding.num_embeddings == tokens
    return tokens if alike and head.out_features == tokens else None


class BlocksReference(JsonDocument):
    """The blocks of a model that is not a chain of layers.

    Attributes:
        family: class of the model.
        savings: by site, the number of parameters that dropping the block removes.
    """

    family: str
    savings: Annotated[dict[str, Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ModelReference(JsonDocument):
    """The model that a plan is made for: ``architecture`` must match, while different ``weights`` only cause a warning.

    Attributes:
        architecture: hash of its config and parameter shapes.
        weights: digest of the tensors in its files; None for a model in memory.
        name: name of the model.
        stacks: its stacks by name, in the order in which they run; empty for a model with blocks.
        stack: the stack that sites without a stack name refer to; if None, the only one.
        blocks: the blocks of a model that is not a chain of layers.
    """

    architecture: str
    weights: str | None = None
    name: str | None = None
    stacks: dict[str, StackReference] = Field(default_factory=dict)
    stack: str | None = None
    blocks: BlocksReference | None = None

    def model_post_init(self, _: Any) -> None:
        """Check that stacks and blocks are consistent."""
        if bool(self.stacks) == (self.blocks is not None):
            raise ValueError("stacks: a model has stacks, or else blocks")
        if self.stack is not None and self.stack not in self.stacks:
            raise ValueError(f"stack: there is no '{self.stack}'; the model has {' and '.join(self.stacks)}")

    @classmethod
    def of(cls, model: Model | Blocks) -> ModelReference:
        """Return the reference of a model, or of one of its stacks, which sites without a stack name then refer to."""
        if isinstance(model, Blocks):
            blocks = BlocksReference(family=type(model.model).__name__, savings=model.savings())
            return cls(architecture=fingerprint.architecture(model.model), name=model.name, blocks=blocks)
        several = len(model.architectures) > 1
        return cls(
            architecture=fingerprint.architecture(model.model),
            weights=model.files_digest,
            name=model.name,
            stacks={name: StackReference.of(stack) for name, stack in model.stacks.items()},
            stack=model.stack if several and isinstance(model, Stack) else None,
        )

    @classmethod
    def single(cls, architecture: str, family: str, layers: int, stack: str = "text", **more: Any) -> ModelReference:
        """Return the reference of a model with one stack of attention and MLP sublayers.

        Args:
            architecture: hash of its config and parameter shapes.
            family: name of the stack's architecture.
            layers: number of layers.
            stack: name of the stack.
            more: other fields of the reference.
        """
        return cls(architecture=architecture, stacks={stack: StackReference(family=family, layers=layers)}, **more)

    @property
    def description(self) -> str:
        """The kind and size of the model in words."""
        if self.blocks is not None:
            return f"a {self.blocks.family} of {len(self.blocks.savings)} blocks"
        return " and ".join(f"a {each.family} of {each.layers} layers" for each in self.stacks.values())

    @property
    def default(self) -> str:
        """The stack that sites without a stack name refer to.

        Raises:
            PlanError: for a model with several stacks of which none was chosen.
        """
        if self.stack is None and len(self.stacks) > 1:
            raise PlanError(f"{self.name} has the stacks {' and '.join(self.stacks)}: name one of them")
        return self.stack or next(iter(self.stacks))

    def __getitem__(self, stack: str | None) -> StackReference:
        return self.stacks[self.default if stack is None else stack]

    @property
    def family(self) -> str:
        """The architecture of the default stack."""
        return self[None].family

    @property
    def layers(self) -> int:
        """The number of layers of the default stack."""
        return self[None].layers

    @property
    def sizes(self) -> Sizes | None:
        """The widths of the default stack."""
        return self[None].sizes

    @property
    def positions(self) -> tuple[Position, ...]:
        """The sublayers of the default stack."""
        return self[None].positions

    def split(self, site: str) -> tuple[str, str]:
        """Return the stack of a site, and the site within it.

        >>> ModelReference.single("0" * 64, "llama", 2).split("text.layers.1")
        ('text', 'layers.1')

        Raises:
            PlanError: for a site without a stack name if the model has several stacks.
        """
        name, dot, rest = site.partition(".")
        if dot and name in self.stacks:
            return name, rest
        if self.stack is None and len(self.stacks) > 1:
            choices = " or ".join(f"{stack}.{site}" for stack in self.stacks)
            raise PlanError(f"'{site}' names no stack; write {choices}")
        return self.default, site

    def at(self, site: str) -> tuple[str, Group]:
        """Return the stack of a site, and the positions that it covers.

        Raises:
            PlanError: for an invalid site, or one that the model does not have.
        """
        stack, rest = self.split(site)
        return stack, positions_at(rest, self.stacks[stack].positions)

    def sites(self, chosen: Mapping[str, Iterable[tuple[int, str]]]) -> list[str]:
        """Return the shortest list of sites that covers these positions of each stack."""
        found = []
        for stack, reference in self.stacks.items():
            prefix = "" if len(self.stacks) == 1 or stack == self.stack else f"{stack}."
            found += [prefix + site for site in sites_of(chosen.get(stack, ()), reference.positions)]
        return found
