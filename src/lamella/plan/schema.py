"""The plan: a small, readable document that says what every named site of one model does."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from operator import mul
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from lamella.errors import ExportError, PlanError
from lamella.files import replacing, write
from lamella.plan import fingerprint
from lamella.plan.width import Heads, Widths
from lamella.stack import ARCHITECTURES, Position, Stack, cuttable, groups_at, positions_at, positions_of, sites_of
from lamella.stack.wiring import Sizes

Document = TypeVar("Document", bound="_Document")
EMBED, NORM, HEAD = "embed", "norm", "head"  # what lies outside the layers, as sites of weights
LayerIndex = Annotated[int, Field(ge=0)]
Kept = Annotated[list[LayerIndex], Field(min_length=1)]

_WIDTH_SITE = re.compile(r"stream\.channels|layers\.(\d+)\.(mlp\.channels|attn\.heads)")
_NUMBERS = re.compile(r"\[\n\s*(\d+(?:,\n\s*\d+)*)\n\s*\]")


def _finite(scores: dict[str, float]) -> dict[str, float]:
    for name, value in scores.items():
        if not math.isfinite(value):
            raise ValueError(f"score '{name}' is not finite; plan again with more calibration text or in float32")
    return scores


def _refusal(error: ValidationError, where: str) -> PlanError:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "document"
    return PlanError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}")


class _Document(BaseModel):
    """A versioned JSON document whose errors are one line."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, protected_namespaces=())

    @classmethod
    def parse(cls: type[Document], text: str, where: str = "plan") -> Document:
        """Read the JSON text of a document.

        Raises:
            PlanError: one line that names the field and the mend.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _refusal(error, where) from None

    @classmethod
    def read(cls: type[Document], path: str | Path) -> Document:
        """Read a document from a file; see :meth:`parse`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path}: cannot be read ({error.__class__.__name__}): give the path of a JSON plan"
            ) from None
        document = cls.parse(text, where=str(path))
        for part in document._parts():
            part._folder = Path(path).parent
        return document

    def _parts(self) -> Sequence[_WithFile]:
        """The parts of the document whose side files lie beside it."""
        return []

    def dump(self) -> str:
        text = self.model_dump_json(indent=2, by_alias=True, exclude_defaults=False)
        return _NUMBERS.sub(lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"  # a list on one line

    def write(self, path: str | Path) -> None:
        """Write the document to a file, and its side files beside it.

        Raises:
            PlanError: for a side file whose name would lead elsewhere.
            ExportError: when it cannot be written.
        """
        folder = Path(path).parent
        for part in self._parts():
            try:
                _ = part.is_folder or _plain_name(part.file)
            except ValueError as error:
                raise PlanError(f"{path}: {error}") from None
        try:
            for part in self._parts():
                if part.file is None or part.is_folder:  # another checkpoint is named, not copied
                    continue
                if part.located.resolve() != (folder / part.file).resolve():
                    with replacing(folder / part.file) as partial:
                        shutil.copyfile(part.located, partial)
        except OSError as error:
            raise ExportError(f"{path}: cannot be written ({error.strerror}); choose another file") from None
        write(path, self.dump())


class ModelReference(_Document):
    """Which model a plan is for: ``architecture`` must match, another ``weights`` only warns.

    Attributes:
        sizes: the widths of its layers, where they are all alike and its family can be cut in width.
    """

    architecture: str
    weights: str | None = None
    family: str
    layers: Annotated[int, Field(ge=1, le=10_000)]
    name: str | None = None
    sizes: Sizes | None = None

    @property
    def positions(self) -> tuple[Position, ...]:
        """The sublayers of all layers, in the order in which they run."""
        return positions_of(self.layers)

    @classmethod
    def of(cls, stack: Stack) -> ModelReference:
        return cls(
            architecture=fingerprint.architecture(stack.model),
            weights=stack.files_digest,
            family=stack.architecture.name,
            layers=len(stack),
            name=stack.name,
            sizes=_sizes(stack),
        )


def _sizes(stack: Stack) -> Sizes | None:
    uneven = getattr(stack.model, "lamella_counts", None)
    return None if stack.architecture.wired is None or uneven else stack.architecture.sizes_of(stack.config)


class HeadWidth(_Document):
    """The query heads that a layer keeps, in their new order; see :class:`lamella.plan.width.Heads`.

    Attributes:
        kv_of: for each of them, the key-value head that it reads, by its number in the original.
        merge: for each of them, the head whose difference to it is added, or None.
    """

    keep: Kept
    kv_of: Kept
    merge: list[LayerIndex | None] | None = None

    def heads(self) -> Heads:
        return Heads(self.keep, self.kv_of, self.merge)


class StreamWidth(_Document):
    """The kept channels of the stream, in their new order.

    Attributes:
        rescale: let norms make up for the channels that no longer count; see :class:`lamella.plan.width.Widths`.
    """

    keep: Kept
    rescale: bool = False


Width = dict[str, Kept | HeadWidth | StreamWidth]


class PhasedPath(_Document):
    """The layers that run, in order, in each phase.

    Attributes:
        keys: what a layer that only generated tokens run knows of the prompt: ``fill`` computes the prompt's keys and
            values there, and nothing else; with ``local`` it sees generated tokens alone.
    """

    prefill: Annotated[list[LayerIndex], Field(min_length=1)]
    decode: Annotated[list[LayerIndex], Field(min_length=1)]
    keys: Literal["fill", "local"] = "fill"


def _plain_name(name: str | None) -> str | None:
    """A side file lies beside its plan, so its name leads nowhere else."""
    if name is not None and (not name.strip(".") or set(name) & set("/\\:\0")):
        raise ValueError(f"'{name}' is no plain name: a side file lies beside its plan")
    return name


class _WithFile(_Document):
    """A part of a document that has a side file beside it, under a plain name."""

    file: Annotated[str | None, AfterValidator(_plain_name)] = None
    sha256: str | None = None

    _folder: Path = PrivateAttr(default=Path("."))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.model_dump() == other.model_dump()  # wherever they lie

    @property
    def is_folder(self) -> bool:
        """Whether it names another checkpoint, and no side file."""
        return False

    @property
    def located(self) -> Path:
        """The side file, beside the plan that names it."""
        return self._folder / (self.file or "")


class PolicyReference(_WithFile):
    """What decides while the model runs.

    Attributes:
        name: the slug of its method.
        params: its settings.
        file: the safetensors side file of its trained parameters, beside the plan; None where it has none.
        sha256: of that file.
        work: for each layer, the shares of generated tokens that are expected to run its sublayers, as measured on
            calibration text; empty where nothing is known.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    params: dict[str, Any] = {}
    work: list[tuple[float, ...]] = []


class WeightEdit(_WithFile):
    """A change of weights that the view owns; everything else stays shared. See :mod:`lamella.plan.weights`.

    Attributes:
        op: ``mask`` sets weights to zero, ``scale`` multiplies them, ``replace`` and ``restore`` put others there.
        sites: where: sublayers and layers, ``embed``, ``norm`` or ``head``.
        file: the safetensors side file, beside the plan; to restore, also the folder of a checkpoint.
        sha256: of that file, or of the tensors that are taken from the folder.
        zeros: how many weights it sets to zero.
    """

    op: Literal["mask", "scale", "replace", "restore"]
    sites: Annotated[list[str], Field(min_length=1)]
    file: str
    sha256: str
    zeros: Annotated[int, Field(ge=0)] = 0

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        if not self.is_folder:
            _plain_name(self.file)

    @property
    def is_folder(self) -> bool:
        """Whether it restores from another checkpoint, which is named by the absolute path of its folder."""
        return self.op == "restore" and Path(self.file).is_absolute()


class Run(NamedTuple):
    """One execution of a layer in the normal form of a plan, with the sublayers that run."""

    layer: int
    sublayers: tuple[str, ...]

    @property
    def positions(self) -> tuple[Position, ...]:
        return tuple(Position(self.layer, name) for name in self.sublayers)


class Plan(_Document):
    """What every named site of one model does.

    Attributes:
        model: the model it is bound to.
        drop: sites that do not run, such as ``layers.2.mlp`` or ``layers.9``.
        width: what is kept of ``layers.4.mlp.channels`` (a list), ``layers.4.attn.heads`` (a :class:`HeadWidth`) and
            ``stream.channels`` (a list or a :class:`StreamWidth`); numbers are those of the original.
        path: for a chain of layers, which run, in order, per phase; a stack that is not named runs as it is.
        weights: changes of weights, in their order.
        policy: what decides while the model runs.
        provenance: how the plan came to be: method, options, data, seed, version.
    """

    schema_: Literal["lamella.plan/1"] = Field("lamella.plan/1", alias="schema")
    model: ModelReference
    drop: list[str] = []
    width: Width = {}
    path: dict[str, PhasedPath] = {}
    weights: list[WeightEdit] = []
    policy: PolicyReference | None = None
    provenance: dict[str, Any] = {}

    def model_post_init(self, _: Any) -> None:
        for index, site in enumerate(self.drop):
            try:
                positions_at(site, self.model.positions)
            except PlanError as error:
                raise ValueError(f"entry {index}: {error}") from None
        for stack, path in self.path.items():
            for phase in ("prefill", "decode"):
                wrong = [layer for layer in getattr(path, phase) if layer >= self.model.layers]
                if wrong:
                    last = self.model.layers - 1
                    raise ValueError(
                        f"path.{stack}.{phase}: layer {wrong[0]} is out of range; the stack has 0 to {last}"
                    )
        for index, edit in enumerate(self.weights):
            for site in edit.sites:
                try:
                    _ = () if site in (EMBED, NORM, HEAD) else positions_at(site, self.model.positions)
                except PlanError as error:
                    raise ValueError(f"weights: entry {index}: {error}") from None
        if not self.runs("decode"):
            raise ValueError("nothing is left to run; drop fewer sites")
        for site, kept in self.width.items():
            _check_width(site, kept, self.model)
        if self.policy is not None and (self.path or self.drop or self.width):
            raise ValueError("policy: a policy decides for the whole stack, so drop, width and path must be empty")
        if self.policy is not None and len(self.policy.work) not in (0, self.model.layers):
            raise ValueError(f"policy.work: {len(self.policy.work)} entries for {self.model.layers} layers")

    def _parts(self) -> Sequence[_WithFile]:
        return [*self.weights, *([] if self.policy is None else [self.policy])]

    @property
    def widths(self) -> Widths:
        """The normal form of ``width``."""
        channels, heads, stream, rescale = {}, {}, None, False
        for site, kept in self.width.items():
            if isinstance(kept, HeadWidth):
                heads[_layer_of(site)] = kept.heads()
            elif isinstance(kept, StreamWidth):
                stream, rescale = kept.keep, kept.rescale
            elif site == "stream.channels":
                stream = kept
            else:
                channels[_layer_of(site)] = kept
        return Widths(channels, heads, stream, rescale)

    @property
    def _shares(self) -> list[tuple[float, ...]]:
        """How much of the sublayers of each layer is left, as a share of their weight matrices."""
        whole, widths = self.model.sizes, self.widths
        if whole is None or not self.width:
            return [(1.0,) * len(group) for group in groups_at("block", self.model.positions)]
        stream = 1.0 if widths.stream is None else len(widths.stream) / whole.stream
        shares: list[tuple[float, ...]] = []
        for layer in range(self.model.layers):
            heads = widths.heads.get(layer)
            kept = whole.heads + whole.kv_heads if heads is None else len(heads.keep) + len(heads.kv_keep)
            channels = len(widths.channels.get(layer, range(whole.channels)))
            attn = stream * kept / (whole.heads + whole.kv_heads)
            shares.append((attn, stream * channels / whole.channels))
        return shares

    @property
    def dropped(self) -> frozenset[Position]:
        """The sublayers that ``drop`` names."""
        return frozenset(each for site in self.drop for each in positions_at(site, self.model.positions))

    def runs(self, phase: Literal["prefill", "decode"]) -> tuple[Run, ...]:
        """The normal form: every execution of a layer in that phase, in order, without empty ones."""
        path = next(iter(self.path.values()), None)
        order: Iterable[int] = range(self.model.layers) if path is None else getattr(path, phase)
        left: dict[int, tuple[str, ...]] = {}
        dropped = self.dropped
        for position in self.model.positions:
            if position not in dropped:
                left[position.layer] = (*left.get(position.layer, ()), position.sublayer)
        return tuple(Run(layer, left[layer]) for layer in order if layer in left)

    @property
    def is_static(self) -> bool:
        """Whether all tokens run through the same layers, known beforehand."""
        return self.policy is None and self.runs("prefill") == self.runs("decode")

    @property
    def executions(self) -> list[tuple[float, ...]]:
        """How often a generated token runs the sublayers of each layer, expected where a policy decides."""
        if self.policy is not None:
            return self.policy.work or [(1.0,) * len(group) for group in groups_at("block", self.model.positions)]
        times = Counter(position for run in self.runs("decode") for position in run.positions)
        groups = groups_at("block", self.model.positions)
        return [tuple(float(times[position]) for position in group) for group in groups]

    @property
    def work(self) -> list[tuple[float, ...]]:
        """How much of the sublayers of each layer a generated token runs: executions times widths."""
        pairs = zip(self.executions, self._shares, strict=True)
        return [tuple(map(mul, times, shares)) for times, shares in pairs]

    @property
    def in_order(self) -> bool:
        """Whether no layer is repeated or moved, so that the plan only leaves things out."""
        layers = [run.layer for run in self.runs("prefill")]
        return layers == sorted(set(layers))

    @property
    def skipped(self) -> frozenset[Position]:
        """The sublayers that generated tokens never run."""
        ran = {position for run in self.runs("decode") for position in run.positions}
        return frozenset(self.model.positions) - ran

    @property
    def in_layers(self) -> bool:
        """Whether what generated tokens never run are whole layers."""
        gone = self.skipped
        return all(
            gone.issuperset(group) or gone.isdisjoint(group) for group in groups_at("block", self.model.positions)
        )

    @property
    def removed(self) -> float:
        """How many sublayers a generated token does not run, expected where a policy decides; see :attr:`work`."""
        return len(self.model.positions) - sum(map(sum, self.work))

    @property
    def masked(self) -> int:
        """How many weights the plan masks."""
        return sum(edit.zeros for edit in self.weights if edit.op == "mask")

    @property
    def digest(self) -> str:
        """A short hash of the decision, for stamps on caches and file names."""
        keys = [path.keys for path in self.path.values() if not self.is_static]  # elsewhere they say nothing
        policy = self.policy and self.policy.model_dump(exclude={"work"})
        edits = [(edit.op, edit.sha256) for edit in self.weights]
        phases = [
            [[run.layer, "attn" in run.sublayers, "mlp" in run.sublayers] for run in self.runs(phase)]
            for phase in ("prefill", "decode")
        ]
        decision = [self.model.architecture, *phases, keys, policy, edits]
        if self.width:
            decision.append(self.model_dump(include={"width"}))
        return hashlib.sha256(json.dumps(decision).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """What the provenance of something that was made with this plan says of it."""
        return {"method": self.provenance.get("method"), "removed": self.removed, "digest": self.digest}

    def check_fits(self, stack: Stack) -> None:
        """Check that this plan is for that model.

        Raises:
            PlanError: when the architecture differs; other weights of the same architecture only warn.
        """
        found = ModelReference(
            architecture=fingerprint.architecture(stack.model), family=stack.architecture.name, layers=len(stack)
        )
        if (found.family, found.layers) != (self.model.family, self.model.layers):
            raise PlanError(
                f"this plan is for a {self.model.family} of {self.model.layers} layers ({self.model.name}), but "
                f"{stack.name} is a {found.family} of {found.layers}; make a plan for it with `lamella plan`"
            )
        if found.architecture != self.model.architecture:
            raise PlanError(
                f"this plan was made for another architecture ({self.model.name}) than {stack.name}: shapes or config "
                "differ; make a plan for it with `lamella plan`"
            )
        named = next(iter(self.path), stack.architecture.stack)
        if named != stack.architecture.stack:
            raise PlanError(f"path names the stack '{named}', but {stack.name} has '{stack.architecture.stack}'")
        if None not in (self.model.weights, stack.path) and stack.files_digest != self.model.weights:
            warnings.warn(
                f"this plan was made on other weights of the same architecture ({self.model.name})", stacklevel=3
            )


def _layer_of(site: str) -> int:
    return int(site.split(".")[1])


def _check_width(site: str, kept: list[int] | HeadWidth | StreamWidth, model: ModelReference) -> None:
    """Check what is kept of one site against the sizes of the model."""
    match, whole = _WIDTH_SITE.fullmatch(site), model.sizes
    if match is None:
        raise ValueError(
            f"width: '{site}' cannot be cut; write layers.7.mlp.channels, layers.7.attn.heads or stream.channels"
        )
    if model.family not in cuttable():
        raise ValueError(f"width: {model.family} models cannot be cut in width; known are {', '.join(cuttable())}")
    if whole is None:
        raise ValueError("width: this model has layers of different widths already; plan on the model it was made of")
    if match[1] is not None and int(match[1]) >= model.layers:
        raise ValueError(f"width: '{site}' is out of range: the stack has the layers 0 to {model.layers - 1}")
    of_heads, of_stream = match[2] == "attn.heads", match[1] is None
    if isinstance(kept, HeadWidth) != of_heads or (isinstance(kept, StreamWidth) and not of_stream):
        raise ValueError(f"width: {site}: write a list of numbers, and for heads an object with keep and kv_of")
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
    numbers = kept.keep if isinstance(kept, StreamWidth) else kept
    _check_kept(site, numbers, whole.stream if of_stream else whole.channels)
    if isinstance(kept, StreamWidth) and kept.rescale and ARCHITECTURES[model.family].wiring.centred:
        raise ValueError(
            f"width: {site}: the norms of {model.family} models subtract the mean, so rescale cannot be exact"
        )


def _check_kept(site: str, numbers: list[int], size: int) -> None:
    if max(numbers) >= size:
        raise ValueError(f"width: {site}: {max(numbers)} is out of range; there are 0 to {size - 1}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"width: {site}: a number is there twice; keep each once")


def compose(first: Plan, second: Plan) -> Plan:
    """One plan that does what both do.

    Raises:
        PlanError: for plans of different models, when both choose a path, since their order has no plain meaning, when
            both choose widths, or when nothing is left to run.
    """
    if first.model.architecture != second.model.architecture:
        raise PlanError("plans for two different models cannot be composed")
    if first.policy or second.policy:
        raise PlanError("a policy decides for the whole stack while the model runs: it cannot be composed")
    if first.path and second.path:
        raise PlanError("both plans choose a path through the layers; a composition of paths has no plain meaning")
    if first.width and second.width:
        raise PlanError(
            "both plans choose widths, each of the original's: export the model under one and plan the other on that"
        )
    try:
        return Plan(
            model=first.model,
            drop=sites_of(first.dropped | second.dropped, first.model.positions),
            width=first.width or second.width,
            path=first.path or second.path,
            weights=[*first.weights, *second.weights],
            provenance={"composed": [first.provenance, second.provenance]},
        )
    except ValidationError as error:
        raise _refusal(error, "composed plan") from None


class Point(_Document):
    """One plan of a series: its decision and what was measured for it on calibration data."""

    drop: list[str] = []
    width: Width = {}
    path: dict[str, PhasedPath] = {}
    weights: list[WeightEdit] = []
    policy: PolicyReference | None = None
    scores: Annotated[dict[str, float], AfterValidator(_finite)] = {}


class PlanSeries(_Document):
    """An ordered family of plans from one search, from the whole model to the smallest; a budget picks one."""

    schema_: Literal["lamella.series/1"] = Field("lamella.series/1", alias="schema")
    model: ModelReference
    points: Annotated[list[Point], Field(min_length=1)]
    provenance: dict[str, Any] = {}

    def _parts(self) -> Sequence[_WithFile]:
        return [part for point in self.points for part in (*point.weights, point.policy) if part is not None]

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Plan:
        point = self.points[index]
        position = index % len(self.points)
        provenance = self.provenance | {"point": position, "scores": point.scores}
        decision = {name: getattr(point, name) for name in ("drop", "path", "width", "weights", "policy")}
        try:
            return Plan(model=self.model, **decision, provenance=provenance)
        except ValidationError as error:
            raise _refusal(error, f"point {position} of the series") from None

    def __iter__(self) -> Iterator[Plan]:  # type: ignore[override]
        return (self[index] for index in range(len(self)))

    @classmethod
    def of_removals(
        cls,
        model: ModelReference,
        order: Iterable[Iterable[tuple[int, str]]],
        scores: Iterable[dict[str, float]],
        **provenance: Any,
    ) -> PlanSeries:
        """The series that removes one group of sublayers after the other.

        Args:
            order: the groups of positions, in the order of removal.
            scores: what was measured with nothing removed, then after each removal.
        """
        gone: set[tuple[int, str]] = set()
        measured = iter(scores)
        points = [Point(scores=next(measured))]
        for group in order:
            gone |= set(group)
            points.append(Point(drop=sites_of(gone, model.positions), scores=next(measured)))
        return cls(model=model, points=points, provenance=provenance)

    def removing(self, sublayers: int) -> Plan:
        """The plan of the series that removes the most sublayers without passing that number.

        Raises:
            PlanError: when the plans change weights alone.
        """
        if any(plan.masked for plan in self) and not any(plan.removed for plan in self):
            name = self.provenance.get("method", "this series")
            raise PlanError(
                f"{name} masks weights and removes no sublayers: choose by its own option sparsity, not ratio"
            )
        fitting = [plan for plan in self if plan.removed <= sublayers]
        return max(fitting, key=lambda plan: plan.removed)

    def at_ratio(self, ratio: float) -> Plan:
        """The plan that removes at most that share of all sublayers (FinerCut's ratio)."""
        if not 0 <= ratio < 1:
            raise PlanError(f"ratio {ratio} is out of range: give the share of sublayers to remove, from 0 to below 1")
        return self.removing(int(ratio * len(self.model.positions) + 1e-9))
