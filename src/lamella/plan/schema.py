"""The plan: a small, readable JSON document that describes what each named site of one model does."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, Field, ValidationError

from lamella.errors import MethodError, PlanError
from lamella.plan.chain import Chain, Run
from lamella.plan.document import JsonDocument, SidefileDocument, refusal, schema_of, text_of
from lamella.plan.entries import (
    AdapterReference,
    HeadWidth,
    HiddenWidth,
    ModuleReference,
    PhasedPath,
    PolicyReference,
    RewriteReference,
    WeightEdit,
    Width,
)
from lamella.plan.reference import EMBED, HEAD, NORM, BlocksReference, ModelReference, StackReference
from lamella.plan.width import Widths
from lamella.stack import ARCHITECTURES, Blocks, Model, Position, cuttable

VOCAB = "vocab"  # the site of the tokens
PHASES: tuple[Literal["prefill", "decode"], ...] = ("prefill", "decode")
_WIDTH_SITE = re.compile(r"vocab|hidden\.channels|layers\.(\d+)\.(mlp\.channels|attn\.heads)")


def _finite(scores: dict[str, float]) -> dict[str, float]:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(f"score '{name}' is not finite; plan again with more calibration text or in float32")
    return scores


class Decision(JsonDocument):
    """The decision of a plan: every named site, path and policy is applied, or the plan is refused.

    Attributes:
        drop: sites that do not run, such as ``layers.2.mlp`` or ``layers.9``; in a model with several stacks,
            ``encoder.layers.9`` or ``decoder.layers.0.cross``; in a model that is not a chain of layers,
            ``unet.down.1.resnets.0``.
        width: the indices that are kept of ``layers.4.mlp.channels`` (a list), ``layers.4.attn.heads`` (a
            :class:`HeadWidth`) and ``hidden.channels`` (a list or a :class:`HiddenWidth`), as in the original; and the
            ids of the kept tokens as ``vocab``, ascending, whose new ids are their indices in that list.
        path: by stack, the layers that run in each phase, in order; other stacks run unchanged.
        weights: weight edits, in the order in which they are applied.
        modules: by site, the network that the plan inserts there.
        adapters: adapters on the linear layers of some sites.
        policies: by stack, the policy that decides at run time.
        rewrite: a rewriting of the model that computes the same.
    """

    drop: list[str] = Field(default_factory=list)
    width: Width = Field(default_factory=dict)
    path: dict[str, PhasedPath] = Field(default_factory=dict)
    weights: list[WeightEdit] = Field(default_factory=list)
    modules: dict[str, ModuleReference] = Field(default_factory=dict)
    adapters: list[AdapterReference] = Field(default_factory=list)
    policies: dict[str, PolicyReference] = Field(default_factory=dict)
    rewrite: RewriteReference | None = None

    def _parts(self) -> Sequence[SidefileDocument]:
        return [*self.weights, *self.modules.values(), *self.adapters, *self.policies.values()]

    @property
    def decision(self) -> dict[str, Any]:
        """The fields of the decision by name."""
        return {name: getattr(self, name) for name in Decision.model_fields}

    @property
    def policy(self) -> PolicyReference | None:
        """The policy of a plan with one policy; None if there is none."""
        return next(iter(self.policies.values()), None)


FILE = "plan.json"  # name of a plan in a folder


class Plan(Decision):
    """What each named site of one model does.

    The normal form for one stack is :meth:`chain`; the properties that a plan shares with a chain are those of the
    stack that sites without a stack name refer to.

    Attributes:
        schema_: version of the format.
        model: the model that the plan is bound to.
        provenance: how the plan was made: method, options, data, seed, version.
    """

    schema_: Literal["lamella.plan/2"] = Field("lamella.plan/2", alias="schema")
    model: ModelReference
    provenance: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a plan; see :meth:`parse`.

        Args:
            path: its file, or a folder with ``plan.json``. For the file of a series, its last plan is returned.
        """
        path = Path(path) / FILE if Path(path).is_dir() else path
        text = text_of(path)
        if schema_of(text).startswith("lamella.series/"):
            return cast(Self, SeriesDocument.of_file(text, path).plan(-1))
        return cls.of_file(text, path)

    def model_post_init(self, _: Any) -> None:
        """Check the decision against the model that the plan is bound to."""
        if self.model.blocks is not None:
            self._check_blocks(self.model.blocks)
            return
        for index, site in enumerate(self.drop):
            _inside(self.model, site, f"entry {index}")
        for index, edit in enumerate(self.weights):
            for site in edit.sites:
                _inside(self.model, site, f"weights: entry {index}", outside=True)
        for stack, path in self.path.items():
            reference = _stack_of(self.model, stack, "path")
            for phase in PHASES:
                wrong = [layer for layer in getattr(path, phase) if layer >= reference.layers]
                if wrong:
                    last = reference.layers - 1
                    raise ValueError(
                        f"path.{stack}.{phase}: layer {wrong[0]} is out of range; the stack has 0 to {last}"
                    )
        if not any(self.chain(stack).runs("decode") or self._networks(stack) for stack in self.model.stacks):
            raise ValueError("nothing is left to run; drop fewer sites")
        for site, kept in self.width.items():
            _check_width(site, kept, self.model)
        self._check_modules()
        self._check_adapters()
        if self.rewrite is not None and any(value for name, value in self.decision.items() if name != "rewrite"):
            raise ValueError("rewrite: such a plan can do nothing else: apply the rest first, and rewrite the result")
        for stack, policy in self.policies.items():
            reference = _stack_of(self.model, stack, "policies")
            if stack in self.path or self.chain(stack).dropped or self.width or self._networks(stack):
                raise ValueError(
                    f"policies.{stack}: a policy decides for the whole stack, so drop, width, path and modules must "
                    "be empty there"
                )
            if len(policy.work) not in (0, reference.layers):
                raise ValueError(f"policies.{stack}.work: {len(policy.work)} entries for {reference.layers} layers")
            if any(len(each) != len(reference.sublayers) for each in policy.work):
                raise ValueError(f"policies.{stack}.work: each layer has {len(reference.sublayers)} sublayers")

    def _check_blocks(self, blocks: BlocksReference) -> None:
        others = [name for name, value in self.decision.items() if value and name != "drop"]
        if others:
            raise ValueError(
                f"{others[0]}: in a model that is not a chain of layers, blocks can be dropped and nothing else"
            )
        for index, site in enumerate(self.drop):
            if site not in blocks.savings:
                known = next(iter(blocks.savings))
                raise ValueError(f"entry {index}: '{site}' is not a block of the model; a block is like '{known}'")

    def _check_modules(self) -> None:
        taken: dict[tuple[str, Position], str] = {}
        for site in self.modules:
            stack, group = _inside(self.model, site, "modules")
            for position in group:
                other = taken.setdefault((stack, position), site)
                if other != site:
                    raise ValueError(f"modules: '{other}' and '{site}' overlap: insert one network there")
                if position in self.chain(stack).dropped:
                    raise ValueError(f"modules: '{site}' is dropped as well: drop it, or insert a network there")
            if stack in self.path:
                raise ValueError(f"modules: '{site}' is in a stack whose path changes: choose one of the two")

    def _check_adapters(self) -> None:
        taken: dict[tuple[str, Position], int] = {}
        for index, adapter in enumerate(self.adapters):
            for site in adapter.sites:
                stack, group = _inside(self.model, site, f"adapters: entry {index}")
                if any(taken.setdefault((stack, position), index) != index for position in group):
                    raise ValueError(f"adapters: two of them are at '{site}': a site has one adapter")

    def _networks(self, stack: str) -> dict[str, ModuleReference]:
        """Return the networks of one stack, by their site within it."""
        found = {self.model.split(site): module for site, module in self.modules.items()}
        return {site: module for (name, site), module in found.items() if name == stack}

    def chain(self, stack: str | None = None) -> Chain:
        """Return the normal form of what the plan does to one stack, without its networks.

        Args:
            stack: name of the stack; if None, the default stack.
        """
        name = self.model.default if stack is None else stack
        dropped = {each for site in self.drop for at, group in [self.model.at(site)] if at == name for each in group}
        return Chain(
            self.model.stacks[name],
            frozenset(dropped),
            self.path.get(name),
            self.policies.get(name),
            self._shares(name),
        )

    def modules_of(self, stack: str) -> dict[tuple[Position, ...], ModuleReference]:
        """Return the networks of one stack, by the positions of their sites."""
        networks = self._networks(stack).items()
        return {self.model.at(f"{stack}.{site}")[1]: module for site, module in networks}

    @property
    def widths(self) -> Widths:
        """The normal form of ``width``."""
        channels, heads, hidden, rescale, vocab = {}, {}, None, False, None
        for site, kept in self.width.items():
            _, inside = self.model.split(site)
            if isinstance(kept, HeadWidth):
                heads[_layer_of(inside)] = kept.heads()
            elif isinstance(kept, HiddenWidth):
                hidden, rescale = kept.keep, kept.rescale
            elif inside == "hidden.channels":
                hidden = kept
            elif inside == VOCAB:
                vocab = kept
            else:
                channels[_layer_of(inside)] = kept
        return Widths(channels, heads, hidden, rescale, vocab)

    @property
    def vocab(self) -> Sequence[int] | None:
        """The ids of the tokens that the plan keeps, ascending; None if it keeps all, with their ids."""
        return self.widths.vocab

    @property
    def renames_tokens(self) -> bool:
        """Whether the result has other ids for its tokens, so that texts have to be tokenized for it."""
        return self.vocab is not None

    def _shares(self, stack: str) -> list[tuple[float, ...]]:
        """Return the remaining fraction of the weight matrices of each sublayer of each layer."""
        reference = self.model.stacks[stack]
        whole, widths = reference.sizes, self.widths
        if whole is None or not self.width:
            return [(1.0,) * len(reference.sublayers)] * reference.layers
        hidden = 1.0 if widths.hidden is None else len(widths.hidden) / whole.hidden
        shares: list[tuple[float, ...]] = []
        for layer in range(reference.layers):
            heads = widths.heads.get(layer)
            kept = whole.heads + whole.kv_heads if heads is None else len(heads.keep) + len(heads.kv_keep)
            channels = len(widths.channels.get(layer, range(whole.channels)))
            attn = hidden * kept / (whole.heads + whole.kv_heads)
            shares.append((attn, hidden * channels / whole.channels))
        return shares

    @property
    def dropped(self) -> frozenset[Position]:
        """The positions of the sublayers that ``drop`` names."""
        return self.chain().dropped

    def runs(self, phase: Literal["prefill", "decode"]) -> tuple[Run, ...]:
        """Return every execution of a layer in a phase; see :meth:`lamella.plan.chain.Chain.runs`."""
        return self.chain().runs(phase)

    @property
    def executions(self) -> list[tuple[float, ...]]:
        """How often a generated token runs each sublayer; see :attr:`lamella.plan.chain.Chain.executions`."""
        return self.chain().executions

    @property
    def work(self) -> list[tuple[float, ...]]:
        """The fraction of each sublayer's cost per generated token; see :attr:`lamella.plan.chain.Chain.work`."""
        return self.chain().work

    @property
    def in_order(self) -> bool:
        """Whether no layer is repeated or moved; see :attr:`lamella.plan.chain.Chain.in_order`."""
        return self.chain().in_order

    def running(self, what: str) -> frozenset[Position]:
        """Return the sublayers that run under a plan that only removes sublayers, so that they can be trained.

        Args:
            what: what would be trained, for the message.

        Raises:
            MethodError: for a plan that repeats or moves layers.
        """
        if not self.in_order:
            raise MethodError(
                f"a plan that repeats or moves layers leaves no {what} of single layers to train: give a plan that "
                "only removes"
            )
        return frozenset(each for run in self.runs("prefill") for each in run.positions)

    @property
    def skipped(self) -> frozenset[Position]:
        """The sublayers that generated tokens never run; see :attr:`lamella.plan.chain.Chain.skipped`."""
        return self.chain().skipped

    @property
    def is_static(self) -> bool:
        """Whether all tokens run through the same layers of every stack, which are known in advance."""
        return not self.policies and all(self.chain(stack).is_static for stack in self.path)

    @property
    def only_adapts(self) -> bool:
        """Whether the plan consists of adapters only."""
        return not any(value for name, value in self.decision.items() if name != "adapters")

    @property
    def removed(self) -> float:
        """The number of sublayers that a generated token does not run, over all stacks, or of dropped blocks.

        It is an expected value if a policy decides.
        """
        return (
            len(set(self.drop)) if self.model.blocks else sum(self.chain(stack).removed for stack in self.model.stacks)
        )

    @property
    def effect(self) -> str:
        """What the plan removes and repeats, in words: ``4 sublayers removed, of 16``."""
        if self.model.blocks:
            return f"{_amount(self.removed, 'block')} removed"
        chains = [self.chain(stack) for stack in self.model.stacks]
        total = sum(len(chain.positions) for chain in chains)
        if not self.is_static:
            about = "about " if self.policies and self.removed else ""
            return f"{about}{_amount(self.removed, 'sublayer')} skipped for generated tokens, of {total}"
        gone = sum(len(chain.skipped) for chain in chains)
        runs = sum(sum(map(sum, chain.executions)) for chain in chains)
        again = round(runs) - (total - gone)
        parts = [f"{_amount(gone, 'sublayer')} removed, of {total}"]
        parts += [f"{again} run again"] if again else []
        parts += ["others narrower"] if self.widths.cuts_layers else []
        parts += [] if self.vocab is None else [f"{len(self.vocab):,} of {self.model[None].vocab:,} tokens kept"]
        return ", ".join(parts)

    @property
    def masked(self) -> int:
        """The number of weights that the plan masks."""
        return sum(edit.zeros for edit in self.weights if edit.op == "mask")

    @property
    def digest(self) -> str:
        """A short hash of the decision, for stamps on caches, settings of training runs and file names."""
        by_stack = [self._covered(self.chain(stack)) for stack in self.model.stacks]
        decision: list[Any] = [self.model.architecture]
        decision += by_stack[0] if len(by_stack) == 1 else [list(self.model.stacks), by_stack]
        decision += [sorted(set(self.drop))] if self.model.blocks else []
        decision.append([(edit.op, edit.sha256) for edit in self.weights])
        named = ("width", "modules", "adapters", "rewrite")
        decision += [self.model_dump(include={name}) for name in named if getattr(self, name)]
        return hashlib.sha256(json.dumps(decision).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return what provenance records of this plan."""
        return {"method": self.provenance.get("method"), "removed": self.removed, "digest": self.digest}

    @staticmethod
    def _covered(chain: Chain) -> list[Any]:
        """Return what a digest covers of one stack: executions, the handling of prompt keys, and the policy."""
        names = chain.stack.sublayers
        runs = [
            [[run.layer, *(name in run.sublayers for name in names)] for run in chain.runs(phase)] for phase in PHASES
        ]
        keys = [] if chain.path is None or chain.is_static else [chain.path.keys]  # else they have no effect
        return [*runs, keys, chain.policy and chain.policy.model_dump(exclude={"work"})]

    def check_fits(self, model: Model | Blocks) -> None:
        """Check that this plan is for a model.

        Args:
            model: the model, or one of its stacks.

        Raises:
            PlanError: if the architecture differs; different weights of the same architecture only cause a warning.
        """
        found = ModelReference.of(model)
        if found.description != self.model.description or list(found.stacks) != list(self.model.stacks):
            raise PlanError(
                f"this plan is for {self.model.description} ({self.model.name}), but {model.name} is "
                f"{found.description}; make a plan for it with `lamella plan`"
            )
        if found.architecture != self.model.architecture:
            raise PlanError(
                f"this plan was made for another architecture ({self.model.name}) than {model.name}: shapes or config "
                "differ; make a plan for it with `lamella plan`"
            )
        if None not in (self.model.weights, found.weights) and found.weights != self.model.weights:
            warnings.warn(
                f"this plan was made for other weights of the same architecture ({self.model.name})", stacklevel=3
            )


def _inside(model: ModelReference, site: str, where: str, outside: bool = False) -> tuple[str, tuple[Position, ...]]:
    """Return the stack and the positions of a site; none for a site outside the layers, if those are allowed."""
    try:
        stack, rest = model.split(site)
        return (stack, ()) if outside and rest in (EMBED, NORM, HEAD) else model.at(site)
    except PlanError as error:
        raise ValueError(f"{where}: {error}") from None


def _stack_of(model: ModelReference, stack: str, where: str) -> StackReference:
    if stack not in model.stacks:
        known = " and ".join(f"'{name}'" for name in model.stacks)
        raise ValueError(f"{where}: there is no stack '{stack}'; the model has {known}")
    return model.stacks[stack]


def _layer_of(site: str) -> int:
    return int(site.split(".")[1])


def _check_width(site: str, kept: list[int] | HeadWidth | HiddenWidth, model: ModelReference) -> None:
    """Check the kept indices of one site against the sizes of the model."""
    try:
        stack, inside = model.split(site)
    except PlanError as error:
        raise ValueError(f"width: {error}") from None
    reference = model.stacks[stack]
    match, whole, family = _WIDTH_SITE.fullmatch(inside), reference.sizes, reference.family
    if match is None:
        raise ValueError(
            f"width: '{site}' cannot be cut; write layers.7.mlp.channels, layers.7.attn.heads, hidden.channels or vocab"
        )
    if len(model.stacks) > 1:
        raise ValueError(f"width: the {stack} of a model with several stacks cannot be cut in width; drop its layers")
    if inside == VOCAB:
        _check_vocab(kept, reference)
        return
    if family not in cuttable():
        raise ValueError(f"width: {family} models cannot be cut in width; known are {', '.join(cuttable())}")
    if whole is None:
        raise ValueError(
            "width: this model has layers of different widths, or was rewritten; plan for the model that it was made "
            "from"
        )
    if match[1] is not None and int(match[1]) >= reference.layers:
        raise ValueError(f"width: '{site}' is out of range: the stack has the layers 0 to {reference.layers - 1}")
    of_heads, of_hidden = match[2] == "attn.heads", match[1] is None
    if isinstance(kept, HeadWidth) != of_heads or (isinstance(kept, HiddenWidth) and not of_hidden):
        raise ValueError(f"width: {site}: write a list of indices, and for heads an object with keep and kv_of")
    if isinstance(kept, HeadWidth):
        _check_kept(site, kept.keep, whole.heads)
        for name, given in (("kv_of", kept.kv_of), ("merge", kept.merge)):
            if given is not None and len(given) != len(kept.keep):
                raise ValueError(f"width: {site}: {name} has {len(given)} entries for {len(kept.keep)} heads")
        if max(kept.kv_of) >= whole.kv_heads or any(h is not None and h >= whole.heads for h in kept.merge or ()):
            raise ValueError(
                f"width: {site}: a head is out of range; there are {whole.heads}, and {whole.kv_heads} for keys"
            )
        return
    indices = kept.keep if isinstance(kept, HiddenWidth) else kept
    _check_kept(site, indices, whole.hidden if of_hidden else whole.channels)
    if isinstance(kept, HiddenWidth) and kept.rescale and ARCHITECTURES[family].wiring.centred:
        raise ValueError(f"width: {site}: the norms of {family} models subtract the mean, so rescale cannot be exact")


def _check_vocab(kept: list[int] | HeadWidth | HiddenWidth, stack: StackReference) -> None:
    """Check the ids of the kept tokens."""
    if stack.vocab is None:
        raise ValueError(f"width: {VOCAB}: only the tokens of a decoder of text can be removed, not of {stack.family}")
    if not isinstance(kept, list) or any(after <= before for before, after in pairwise(kept)):
        raise ValueError(f"width: {VOCAB}: write the ids of the kept tokens in ascending order, each once")
    _check_kept(VOCAB, kept, stack.vocab)


def _check_kept(site: str, indices: list[int], size: int) -> None:
    if max(indices) >= size:
        raise ValueError(f"width: {site}: {max(indices)} is out of range; there are 0 to {size - 1}")
    if len(set(indices)) < len(indices):
        raise ValueError(f"width: {site}: an index occurs twice; keep each once")


def compose(first: Plan, second: Plan) -> Plan:
    """Return one plan that does what both plans do.

    Args:
        first: a plan, whose weight edits are applied first.
        second: another plan for the same model.

    Raises:
        PlanError: for plans of different models, if both choose a path through one stack, since their order has no
            clear meaning, if both choose widths, if a policy decides, or if nothing is left to run.
    """
    if first.model.architecture != second.model.architecture:
        raise PlanError("plans for two different models cannot be composed")
    if (first.policies and not second.only_adapts) or (second.policies and not first.only_adapts):
        raise PlanError("a policy decides for the whole stack at run time: it can be composed with adapters only")
    if first.path.keys() & second.path.keys():
        raise PlanError("both plans choose a path through the layers; a composition of paths has no clear meaning")
    if first.width and second.width:
        raise PlanError(
            "both plans choose widths of the original: export the model under one and plan the other for the result"
        )
    if both := first.modules.keys() & second.modules.keys():
        raise PlanError(f"both plans insert a network at {min(both)}: only one of them can")
    if first.rewrite and second.rewrite:
        raise PlanError("both plans rewrite the whole model: only one of them can")
    dropped = {stack: {*first.chain(stack).dropped, *second.chain(stack).dropped} for stack in first.model.stacks}
    try:
        return Plan(
            model=first.model,
            drop=first.model.sites(dropped),
            width=first.width or second.width,
            path=first.path | second.path,
            weights=[*first.weights, *second.weights],
            modules=first.modules | second.modules,
            adapters=[*first.adapters, *second.adapters],
            policies=first.policies or second.policies,
            rewrite=first.rewrite or second.rewrite,
            provenance={"composed": [first.provenance, second.provenance]},
        )
    except ValidationError as error:
        raise refusal(error, "composed plan") from None


class Point(Decision):
    """One plan of a series: its decision and its measurements on calibration data.

    Attributes:
        scores: finite measurements by name.
    """

    scores: Annotated[dict[str, float], AfterValidator(_finite)] = Field(default_factory=dict)


def _amount(count: float, noun: str) -> str:
    """Format a count with its noun, such as ``1 sublayer``, ``2.4 sublayers`` or ``no sublayers``."""
    amount = f"{count:.2f}".rstrip("0").rstrip(".") if count else "no"
    return f"{amount} {noun}{'' if amount == '1' else 's'}"


class SeriesDocument(JsonDocument):
    """The JSON document of a :class:`lamella.plan.PlanSeries`.

    Attributes:
        schema_: version of the format.
        model: the model that the plans are for.
        points: the plans of the series.
        provenance: how the series came to be.
    """

    schema_: Literal["lamella.series/2"] = Field("lamella.series/2", alias="schema")
    model: ModelReference
    points: Annotated[list[Point], Field(min_length=1)]
    provenance: dict[str, Any] = Field(default_factory=dict)

    def _parts(self) -> Sequence[SidefileDocument]:
        return [part for point in self.points for part in point._parts()]

    def plan(self, index: int) -> Plan:
        """Return one plan of the series.

        Args:
            index: index of the plan; negative values count from the end.

        Raises:
            PlanError: for a point that is not a valid plan for the model.
        """
        point = self.points[index]
        position = index % len(self.points)
        provenance = self.provenance | {"point": position, "scores": point.scores}
        try:
            return Plan(model=self.model, **point.decision, provenance=provenance)
        except ValidationError as error:
            raise refusal(error, f"point {position} of the series") from None
