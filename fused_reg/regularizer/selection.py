"""Which parameters a `Regularizer` regularizes, and which penalty each of them carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch.nn import Module

from fused_reg._partitioned import check_whole
from fused_reg._terms import ABSENT, ANY_TERM, SHAPES, is_without, lacking
from fused_reg.regularizer.candidates import Candidate, marked_modules
from fused_reg.regularizer.keys import Key, check_matches, is_type, shown
from fused_reg.regularizer.marks import Mark
from fused_reg.regularizer.penalties import Penalty, as_penalty, checked_keys, drops

#: A rule: its key, and what it names of a penalty.
Rule = tuple[Key, dict[str, Any]]


def _refuse(problem: str) -> NoReturn:
    raise ValueError(problem)


@dataclass
class Choice:
    """The arguments of a `Regularizer` that choose, checked."""

    default: Penalty
    weights_only: bool = False
    include: list[Key] | None = None
    types: list[Key] | None = None
    exclude: list[Key] = field(default_factory=list)
    rules: list[Rule] = field(default_factory=list)

    def of(
        self, params: Any, candidates: Sequence[Candidate], complain: Callable[[str], object] = _refuse
    ) -> list[tuple[Candidate, Penalty]]:
        """Those chosen, each with its penalty: what the first rule that matches says; what that does not name is of the
        mark, or else the default. What is given and has no effect is complained of."""
        meant = [c for c in candidates if self._is_meant(c)]
        # Before weights_only looks at their dimensions, of which a piece has one.
        check_whole("Regularizer", [c.param for c in meant], [c.names[0] for c in meant])
        chosen = [(c, penalty) for c in meant if self._includes(c) and (penalty := self._penalty_of(c))]
        marked = marked_modules(params) if isinstance(params, Module) else {}
        if self.default.is_empty and not self.rules and not marked and not any(c.marks for c in candidates):
            given = f"{', '.join(ABSENT)}, zeros, rules or marks by `regularized`"
            _refuse(f"Regularizer: {given} must give a strength, got none")
        for argument, what in (("include", "pattern"), ("types", "type")):
            if getattr(self, argument) == []:
                _refuse(f"Regularizer: {argument} must have a {what}, got an empty list; leave it out for all")
        problems = (*self._unmatched(candidates), *self._idle_marks(marked, candidates))
        for problem in (*problems, *([] if chosen else [_NOTHING]), *self._idle(candidates)):
            complain(problem)
        if not chosen:
            _refuse(_NOTHING)
        for candidate, _ in chosen:
            candidate.check()
        return chosen

    def _includes(self, candidate: Candidate) -> bool:
        return self._is_meant(candidate) and (candidate.is_weight or not self.weights_only)

    def _is_meant(self, candidate: Candidate) -> bool:
        chosen = all(keys is None or any(map(candidate.matches, keys)) for keys in (self.include, self.types))
        return candidate.can_train and chosen and not any(map(candidate.matches, self.exclude))

    def _rule_of(self, candidate: Candidate) -> Rule | None:
        return next((rule for rule in self.rules if candidate.matches(rule[0])), None)

    def _penalty_of(self, candidate: Candidate) -> Penalty | None:
        rule, base = self._rule_of(candidate), self._base_of(candidate)
        if rule is None:
            return None if base.is_empty else base
        given = rule[1]
        # A rule's number 0 drops the term: `set_strength` for all that have it passes by.
        kept = {k: None if drops(k, s) else s for k, s in given.items() if k != "group"}
        return Penalty({**base.given, **kept}, given.get("group", base.group))

    def _base_of(self, candidate: Candidate) -> Penalty:
        penalties = {name: mark.penalty_of(name) for name, mark in candidate.marks.items()}
        marks = {penalty.key: name for name, penalty in penalties.items()}
        if len(marks) > 1:
            one, other, *_ = marks.values()
            _refuse(
                f"Regularizer: a tied parameter must have one mark by `regularized`, got one as {one!r} and another as "
                f"{other!r}"
            )
        return next(iter(penalties.values()), self.default)

    def _unmatched(self, candidates: Sequence[Candidate]) -> Iterable[str]:
        rules = [key for key, _ in self.rules]
        given = {"include": self.include, "types": self.types, "exclude": self.exclude, "rules": rules}
        for argument, key in ((argument, key) for argument, keys in given.items() for key in keys or ()):
            try:
                check_matches("Regularizer", argument, key, candidates)
            except ValueError as error:
                yield str(error)

    def _idle(self, candidates: Sequence[Candidate]) -> Iterable[str]:
        """What is given and has no effect."""
        chosen = [c for c in candidates if self._includes(c)]
        for argument, other, keys in (("include", "types", self.include), ("types", "include", self.types)):
            for key in keys or ():
                if _only(candidates, key) and not _only(chosen, key):
                    others = f"{other}, exclude or weights_only"
                    yield f"Regularizer: {argument} must leave a parameter, but {others} removes {shown(key)}"
        for i, rule in enumerate(self.rules):
            key, given = rule
            if not _only(candidates, key) or all(drops(*item) for item in given.items()):
                continue  # said already, or nothing to lose
            own = [c for c in _only(chosen, key) if self._rule_of(c) is rule]
            if not own:
                others = "weights_only, include, types, exclude or a dtype"
                other = "a rule before it" if _only(chosen, key) else others
                yield f"Regularizer: rules[{i}] must apply to a parameter, but {other} takes all of {shown(key)}"
            for name in SHAPES:
                if own and name in given and all(self._is_without(c, name) for c in own):
                    yield lacking(f"Regularizer: rules[{i}] {shown(key)}: ", name, given[name])
        yield from self._idle_defaults(chosen)

    def _idle_defaults(self, chosen: Sequence[Candidate]) -> Iterable[str]:
        takers = [(c, (self._rule_of(c) or ("", {}))[1]) for c in chosen if not c.marks]
        for kind, said in self.default.given.items():
            if said is not None and not drops(kind, said) and all(kind in given for _, given in takers):
                yield (
                    f"Regularizer: {kind} must apply to a parameter, but rules or marks by `regularized` speak about "
                    "all of them"
                )
        own = {**self.default.given, "group": None if self.default.group == "tensor" else self.default.group}
        for name in SHAPES:
            if own[name] is not None and all(name in g or self._is_without(c, name) for c, g in takers):
                yield lacking("Regularizer: ", name, own[name])

    def _is_without(self, candidate: Candidate, name: str) -> bool:
        """Whether it lacks what an argument of this name shapes."""
        return is_without(name, {**self._base_of(candidate).given, **(self._rule_of(candidate) or ("", {}))[1]})

    def _idle_marks(self, marked: Mapping[Mark, str], candidates: Sequence[Candidate]) -> Iterable[str]:
        owned: dict[Mark, list[Candidate]] = {mark: [] for mark in marked}
        for c in candidates:
            for mark in set(c.marks.values()):
                owned.setdefault(mark, []).append(c)
        for mark, where in marked.items():
            own = owned[mark]
            if not own:
                yield (
                    f"Regularizer: the mark by `regularized` on {where} must speak about a parameter, but there is "
                    "none in it, or other marks speak about all of them; biases need bias=True"
                )
            meant = [c for c in own if self._is_meant(c)] if self.weights_only else []
            if meant and not any(c.is_weight for c in meant):
                yield f"Regularizer: weights_only leaves out all that the mark by `regularized` on {where} speaks about"
            elif not mark.bias.is_empty and any(c.is_bias for c in meant):
                yield f"Regularizer: weights_only leaves out the biases that the mark on {where} names by bias="
            kinds = {c.is_bias for c in own}
            if own and mark.has_both and kinds != {True, False}:
                what = "weights" if True in kinds else "biases"
                yield f"Regularizer: the mark on {where} must speak about {what}, for which it has strengths, got none"


_NOTHING = "Regularizer: include, types, exclude, weights_only and rules must leave a parameter, got none"


def _only(candidates: Iterable[Candidate], key: Key) -> list[Candidate]:
    return [c for c in candidates if c.matches(key)]


def as_rules(rules: Iterable[tuple[Key, Mapping[str, Any]]] | None) -> list[Rule]:
    checked_rules = []
    for i, rule in enumerate(rules or ()):
        is_pair = isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[1], Mapping)
        if not is_pair or not (isinstance(rule[0], str) or is_type(rule[0])):
            raise TypeError(f"Regularizer: rules[{i}] must be a pair (pattern or type, dict(l1=...)), got {rule!r}")
        key, given = rule
        checked_keys(f"Regularizer: rules[{i}]", given)
        penalty = as_penalty("Regularizer", f"rules[{i}] {shown(key)}: ", **given)
        named = {k: {**penalty.given, "group": penalty.group}[k] for k in given if given[k] is not None}
        if not named:
            raise ValueError(f"Regularizer: rules[{i}] must give {ANY_TERM}, got {dict(given)!r}")
        checked_rules.append((key, named))
    return checked_rules
