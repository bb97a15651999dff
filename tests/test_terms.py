"""A term is a row: every function takes it, shows it and speaks about it because of the row alone."""

import inspect
import re

import pytest
import torch

import fused_reg
from fused_reg import Regularizer, reference, regularized
from fused_reg._terms import DEFAULTS, KINDS, NUMBERS, ROWS, TERMS, MoreStrengths, MoreTerms, Terms

FUNCTIONS = [fused_reg.fused_penalty, fused_reg.value_and_grad, fused_reg.accumulate_grad_, fused_reg.prox_]
REFERENCES = [getattr(reference, f.__name__) for f in FUNCTIONS] + [reference.loop]
OF_MODULES = [Regularizer, regularized]
NAMES = [row.name for row in ROWS]
STEP = {"prox_": {"step": 0.5}}


def keys(kind) -> set[str]:
    return set(kind.__annotations__)


def test_the_types_have_the_names_of_the_rows():
    assert keys(Terms) == set(NAMES) - {"l1", "l2"}
    assert keys(MoreTerms) == keys(Terms) - {"l2_norm"}
    assert keys(MoreStrengths) == keys(MoreTerms) - {"group"}
    assert set(KINDS) == set(DEFAULTS) == set(NAMES) - {"group"} == set(NUMBERS) - {"step"}
    assert all(row.shapes in ("", *TERMS) for row in ROWS)


@pytest.mark.parametrize("function", [*FUNCTIONS, *REFERENCES, *OF_MODULES, Regularizer.set_strength])
def test_every_row_is_in_the_signature_and_in_the_docstring(function):
    rows = [row for row in ROWS if row.name != "group" or function is not Regularizer.set_strength]
    parameters = inspect.signature(function).parameters
    strength = "Given" if function not in FUNCTIONS + REFERENCES else "Strength | None"
    for row in rows:
        assert parameters[row.name].default == (row.default if row.name == "group" else None)
        group = "LayerGroup" if function in OF_MODULES else "Group"
        assert parameters[row.name].annotation == (group if row.name == "group" else strength)
        assert len(re.findall(rf"^ +{row.name}: \S", function.__doc__, flags=re.MULTILINE)) == 1
    assert "terms" not in parameters
    assert not re.search(r"\bterms: |\{(text|prox|value|gradient)\}", function.__doc__)
    assert max(len(line) for line in function.__doc__.split("\n") if "sum_" not in line and "frac" not in line) <= 120


@pytest.mark.parametrize("function", FUNCTIONS + REFERENCES)
def test_what_a_signature_shows_may_be_given(function):
    parameters = inspect.signature(function).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty} | STEP.get(function.__name__, {})
    function(torch.ones(2, requires_grad=True), **given | {"l1": 0.5})


@pytest.mark.parametrize("function", FUNCTIONS + REFERENCES)
def test_unknown_keywords_of_functions(function):
    name = "" if function in REFERENCES else rf"{function.__name__}\(\) "
    given = STEP.get(function.__name__, {})
    for wrong in ({"l3": 1.0}, {"l1": 1.0, "L2": 1.0}, {"params_": None}, *([] if given else [{"step": 1.0}])):
        with pytest.raises(TypeError, match=rf"^{name}got an unexpected keyword argument '{list(wrong)[-1]}'$"):
            function(torch.ones(2), **given, **wrong)


def test_unknown_keywords_of_what_takes_modules():
    module = torch.nn.Linear(2, 2)
    regularizer = Regularizer(module, l1=1.0)
    for name, call in (
        ("Regularizer", lambda **wrong: Regularizer(module, **wrong)),
        ("regularized", lambda **wrong: regularized(module, **wrong)),
        ("set_strength", regularizer.set_strength),
    ):
        for wrong in ({"l3": 1.0}, {"l1": 1.0, "step": 1.0}, *([{"group": "row"}] if name == "set_strength" else [])):
            with pytest.raises(
                TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{list(wrong)[-1]}'$"
            ):
                call(**wrong)


def test_a_state_that_is_older_than_a_term_has_it_by_default():
    params = [("a", torch.nn.Parameter(torch.ones(2)))]
    regularizer = Regularizer(params, l1=0.5)
    state = regularizer.state_dict()
    for kind in KINDS[3:]:
        assert state["groups"][0].pop(kind) == DEFAULTS[kind]
    assert list(state["groups"][0]) == ["params", "l1", "l2", "l2_norm", "group", "scheduled"]
    Regularizer(params, l2=1.0).load_state_dict(state)
    regularizer.load_state_dict(state)
    assert regularizer.state_dict()["groups"][0] == {**state["groups"][0], **{k: DEFAULTS[k] for k in KINDS[3:]}}
