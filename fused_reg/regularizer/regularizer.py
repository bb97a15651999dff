"""`Regularizer`: a penalty that knows its parameters and their strengths, in any loop and in any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from numbers import Integral
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import Unpack

from fused_reg._arguments import is_number
from fused_reg._terms import ANY_TERM, KINDS, MoreStrengths, MoreTerms, takes_terms
from fused_reg._warnings import warn
from fused_reg.regularizer.attachment import Attachment, Mode
from fused_reg.regularizer.attachments import Attachments
from fused_reg.regularizer.calls import Part
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.following import Source
from fused_reg.regularizer.groups import Groups, GroupWeights, Together, as_together
from fused_reg.regularizer.keys import Key, TypeKey, as_keys, check_matches
from fused_reg.regularizer.penalties import as_penalty, given_strengths
from fused_reg.regularizer.projection import Projection
from fused_reg.regularizer.references import References, Toward, Weights, as_weights
from fused_reg.regularizer.report import Report, report_of, summary_of
from fused_reg.regularizer.saved import parsed, parsed_aims, state_of, state_of_aims
from fused_reg.regularizer.selection import Choice, as_rules
from fused_reg.regularizer.strengths import Given, ZeroShare, as_flag
from fused_reg.regularizer.table import Table


@takes_terms
class Regularizer:
    r"""The penalty of a model, with the comfort of ``weight_decay``: L1, L2, elastic net and group norms, by layer.

    .. math::
        \text{penalty} = \sum_t \Big( {value} \Big)

    over the trainable parameters: one that is frozen is left out as long as it is. Three ways to use it:

    - ``loss = task_loss + regularizer()``: in the loss;
    - ``regularizer.attach(optimizer)``: in the optimizer, like ``weight_decay``;
    - ``regularizer.attach(optimizer, mode="prox")``: proximal, with weights that are *exactly* zero.

    The strength of a parameter is that of the first rule that matches it; what this does not name, and without a rule
    all, is of the innermost :func:`regularized` module around it; without a mark it is ``l1``, ``l2`` and ``l2_norm``.
    If these are not given, parameters without rule and mark are not regularized. All strengths are in one fused call.

    A module is followed: if its parameters, its modules or its marks are others by now (a new head, pruning,
    ``load_state_dict(assign=True)``, ``fully_shard``), they have what their rules, marks and names say, from the next
    use or attached step on, and a warning says which. The parameters of a list are those that it had.

    In a module ``group`` may also be ``"output"``, all weights that lead to an output (a neuron, a channel), or
    ``"input"``, all that come from one. The layer's type says which slices these are: of linear layers and
    convolutions, also transposed ones, of ``MultiheadAttention``, and of embeddings, which are linear in one-hot
    vectors (an output is a dimension, an input a token). Parameters of one dimension, as biases, have an element for
    each output. Layers of other types have a ``group`` of their own, by a rule.

    **The L2 convention** is ``l2 * sum(w ** 2)``, as in Keras: ``torch.optim.SGD(weight_decay=wd)`` is ``l2 = wd / 2``.

    Args:
        params: a module (every parameter once, also where it is tied), an iterable of tensors (named "0", "1", ...), or
            an iterable of (name, tensor) pairs, read once and kept. Names are without the parts that wrappers as
            ``torch.compile`` and ``DistributedDataParallel`` add; a tied parameter has the names of all its places.
            Patterns may be of the whole names too, and of those before ``weight_norm`` or pruning. A type of modules
            (or a union, ``nn.Conv1d | nn.Conv2d``) means what is in modules of that type and its subclasses, also
            before a conversion as that to ``SyncBatchNorm``; one of a tied parameter's places is enough.
        l1: the strength of the sum of absolute values (lasso): a finite float >= 0, a 0-dim tensor, or a schedule.
            A tensor may change between calls, and gets its gradient from the differentiable penalty if it requires one.
            A schedule is a function of the number of optimizer steps taken, from 0, as for ``LambdaLR``, or one of
            :mod:`fused_reg.schedules`, which can be pickled; its strength is kept in a tensor on the parameters' device
            that `advance` fills. Strengths are for all parameters, also biases, as ``weight_decay`` is; see
            ``weights_only``.
        l2: the strength of the sum of squares (ridge), likewise.
        l2_norm: the strength of the sum of Euclidean norms (group lasso), likewise.
        terms: {text}
        zeros: a share of zeros as the aim of proximal steps, in place of a strength or beside it: from 0 to below 1, a
            schedule of it, ``CubicRamp(0.0, 0.8, steps=1000)``, or a pattern, ``"2:4"`` (at most 2 of each 4 elements
            that follow on one another in a row) or :class:`.PatternRamp`. After each step the smallest of all
            parameters with this aim become zero, elements, or with a ``group`` other than ``"tensor"`` its groups; the
            others stay as they are. What a rule or a mark gives is an aim of its own. Of plain tensors, without
            ``toward`` and ``importance``, and within bounds that have zero. See :doc:`/guides/zeros`.
        zeros_per: ``"parameter"``: each has this share by itself.
        together: parameters whose groups are one, group by group, so that a neuron has one norm with its bias, a
            channel with its normalization, and vanishes as a whole. ``"bias"``: each weight and the bias of its module;
            a type as ``NORMS``: each weight and the parameters of the layer of this type that follows in a
            ``Sequential``; ``[("conv1.weight", "bn1.*"), ...]``: those that match a pattern. A list may have all of
            these. They have one ``l2_norm``, groups of one kind (columns beside rows are taken as such) and as many.
            What is frozen is in no group. Without ``max_norm``, ``toward``, ``importance`` and ``zeros`` of groups.
        group_weights: ``"sqrt_size"`` multiplies each ``l2_norm`` by the root of the size of its groups, so that large
            groups are not spared: ``l2_norm * sqrt(n_g) * ||w_g||`` for ``n_g`` elements (Yuan and Lin 2006). Strengths
            in reports and states are with it; ``l2_norm`` is a number or a schedule then. ``zeros`` divide norms by it.
            Or a tensor with a finite number >= 0 for each group, by which its strength is multiplied: a dictionary by
            names, or a list. What it does not name has 1. They are kept, not copied, and are not in states; of plain
            tensors, without what ``together`` is without.
        weights_only: leave out biases and parameters with fewer than two dimensions (normalization layers).
        include: a pattern or a list of patterns of names (``fnmatch``); only these are regularized.
        types: a type of modules or several, ``torch.nn.Linear``; only these, of what ``include`` leaves. What a module
            holds itself is of its own type: the ``in_proj_weight`` of ``MultiheadAttention`` is in no ``Linear``.
        exclude: patterns and types; these are not. ``fused_reg.NORMS`` is the type of all normalization layers of
            torch; of other packages, where they are no subclasses, give the types or names (``"*norm*"``) beside it.
        rules: pairs of a pattern or type and the strengths for it, ``("*.attn.*", dict(l2=1e-4))``, ``(torch.nn.Conv2d,
            dict(l1=1e-4))``, with the names of the strengths above, of ``zeros`` and ``group`` as keys; the first that
            matches counts. What it does not name is inherited, as in a parameter group of an optimizer, and 0.0 drops a
            term.
        toward: reference weights: every term is of ``w - toward`` (L2-SP, FedProx). ``"start"``: the weights as they
            are now, of a parameter that its module gets later those that it has then; or a state dict, or a list with
            one for each of ``params``. What is regularized has one, of its shape, dtype and device; they are kept, not
            copied, and follow a module that is converted, as its buffers do. See :doc:`/guides/reference_weights`.
        importance: tensors by which the strengths are multiplied element by element, or by row as ``(rows, 1)``, finite
            and >= 0, not with ``l2_norm``: a dictionary by names, or a list. What it does not name has 1.
        save_references: whether ``toward`` and ``importance`` are in :meth:`state_dict`. ``None``: where ``toward`` is
            ``"start"``, because a regularizer that is built when training goes on would begin elsewhere.

    Raises:
        TypeError: chosen parameters are of no supported kind, a strength is no number, or a type none of modules.
        ValueError: something has no effect: a pattern or type that matches no parameter or none that is left, a rule
            behind others, a term, ``group`` or mark that is nobody's, a dictionary of tensors without any, or with a
            name that is nobody's; a tied parameter with two marks, or two tensors; a strength that is negative,
            infinite or NaN; ``zeros`` that are no share, or that these parameters cannot have; ``toward`` lacks a
            parameter, ``importance`` names none, or one of them is not of its shape, dtype and device.

    Warns:
        UserWarning: its module has changed; a schedule is never advanced; it was copied without its module.

    Example:
        >>> import torch
        >>> from fused_reg import Regularizer
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 1))
        >>> rules = [("0.*", dict(l1=1e-4))]
        >>> regularizer = Regularizer(model, l2=1e-3, weights_only=True, rules=rules)
        >>> regularizer
        Regularizer(
          l1=0.0001, l2=0.001: 1 parameter, 200 elements: 0.weight
          l2=0.001: 1 parameter, 10 elements: 2.weight
        )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> attachment = regularizer.attach(optimizer)
        >>> model(torch.ones(20)).sum().backward()
        >>> optimizer.step()  # as if the penalty had been in the loss
        >>> attachment.value.shape
        torch.Size([])

    Source: as :func:`fused_penalty`; Yuan and Lin 2006, "Model selection and estimation in regression with grouped
    variables", section 2, for ``group_weights``.
    """

    def __init__(
        self,
        params: Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        l1: Given = None,
        l2: Given = None,
        l2_norm: Given = None,
        *,
        zeros: ZeroShare | None = None,
        zeros_per: Literal["parameter"] | None = None,
        together: Together | None = None,
        group_weights: GroupWeights | None = None,
        weights_only: bool = False,
        include: str | Iterable[str] | None = None,
        types: TypeKey | Iterable[TypeKey] | None = None,
        exclude: Key | Iterable[Key] | None = None,
        rules: Iterable[tuple[Key, Mapping[str, Any]]] | None = None,
        toward: Toward | None = None,
        importance: Weights | None = None,
        save_references: bool | None = None,
        **terms: Unpack[MoreTerms[Given]],
    ) -> None:
        if rules is not None and not isinstance(rules, Iterable):
            raise TypeError(
                f"Regularizer: rules must be pairs (pattern or type, dict(l1=...)), got {type(rules).__name__}"
            )
        as_flag("Regularizer: weights_only", weights_only)
        given = {"toward": as_weights("toward", toward), "importance": as_weights("importance", importance)}
        groups = {"together": as_together(together), "group_weights": as_weights("group_weights", group_weights)}
        if zeros_per not in (None, "parameter"):
            raise ValueError(f'Regularizer: zeros_per must be None or "parameter", got {zeros_per!r}')
        rules = None if rules is None else list(rules)
        choice = Choice(
            as_penalty("Regularizer", l1=l1, l2=l2, l2_norm=l2_norm, zeros=zeros, **terms),
            weights_only,
            as_keys("include", include),
            as_keys("types", types),
            as_keys("exclude", exclude) or [],
            as_rules(rules),
        )
        self._config: dict[str, Any] = {
            "l1": l1,
            "l2": l2,
            "l2_norm": l2_norm,
            "group": "tensor",
            **terms,
            "zeros": zeros,
            "zeros_per": zeros_per,
            **groups,
            "weights_only": weights_only,
            "include": choice.include,
            "types": choice.types,
            "exclude": choice.exclude or None,
            "rules": None if rules is None else [(key, dict(given)) for key, given in rules],
            **given,
            "save_references": save_references,
        }
        references = References(**given, is_saved=save_references)
        table = Table(Source(params, choice), references, Groups(*groups.values()), zeros_per is not None)
        self._begin(table)
        if zeros_per is not None and all(e.zeros is None or (e.aim and e.aim.pattern) for e in table.entries):
            got = "none" if all(e.zeros is None for e in table.entries) else "a pattern, which is of each row"
            raise ValueError(f'Regularizer: zeros_per="{zeros_per}" must come with a share of zeros, got {got}')
        self._current()

    def _begin(self, table: Table) -> None:
        self._table = table
        self._entries: list[Entry] | None = None  # those of `_whole`
        self._whole: Part
        self._attachments = Attachments()
        self._states: list[int] | None = []  # of the parameters, in which the penalty was used; None: enough

    def _followed(self) -> Table:
        if is_compiling():
            self._current_while_tracing()
        else:
            self._table.follow()
        return self._table

    def _used(self, is_proximal: bool = False) -> Part:
        """All of it as it is now, to train with."""
        if not is_proximal and self._table.has_aims():
            raise ValueError(
                'Regularizer: zeros must be reached by proximal steps, as regularizer.attach(optimizer, mode="prox"), '
                "got a call for a value or gradient, in which they have no part; `attachment.value` is the penalty"
            )
        if is_compiling():
            self._current_while_tracing()
            self._table.look_at_all()
            return self._whole
        self._table.claim()
        self._attachments.miss_nothing()
        if self._states is not None and (self._table.cells() or self._table.has_aims()):
            self._watch_schedules(self._states)
        return self._current()

    def _current(self) -> Part:
        self._table.follow()
        if self._entries is not self._table.entries:
            self._entries = self._table.entries
            self._whole = Part(self._table, self._entries)
        return self._whole

    def _current_while_tracing(self) -> None:
        """Once for each compilation: the compiler takes what it gives for a constant."""
        self._table.claim()
        self._current()

    _current_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _watch_schedules(self, states: list[int]) -> None:
        """Warns of a schedule that stands still while an optimizer changes the parameters."""
        if not torch.is_grad_enabled() or not self._table.is_standing() or any(self._attachments):
            return
        params = [entry.param for entry in self._table.entries if entry.param.requires_grad]
        state = sum(p._version for p in params if not p.is_inference())
        if state not in states:
            states.append(state)
        if len(states) == 3:
            self._states = None
            warn(
                "Regularizer: a schedule stands at step 0, but the parameters have changed twice since; call "
                "regularizer.advance() after each optimizer.step(), or attach it to the optimizer, which does; set "
                "regularizer.step where you count otherwise"
            )

    def __call__(self) -> Tensor:
        """The penalty: 0-dim and differentiable, as :func:`fused_penalty` returns it. Not with ``zeros``, which have no
        part in it."""
        part = self._used()
        part.refuse_constraints("Regularizer: ")
        return self._attachments.watched(part.penalty())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The regularized parameters with their (first) names, also those that are frozen now."""
        return ((entry.name, entry.param) for entry in self._followed().entries)

    def accumulate_grad_(self, scale: float | Tensor = 1.0) -> Tensor:
        """``p.grad += scale * d(penalty)/dp``, as :func:`accumulate_grad_` does.

        Args:
            scale: a finite float or a 0-dim tensor.

        Returns:
            The penalty, not scaled, without a graph.
        """
        if scale is None:
            raise TypeError("accumulate_grad_: scale must be a float or a 0-dim tensor, got None")
        part = self._used()
        self._attachments.warn_of_twice("by accumulate_grad_")
        return part.accumulate_grad_(scale)[0]

    def prox_(self, step: float | Tensor) -> None:
        """The proximal operator of ``step * penalty``, in place, as :func:`prox_` takes it, and then ``zeros``.

        Args:
            step: the learning rate: a finite float >= 0 or a 0-dim tensor.
        """
        if not is_number(step) and not (isinstance(step, Tensor) and step.ndim == 0):
            got = f"shape {tuple(step.shape)}" if isinstance(step, Tensor) else type(step).__name__
            raise TypeError(f"prox_: step must be a float or a 0-dim tensor, got {got}")
        part, has_aims = self._used(is_proximal=True), self._table.has_aims()
        if has_aims and is_compiling():
            raise NotImplementedError("prox_: zeros must be reached outside of compiled code, got a call within it")
        if has_aims:
            self._table.check_aims()
        part.check()
        self._attachments.warn_of_twice("by prox_")
        part.prox_(step)
        if has_aims:
            Projection([entry for entry in part.entries if entry.param.requires_grad]).project_()

    @property
    def step(self) -> int:
        """How many steps have been counted, the number that schedules get. Set it to go on from a checkpoint that
        knows the step alone; the schedules' strengths follow."""
        return self._table.step

    @step.setter
    def step(self, step: int) -> None:
        self._table.go_to(_as_count("step", step))

    def advance(self) -> None:
        """The next step of the schedules. An attached optimizer does it after each of its steps.

        It fills the strengths' tensors in place, so that compiled code and CUDA graphs see it. After the replay of a
        graph that holds an optimizer's step, call it yourself; within a graph it would repeat one step's numbers.

        Raises:
            ValueError: a schedule gives a number that is negative, infinite or NaN. No strength has changed then. As
                for ``LambdaLR``, a schedule is asked for one more step than are taken.
        """
        self._table.go_to(self.step + 1)

    @partial(takes_terms, without="group")
    def set_strength(
        self,
        l1: Given = None,
        l2: Given = None,
        l2_norm: Given = None,
        *,
        zeros: ZeroShare | None = None,
        where: Key | None = None,
        **terms: Unpack[MoreStrengths[Given]],
    ) -> None:
        """Changes strengths; what is not given stays as it is.

        A number is written into the tensor that holds the strength now, if one does (and ends its schedule), so that
        compiled code and CUDA graphs see it. A strength that is a Python number is a constant to these, and one on the
        CPU to CUDA graphs: begin with a 0-dim tensor on the parameters' device where that matters. Of a tensor that is
        shared with parameters which ``where`` does not name, those that it names get their own.

        Args:
            l1: a finite float >= 0, a 0-dim tensor, or a schedule.
            l2: likewise.
            l2_norm: likewise.
            terms: likewise.
            zeros: the aim of proximal steps, as of the constructor; 0 drops it. What ``where`` names reaches it
                together, of the groups that it has by its rule, its mark or the constructor; without ``where`` what
                each of these gave one reaches it by itself, as before.
            where: a pattern of names (``fnmatch``) or a type of modules: these parameters, and "*" is all. None: all
                that have such a term (not those that a rule gives 0, or that have rules or marks without it); where
                none has one, all. A mark by :func:`regularized` that is set later counts for what it gives.

        Raises:
            TypeError: a strength is no number; none is given.
            ValueError: a strength is negative, infinite or NaN; no name matches; a lower bound is not below the upper
                one; norms are given beside ``importance``; these parameters cannot have ``zeros``, or are attached with
                mode "grad", or bounds leave zero out. Nothing has changed then.

        Example:
            >>> import torch
            >>> from fused_reg import Regularizer
            >>> regularizer = Regularizer([torch.nn.Parameter(torch.ones(3))], l1=0.5)
            >>> regularizer.set_strength(l1=1.0)
            >>> regularizer()
            tensor(3., grad_fn=<...>)
        """
        given: dict[str, Any] = {"l1": l1, "l2": l2, "l2_norm": l2_norm, "zeros": zeros, **terms}
        for kind in KINDS:
            if isinstance(strength := given.get(kind), str):
                raise TypeError(
                    f"set_strength: {kind} must be a float, a 0-dim tensor or a schedule, got str; for parameters of "
                    f"some names say where={strength!r}"
                )
        strengths = given_strengths("set_strength", "set_strength: ", **given)
        if not strengths:
            raise TypeError(f"set_strength: {ANY_TERM} must be given, got none")
        table = self._followed()
        if where is not None:
            check_matches("set_strength", "where", where, table.entries)
        table.change(strengths, where, self._attachments.check_aimed)

    def state_dict(self) -> dict[str, Any]:
        """The step count, the strengths and ``zeros`` as they are now, in plain numbers and names; with
        ``save_references`` the reference weights and importances, too.

        ``torch.save`` and ``torch.load(weights_only=True)`` take it. Schedules are code, which the constructor gets;
        they go on from the step.
        """
        table = self._followed()
        state: dict[str, Any] = {"step": self.step, "groups": state_of(table)}
        if table.has_aims() or any(entry.zeros is not None for entry in table.entries):
            state["aims"] = state_of_aims(table)
        if table.references.is_saved:
            state["references"] = table.references.state(table.entries)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, of a regularizer of parameters with the same names. A schedule goes on as the
        one that this regularizer has: it gives the strength for that step.

        Args:
            state_dict: of :meth:`state_dict`. Strengths in tensors are filled in place. References are taken as copies,
                where the state has them; else those that are here stay, and so do ``zeros``.

        Raises:
            ValueError: it is of other parameters, needs a schedule that is not here, or has ``zeros`` for what is
                attached with mode "grad". Nothing has changed then.
        """
        if not isinstance(state_dict, Mapping) or set(state_dict) - {"references", "aims"} != {"step", "groups"}:
            raise ValueError("load_state_dict: state_dict must have the keys step and groups, as `state_dict` gives it")
        step = _as_count("load_state_dict: step", state_dict["step"])
        table = self._followed()
        references = state_dict.get("references")
        found = {} if references is None else table.references.parsed(references, table.entries)
        aims = parsed_aims(state_dict["aims"], table.entries) if "aims" in state_dict else None
        strengths = parsed(state_dict["groups"], table.entries)
        table.load(step, strengths, aims, found, self._attachments.check_aimed)

    def attach(
        self, optimizer: Optimizer, mode: Mode = "grad", *, include_unused: bool = False, lazy_rows: bool = False
    ) -> Attachment:
        r"""Makes the penalty a part of every ``optimizer.step()``.

        With ``mode="grad"`` its gradient is added to ``.grad`` before the step, as ``weight_decay`` is:

        .. math:: g_t \leftarrow g_t + \partial\,\text{penalty} / \partial w_t

        - Adam passes it through its moments (coupled, as ``Adam(weight_decay=...)``).
        - Gradients are clipped before the step, so that the penalty's is not clipped; clip to the loss's own norm.
        - With gradient accumulation it is added once per step, not per micro-batch; with ``GradScaler`` to the unscaled
          gradients, or scaled as they are where a fused optimizer unscales them itself.
        - A closure (LBFGS) is followed by it each time, and the penalty is added to what the closure returns, if that
          is one number: a tuple, a dictionary or None comes back as it is. An objective that the optimizer
          differentiates by itself has the penalty in its graph. Other arguments of ``step`` are passed on.
        - A step without any gradient is none, nor is one that a ``GradScaler`` skips, or one with learning rates and
          gradients of 0 (by which ``torch.distributed.checkpoint`` makes the optimizer's state): it leaves moments,
          schedules and ``value`` as they are. A learning rate of 0 with gradients, as in a warm-up, is a step.
        - A parameter whose ``.grad`` is None in a step (one that the loss does not use) is left alone, as
          ``weight_decay`` and every optimizer do; ``include_unused=True`` gives it the penalty's gradient, as a loss
          that has the penalty would.
        - The gradient of the penalty stays in ``.grad``, where ``weight_decay`` leaves nothing: a second step without
          ``zero_grad`` has it twice, and a norm of gradients that is taken after the step counts it. Call ``zero_grad``
          between steps, and take norms before them.
        - A sparse gradient (``Embedding(sparse=True)``) is an error, because that of the penalty is not sparse;
          ``lazy_rows=True`` takes the rows that the batch has touched.
        - A penalty shrinks the weights also in a group with ``maximize=True``, as ``weight_decay`` does.
        - It moves every element, also those whose gradient a hook masks (frozen rows of an embedding), as
          ``weight_decay`` does, in both modes: :doc:`/guides/proximal` says how to leave them out.
        - It enters where ``weight_decay`` does: within a wrapper (Lookahead, SAM, Accelerate's, Fabric's, Opacus's) in
          the optimizer that it holds; in a subclass that clips or replaces gradients, in the step of the base class.

        With ``mode="prox"`` the proximal operator follows the step, with each parameter group's learning rate:

        .. math:: w_t \leftarrow \operatorname{prox}_{lr \cdot \text{penalty}}(w_t)

        After SGD without momentum this is proximal gradient descent (ISTA): it comes to rest at the minimum of the
        penalized loss. Adam and others take their step in a metric of their own, and the proximal step is not in it:
        it is decoupled, as AdamW decouples decay. The weights shrink by ``lr * strength`` whatever the size of their
        gradients; the zeros are exact; but the point of rest is not that minimum. :doc:`/guides/proximal` has
        numbers, also for momentum, averaged weights, batch normalization and sparse gradients. Where a ``GradScaler``
        skips a step, the proximal step is skipped, too. It follows the whole step, with what a subclass does to the
        weights after ``super().step()``; within a wrapper it follows that of the optimizer which the wrapper holds. An
        optimizer whose weights are a function of its state (schedule-free, dual averaging as FTRL and MADGRAD, master
        copies) would undo it, and with a rate other than ``lr`` (``lr * d`` of Prodigy and D-Adaptation) it would be
        too large: both are refused. To find out, copies of an optimizer or wrapper that is not torch's take 40 steps
        with small parameters.

        An optimizer of :mod:`fused_reg.optim` without ``l1`` and ``l2`` of its own takes the penalty into its own pass:
        ``.grad`` stays as it is, ``value`` is the penalty before the step in every mode, and with
        ``mode="preconditioned"`` (of L1 and L2) the proximal step has the rate of each element, so that training comes
        to rest at the minimum of loss and penalty. One penalty rides so. A second one, one with a closure and mode
        "grad", and one in a subclass with a ``step`` of its own enter as with other optimizers.

        Args:
            optimizer: any ``torch.optim`` optimizer that holds some of the parameters, also those it gets later, or a
                wrapper of one, which may be none itself. Several optimizers may each hold some; schedules then count
                the steps of the one attached first. One that is attached later takes over what an earlier one holds,
                too, as in the next fit; a step of the earlier one is an error then.
            mode: ``"grad"``, ``"prox"``, or with an optimizer of ours ``"preconditioned"``.
            include_unused: whether parameters whose ``.grad`` is None take part in a step, in both modes. They count in
                ``value`` either way. A step without any gradient stays none.
            lazy_rows: whether a parameter with a sparse gradient has the penalty of the rows that the batch has
                touched alone, each once and at the full strength, as the rows of ``SparseAdam`` have their moments. The
                gradient stays sparse, and is coalesced. ``value`` counts these rows where it is of a step; before the
                first, and with mode "prox", the whole table. ``l2_norm`` is of rows then, and there are no ``zeros``.
                ``False``: an error, and with mode "prox" every row shrinks.

        Returns:
            An :class:`.Attachment`; ``remove()`` detaches (as leaving ``with regularizer.attach(optimizer):`` does),
            ``value`` is the last value, before the first step the penalty now. A copied or unpickled optimizer is not
            attached, nor is a copied regularizer or attachment.

        Raises:
            TypeError: ``optimizer`` is no torch optimizer, and wraps none.
            ValueError: an unknown mode, or "grad" with ``zeros``; the optimizer holds none of the parameters; it is
                attached already; a strength requires grad, which it would never get; with mode "prox", a learning rate
                is missing, negative, infinite or NaN (also before each step), or the optimizer would undo proximal
                steps.

        Warns:
            UserWarning: the optimizer's ``weight_decay`` is not 0 for a parameter that has an ``l2`` toward 0; it
                cannot be found out whether a proximal step lasts. And once, later: the penalty also comes from a loss
                or by hand, and counts twice; a step did not call its closure, or changed parameters without ``.grad``,
                so that it had no penalty; a wrapper of several optimizers changes gradients before their steps; no
                attached one holds a parameter that may be trained; another one, as one created anew, steps what the
                attached one had; parameters change between gradients without an attached step.

        Example:
            >>> import torch
            >>> from fused_reg import Regularizer
            >>> w = torch.nn.Parameter(torch.tensor([1.0, -0.1]))
            >>> optimizer = torch.optim.SGD([w], lr=0.5)
            >>> with Regularizer([w], l1=0.5).attach(optimizer, mode="prox"):
            ...     w.sum().backward()
            ...     optimizer.step()
            >>> w.data  # 1 - 0.5 - 0.25, and -0.1 - 0.5 + 0.25
            tensor([ 0.2500, -0.3500])

        Source: Parikh and Boyd 2014, "Proximal Algorithms", section 4.2; Loshchilov and Hutter 2019, "Decoupled Weight
        Decay Regularization".
        """
        if mode not in ("grad", "prox", "preconditioned"):
            raise ValueError(f'attach: mode must be "grad", "prox" or "preconditioned", got {mode!r}')
        as_flag("attach: include_unused", include_unused)
        as_flag("attach: lazy_rows", lazy_rows)
        if lazy_rows and include_unused:
            raise ValueError(
                "attach: lazy_rows must come without include_unused, which is for what no batch has touched, got both"
            )
        return self._attachments.add(self._followed(), optimizer, mode, include_unused, lazy_rows)

    def report(self) -> Report:
        """The penalty, norm and exact zeros of every parameter and strength group, in a few launches and one transfer.

        Returns:
            A :class:`.Report`; ``print`` it for a table. Its ``rows`` are dictionaries, its ``scalars()`` for loggers.

        Example:
            >>> import torch
            >>> from fused_reg import Regularizer
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 0.0, -4.0]))
            >>> print(Regularizer([("w", w)], l1=0.5, l2=0.1).report())
                     elements   l1   l2  l2_norm  value  norm       zeros
            group 0         3  0.5  0.1        0      6     5  1 (33.3 %)
              w             3                         6     5  1 (33.3 %)
            total           3                         6     5  1 (33.3 %)
        """
        return report_of(self._followed())

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments but for the parameters; tensors and schedules as the objects that they are."""
        config = {key: type(x)(x) if isinstance(x, list | dict) else x for key, x in self._config.items()}
        if self._config["rules"] is not None:
            config["rules"] = [(key, dict(given)) for key, given in self._config["rules"]]
        return config

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], params: Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
    ) -> Regularizer:
        """Builds a regularizer of these parameters as the one that gave the configuration.

        Args:
            config: of :meth:`get_config`.
            params: as for the constructor.
        """
        return cls(params, **config)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n{summary_of(self._followed())})"

    def _is_no_number(self, *_: object) -> NoReturn:
        raise TypeError("Regularizer: the penalty is what its call gives, as in `loss + regularizer()`, got no call")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __neg__ = _is_no_number
    __float__ = backward = item = _is_no_number

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config, "table": self._table, "is_attached": any(self._attachments)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._config = state["config"]
        self._begin(state["table"])
        if state["is_attached"]:
            self._attachments.lose(self._table.entries)


def _as_count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
        raise ValueError(f"{name} must be an integer >= 0, got {value!r}")
    return int(value)
