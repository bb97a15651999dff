"""The terms of the penalty, what norms are of, and the strengths of a list, from the argument to the operator."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from typing_extensions import TypedDict  # of a type that is one of several, before Python 3.11

from fused_reg import _devices


class Row(NamedTuple):
    """An argument of a term: its strength, or what gives it its shape; and what the docstrings say of it."""

    name: str
    text: str = ""
    prox: str = ""  # of its proximal operator
    value: str = ""  # TeX, of one tensor t
    gradient: str = ""
    default: float | str | None = None
    shapes: str = ""  # the term whose shape it gives, without which it means nothing;
    about: str = ""  # and how an error says so
    apart: tuple[str, ...] = ()  # terms with which it has no proximal operator in closed form
    bound: float | None = None  # what a number must be above; others are at least 0
    is_constraint: bool = False  # no value and no gradient, and what it is by default is none
    is_bent: bool = False  # the value is not proportional to the strength


#: The terms: all that Python knows of them, but for what they are (`reference`). An argument that a row adds has a type
#: in `MoreTerms`.
ROWS = (
    Row("l1", value=r"l1_t \sum_i |w_{t,i}|", gradient=r"l1_t \operatorname{sgn}(w_{t,i})"),
    Row("l2", value=r"l2_t \sum_i w_{t,i}^2", gradient=r"2\, l2_t\, w_{t,i}"),
    Row(
        "l2_norm",
        "the strength of the sum of Euclidean norms, not squared (group lasso), likewise. Its gradient is "
        "``l2_norm * w / ||w||``, and 0 where the norm is 0.",
        "the block soft threshold makes whole groups zero.",
        r"l2\_norm_t \sum_g \lVert w_{t,g} \rVert_2",
        r"l2\_norm_t \frac{w_{t,i}}{\lVert w_{t,g(i)} \rVert_2}",
    ),
    Row(
        "group",
        "what the norms are of: ``'tensor'``, whole tensors; ``'row'``, the slices of each tensor along dimension 0 (a "
        "neuron's weights, an output channel); ``'column'``, those along dimension 1 (the weights of an input feature, "
        "an input channel). A tensor without that dimension is one slice. ``('row', n)`` and ``('column', n)``: each "
        "``n`` that follow on one another, as those of an attention head; ``('block', n)``: each ``n`` elements of the "
        "flattened tensor, which must be contiguous. Given with ``l2_norm`` or ``max_norm``.",
        "``'row'`` prunes neurons and output channels, ``'column'`` input features.",
        default="tensor",
        shapes="l2_norm",
        about="whose norms it is about",
    ),
    Row(
        "smooth_l1",
        "the strength of the sum of ``|w|`` with a parabola at 0 (Huber, as ``torch.nn.SmoothL1Loss``), likewise: "
        "``w ** 2 / (2 * beta)`` where ``|w| < beta``, else ``|w| - beta / 2``. Its gradient is ``smooth_l1 * w / "
        "beta``, and ``smooth_l1 * sgn(w)`` beyond ``beta``.",
        "shrinks by what its gradient is afterwards, and makes nothing zero. Not with ``l2_norm`` on one parameter, "
        "which has no closed form.",
        r"smooth\_l1_t \sum_i s_t(w_{t,i})",
        r"smooth\_l1_t\, s_t'(w_{t,i})",
        apart=("l2_norm",),
    ),
    Row(
        "beta",
        "where ``smooth_l1`` goes from the parabola to the straight line: a number >= 0 as the strengths are, but a "
        "constant; 1 if it is not given. 0 is L1. Given with ``smooth_l1``.",
        "where its gradient is constant.",
        default=1.0,
        shapes="smooth_l1",
        about="whose width it is",
    ),
    Row(
        "mcp",
        "the strength of the minimax concave penalty (MCP), likewise: it begins as ``mcp * |w|``, grows ever less, and "
        "from ``|w| = mcp_gamma * mcp`` on it is ``mcp_gamma * mcp ** 2 / 2``. Its gradient is ``sgn(w) * max(0, mcp - "
        "|w| / mcp_gamma)``: what is large is not shrunk.",
        "the firm threshold, and where ``step >= mcp_gamma`` the hard threshold at ``mcp * sqrt(step * mcp_gamma)``: "
        "the minimum always. Not with ``l2_norm`` or ``smooth_l1`` on one parameter.",
        r"mcp_t \sum_i c_t(w_{t,i})",
        r"mcp_t\, c_t'(w_{t,i})",
        apart=("l2_norm", "smooth_l1"),
        is_bent=True,
    ),
    Row(
        "mcp_gamma",
        "how long ``mcp`` grows: a number > 1 as the strengths are, but a constant; 3 if it is not given. A large one "
        "is L1. Given with ``mcp``.",
        "where weights stay as they are.",
        default=3.0,
        shapes="mcp",
        about="whose concavity it is",
        bound=1.0,
    ),
    Row(
        "scad",
        "the strength of the smoothly clipped absolute deviation (SCAD), likewise: it is ``scad * |w|`` up to ``|w| = "
        "scad``, grows ever less from there on, and from ``scad_a * scad`` on it is ``scad ** 2 * (scad_a + 1) / 2``. "
        "Its gradient is ``scad * sgn(w)``, then ``sgn(w) * max(0, scad_a * scad - |w|) / (scad_a - 1)``.",
        "the soft threshold for small weights, none for large ones, and between them what joins these; where ``step >= "
        "scad_a - 1`` a jump: the minimum always. Not with ``l2_norm``, ``smooth_l1`` or ``mcp`` on one parameter.",
        r"scad_t \sum_i d_t(w_{t,i})",
        r"scad_t\, d_t'(w_{t,i})",
        apart=("l2_norm", "smooth_l1", "mcp"),
        is_bent=True,
    ),
    Row(
        "scad_a",
        "from which multiple of ``scad`` on it is constant: a number > 2 as the strengths are, but a constant; 3.7 if "
        "it is not given. Given with ``scad``.",
        "where weights stay as they are.",
        default=3.7,
        shapes="scad",
        about="whose concavity it is",
        bound=2.0,
    ),
    Row(
        "lower",
        "a bound, in proximal steps alone: no value, no gradient.",
        "no element is below it afterwards (0: non-negative); a number or one per parameter, as the strengths but of "
        "any sign; without it ``-inf``. With ``l1``, ``l2`` and ``smooth_l1``.",
        default=-math.inf,
        apart=("l2_norm", "mcp", "scad"),
        is_constraint=True,
    ),
    Row(
        "upper",
        "likewise.",
        "no element is above it; greater than ``lower``; without it ``inf``.",
        default=math.inf,
        apart=("l2_norm", "mcp", "scad"),
        is_constraint=True,
    ),
    Row(
        "max_norm",
        "likewise.",
        "the largest Euclidean norm of each ``group``, to which larger ones are scaled; > 0, without it ``inf``. With "
        "``l1``, ``l2`` and ``l2_norm``.",
        default=math.inf,
        apart=("smooth_l1", "mcp", "scad", "lower", "upper"),
        bound=0.0,
        is_constraint=True,
    ),
)

#: The numbers of the terms, in the order of the arguments, and those of them that are strengths.
KINDS = tuple(row.name for row in ROWS if row.name != "group")
TERMS = tuple(row.name for row in ROWS if not row.shapes and not row.is_constraint)
CONSTRAINTS = tuple(row.name for row in ROWS if row.is_constraint)

#: Of each of them the term without which it means nothing, and what it is where it is not given.
TERM_OF = {row.name: row.shapes or row.name for row in ROWS if row.name in KINDS}
DEFAULTS = {row.name: row.default if isinstance(row.default, float) else 0.0 for row in ROWS if row.name in KINDS}

#: Pairs of terms that together have no proximal operator in closed form.
APART = [(row.name, other) for row in ROWS for other in row.apart]

#: What numbers must be above, and terms whose value is not proportional to their strength.
BOUNDS = {row.name: row.bound for row in ROWS if row.bound is not None}
BENT = tuple(row.name for row in ROWS if row.is_bent)

#: The number with which each term or constraint is none, and what is there if any of some is: a box has two bounds.
ABSENT = {kind: DEFAULTS[kind] if kind in CONSTRAINTS else 0.0 for kind in (*TERMS, *CONSTRAINTS)}
TOGETHER = {kind: ("lower", "upper") if kind in ("lower", "upper") else (kind,) for kind in ABSENT}
OF_GROUPS = ("l2_norm", "max_norm")

#: The arguments that shape a term.
SHAPES = {row.name: row for row in ROWS if row.shapes}

#: What the operators take of a list, in this order (``csrc/penalty.h``).
NUMBERS = (*KINDS[:3], "step", *KINDS[3:])
PLACES = {kind: NUMBERS.index(kind) for kind in KINDS}
STEP = NUMBERS.index("step")

#: In an error of a Regularizer: any of the strengths.
ANY_TERM = f"{', '.join(ABSENT)} or zeros"

#: So many rows, columns, or elements in a row.
Runs: TypeAlias = "tuple[Literal['row', 'column', 'block'], int]"

#: What ``l2_norm`` takes the norm of: a whole tensor, each of its slices along dimension 0, or 1; or runs.
Group: TypeAlias = "Literal['tensor', 'row', 'column'] | Runs"

#: The same, and what a layer's type resolves to one of these.
LayerGroup: TypeAlias = "Literal['tensor', 'row', 'column', 'output', 'input'] | Runs"
OF_LAYERS = ("output", "input")

#: What the operators call them; 0 is no norms (``csrc/layout.h``).
GROUPS: dict[str | None, int] = {None: 0, "tensor": 1, "row": 2, "column": 3}
_BLOCK = 4
_GROUPINGS = 8
_RUNS = {"row": GROUPS["row"], "column": GROUPS["column"], "block": _BLOCK}

#: The numbers of one kind for a list: floats (none: the term is absent; one; one per parameter), or a tensor of these.
Column: TypeAlias = "tuple[float, ...] | Tensor"

S = TypeVar("S")  # a strength, as a function takes it
F = TypeVar("F", bound=Callable[..., Any])


class MoreStrengths(TypedDict, Generic[S], total=False):
    """The numbers of the terms behind the first three, as arguments by keyword."""

    smooth_l1: S | None
    beta: S | None
    mcp: S | None
    mcp_gamma: S | None
    scad: S | None
    scad_a: S | None
    lower: S | None
    upper: S | None
    max_norm: S | None


class MoreTerms(MoreStrengths[S], Generic[S], total=False):
    """The arguments of functions of which ``l2_norm`` is no keyword."""

    group: LayerGroup


class Terms(MoreStrengths[S], Generic[S], total=False):
    """Those of the others."""

    l2_norm: S | None
    group: Group


def takes_terms(item: F, without: str = "") -> F:
    """Of a function, or a class, whose arguments end with ``**terms``: the signature with a name for each, and in the
    docstring a line for each in the place of ``terms: ...``, in which ``{text}`` is the row's, and the formulas."""
    function: Any = item.__init__ if isinstance(item, type) else item  # type: ignore[misc]
    written = inspect.signature(function)
    parameters = [p for p in written.parameters.values() if p.kind is not p.VAR_KEYWORD]
    strength = written.parameters["l1"].annotation
    rows = [row for row in ROWS if row.name not in (*written.parameters, without)]
    place = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), len(parameters))
    parameters[place:place] = [
        inspect.Parameter(
            row.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=row.default if row.name == "group" else None,
            annotation=strength
            if row.name != "group"
            else "LayerGroup"
            if "l2_norm" in written.parameters
            else "Group",
        )
        for row in rows
    ]
    function.__signature__ = written.replace(parameters=parameters)

    def lines(match: re.Match[str]) -> str:
        indent, text = match.groups()
        return "\n".join(
            textwrap.fill(
                f"{row.name}: {text.format(text=row.text, prox=row.prox)}",
                120,
                initial_indent=indent,
                subsequent_indent=indent + " " * 4,
                break_on_hyphens=False,
            )
            for row in rows
        )

    if item.__doc__:  # python -OO has none
        doc = re.sub(r"^( +)terms: (.*)$", lines, item.__doc__, flags=re.MULTILINE)
        for what in ("value", "gradient"):
            doc = doc.replace(f"{{{what}}}", " + ".join(filter(None, (getattr(row, what) for row in ROWS))))
        item.__doc__ = doc
    return item


_ROWS = GROUPS["row"]
_IS_TENSOR = -1
_NONE = (0,) * len(NUMBERS)


def group_code(group: Group | None) -> int:
    """What the operators call it."""
    return _RUNS[group[0]] + _GROUPINGS * (group[1] - 1) if isinstance(group, tuple) else GROUPS[group]


def group_of(code: int) -> Group | None:
    """The group that they call so."""
    kind = next(name for name, kind in {**GROUPS, "block": _BLOCK}.items() if kind == code % _GROUPINGS)
    return kind if code in GROUPS.values() else cast(Group, (kind, group_length(code)))  # type: ignore[return-value]


def group_text(group: object) -> str:
    """As it is given."""
    return f'group=("{group[0]}", {group[1]})' if isinstance(group, tuple) else f'group="{group}"'


def check_group(where: str, group: object, others: tuple[str, ...] = ()) -> None:
    """``others``: what it may be beside a `Group`."""
    if not _is_runs(group) and not (isinstance(group, str) and group in (*GROUPS, *others)):
        known = ", ".join(f'"{name}"' for name in (*filter(None, GROUPS), *others))
        hint = "; a Regularizer of a module knows its layers" if group in OF_LAYERS else ""
        raise ValueError(
            f'{where}group must be {known}, or a pair of "row", "column" or "block" and n >= 1, got {group!r}{hint}'
        )


def _is_runs(group: object) -> bool:
    is_pair = isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], str) and group[0] in _RUNS
    return is_pair and type(group[1]) is int and group[1] >= 1  # type: ignore[index]


def check_runs(name: str, p: Tensor, group: Group) -> None:
    """Raises unless these runs fill the parameter of this name."""
    if problem := misfit(p, group):
        raise ValueError(f"{name} must {problem}")


def misfit(p: Tensor, group: LayerGroup) -> str:
    """What a parameter lacks to be filled by these runs, if anything."""
    if not isinstance(group, tuple) or p.numel() == 0:
        return ""
    (kind, n), dim = group, sliced_dim(p, group_code(group))
    size = p.numel() if kind == "block" else n if dim is None else p.shape[dim]
    what = "elements" if kind == "block" else f"{kind}s"
    if size % n != 0:
        return f"have a multiple of {n} {what}, to have {group_text(group)}, got {size}"
    if kind == "block" and not p.is_contiguous():
        return f"be contiguous, to have {group_text(group)}, got strides {tuple(p.stride())}"
    return ""


def is_without(name: str, given: Mapping[str, object]) -> bool:
    """Whether these lack what an argument of this name shapes; a Regularizer has ``zeros`` of groups, too."""
    return all(given.get(k) is None for k in ((*OF_GROUPS, "zeros") if name == "group" else (SHAPES[name].shapes,)))


def check_shape(where: str, name: str, given: object, others: Mapping[str, object]) -> None:
    """Raises where an argument is given that means nothing without others, and these are not."""
    if is_without(name, others) and given is not None and not (name == "group" and given == "tensor"):
        raise ValueError(lacking(where, name, given))


def lacking(where: str, name: str, given: object) -> str:
    what, terms = (group_text(given), " or ".join(OF_GROUPS)) if name == "group" else (name, SHAPES[name].shapes)
    return f"{where}{what} must come with {terms}, {SHAPES[name].about}, got none"


class Strengths(NamedTuple):
    """The numbers of a list and its grouping, as the operators take them (``csrc/numbers.h``).

    It has no properties: of a NamedTuple, the compiler of torch 2.10 does not understand them.
    """

    floats: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    counts: tuple[int, ...] = _NONE
    group: int = 0

    @staticmethod
    def of(
        columns: Sequence[Column], group: int = 0, toward: Sequence[Tensor] = (), importance: Sequence[Tensor] = ()
    ) -> Strengths:
        """Of a column for each of `NUMBERS`, or for the first of them; reference weights and importances: none, or one
        for each parameter."""
        floats: tuple[float, ...] = ()
        tensors: tuple[Tensor, ...] = ()
        counts = list(_NONE)
        for i, column in enumerate(columns):
            if type(column) is not tuple:  # which takes less time than to look for a Tensor
                tensors += (cast(Tensor, column),)
                counts[i] = _IS_TENSOR
            elif column:
                floats += column
                counts[i] = len(column)
        if toward or importance:
            tensors += (*toward, *importance)
            counts += len(toward), len(importance)
        return Strengths(floats, tensors, tuple(counts), group)

    def columns(self) -> list[Column]:
        floats, tensors = iter(self.floats), iter(self.tensors)
        return [
            next(tensors) if count == _IS_TENSOR else tuple([next(floats) for _ in range(count)])
            for count in self.counts[: len(NUMBERS)]
        ]

    def is_relative(self) -> bool:
        """Whether there are reference weights or importances."""
        return len(self.counts) > len(NUMBERS)

    def references(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The reference weights, and the importances."""
        if not self.is_relative():
            return (), ()
        toward, importance = self.counts[len(NUMBERS) :]
        rest = self.tensors[len(self.tensors) - toward - importance :]
        return rest[:toward], rest[toward:]

    def relative(self, toward: Sequence[Tensor], importance: Sequence[Tensor]) -> Strengths:
        """The same with these."""
        return Strengths.of(self.columns(), self.group, toward, importance)

    def having(self, **columns: Column) -> Strengths:
        """The same with these columns."""
        pairs = zip(NUMBERS, self.columns(), strict=True)
        return Strengths.of([columns.get(name, column) for name, column in pairs], self.group, *self.references())

    def with_step(self, step: Column) -> Strengths:
        """The same with the step of a proximal operator, the last of the columns that most lists have."""
        before, behind = self.counts[:STEP], self.counts[STEP + 1 :]
        if any(behind):
            return self.having(step=step)
        if isinstance(step, Tensor):
            return Strengths(self.floats, (*self.tensors, step), (*before, _IS_TENSOR, *behind), self.group)
        return Strengths(self.floats + step, self.tensors, (*before, len(step), *behind), self.group)

    def at(self, places: Sequence[int], device: torch.device) -> Strengths:
        """The numbers of the parameters at these places of the list, for a launch on this device."""
        return Strengths.of([_at(column, places, device) for column in self.columns()], self.group)

    def has_norms(self) -> bool:
        return self.group != 0

    def constraint(self) -> str:
        """The name of one, if there may be any."""
        return next((kind for kind in CONSTRAINTS if self.counts[PLACES[kind]] != 0), "")

    def has_bent(self) -> bool:
        """Whether a term may be there whose value is not proportional to its strength."""
        return any(self.counts[PLACES[term]] != 0 for term in BENT)

    def are_trained(self) -> bool:
        return len(self.tensors) > 0 and any(t.requires_grad for t in self.tensors)

    def named_tensors(self) -> dict[str, Tensor]:
        pairs = zip(NUMBERS, self.columns(), strict=True)
        return {name: column for name, column in pairs if isinstance(column, Tensor)}


def _at(column: Column, places: Sequence[int], device: torch.device) -> Column:
    if not isinstance(column, Tensor):
        return tuple(column[i] for i in places) if len(column) > 1 else column
    column = column if column.ndim == 0 else torch.stack([column[i] for i in places])
    return _devices.reachable(column, device)


def group_count(p: Tensor, group: int) -> int:
    """How many groups a parameter has; an empty one has none."""
    return slots(p, group) if p.numel() > 0 else 0


def slots(p: Tensor, group: int) -> int:
    """The same, also of an empty one."""
    dim = sliced_dim(p, group)
    if is_block(group):
        return p.numel() // group_length(group)
    return 1 if dim is None else p.shape[dim] // group_length(group)


def sliced_dim(p: Tensor, group: int) -> int | None:
    """The dimension whose indices, or runs of these, are groups; None where there is none."""
    dim = group % _GROUPINGS - _ROWS
    return dim if 0 <= dim < min(p.ndim, 2) else None


def group_length(group: int) -> int:
    """How many slices, or elements, a group has."""
    return group // _GROUPINGS + 1


def is_block(group: int) -> bool:
    return group % _GROUPINGS == _BLOCK


def in_groups(p: Tensor, group: int) -> tuple[Tensor, int | None]:
    """The tensor with a dimension whose indices are groups, and that dimension; None: it is one group."""
    dim, n = sliced_dim(p, group), group_length(group)
    if is_block(group):
        return p.reshape(-1, n), 0
    return (
        (p, dim)
        if dim is None or n == 1
        else (p.reshape(*p.shape[:dim], p.shape[dim] // n, n, *p.shape[dim + 1 :]), dim)
    )
