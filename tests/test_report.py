"""`Regularizer.report`: numbers of every parameter and strength group."""

import math

import pytest
import torch
from samples import DTYPES, draw
from test_regularizer import make_net
from torch import nn

from fused_reg import Regularizer, reference

GROUP = {"l1": 0.5, "l2": 0.25}


def test_numbers(device):
    net = make_net(device)
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].weight[3, 2] = -0.0
        net[3].bias[:] = 0
    rules = [
        ("0.*", {"l1": 0, "l2": 0, "l2_norm": 0.75, "group": "row"}),
        ("1.*", {"l1": lambda step: 2.0 + step, "l2": 0}),
    ]
    regularizer = Regularizer(net, **GROUP, rules=rules)
    regularizer.advance()
    report = regularizer.report()
    rows = {row["name"]: row for row in report.rows}
    params = dict(net.named_parameters())
    assert list(rows) == [
        *("group 0", "0.weight", "0.bias", "group 1", "1.weight", "1.bias"),
        *("group 2", "2.weight", "2.bias", "3.weight", "3.bias", "total"),
    ]
    strengths = [{"l2_norm": 0.75, "group": "row"}] * 2 + [{"l1": 3.0}] * 2 + [GROUP] * 4
    for (name, p), given in zip(params.items(), strengths, strict=True):
        w, row = p.detach().double(), rows[name]
        assert row["elements"] == w.numel()
        assert row["value"] == pytest.approx(reference.fused_penalty([w], **given).item(), rel=1e-12)
        assert row["norm"] == pytest.approx(math.sqrt(w.square().sum().item()), rel=1e-12)
        assert row["zeros"] == (w == 0).sum().item()
        assert row["zero_share"] == row["zeros"] / w.numel()
        assert {kind: row[kind] for kind in ("l1", "l2", "l2_norm", "group")} == (
            {"l1": 0.0, "l2": 0.0, "l2_norm": 0.0, "group": "tensor"} | given
        )
    assert (rows["0.weight"]["slices"], rows["0.weight"]["zero_slices"]) == (5, 1)
    assert (rows["0.bias"]["slices"], rows["0.bias"]["zero_slices"]) == (5, 1)
    assert (rows["group 0"]["slices"], rows["group 0"]["zero_slices"]) == (10, 2)
    assert "slices" not in rows["1.weight"]
    for kind in ("elements", "zeros", "value"):
        assert rows["group 2"][kind] == pytest.approx(sum(rows[n][kind] for n in list(params)[4:]))
        assert rows["total"][kind] == pytest.approx(sum(rows[n][kind] for n in params))
    assert rows["total"]["value"] == pytest.approx(regularizer().item(), rel=1e-6)
    assert rows["total"]["norm"] == pytest.approx(math.hypot(*(rows[n]["norm"] for n in params)))
    assert rows["total"]["zero_share"] == rows["total"]["zeros"] / rows["total"]["elements"]
    assert all(type(x) in (str, int, float) for row in report.rows for x in row.values())


def test_kinds_of_parameters(device):
    """Every dtype, empty and 0-dim ones, transposed; those that are frozen are left out."""
    params = [nn.Parameter(draw((3, 50), dtype, device, i)) for i, dtype in enumerate(DTYPES)]
    params += [nn.Parameter(draw(shape, device=device)) for shape in ((), (0,), (0, 3))]
    params += [nn.Parameter(draw((40, 30), device=device).t()), nn.Parameter(torch.ones(2, device=device), False)]
    for group in ("tensor", "row", "column"):
        rows = Regularizer(params, l1=0.5, l2_norm=2.0, group=group).report().rows
        assert [row["name"] for row in rows[1:-1]] == [str(i) for i in range(8)]
        for p, row in zip(params, rows[1:-1], strict=False):
            w = p.detach().double()
            expected = reference.fused_penalty([w], l1=0.5, l2_norm=2.0, group=group).item()
            assert row["value"] == pytest.approx(expected, rel=1e-12)
            assert row["zeros"] == (w == 0).sum().item()


def test_scalars():
    report = Regularizer([("w", nn.Parameter(torch.tensor([3.0, 0.0, -4.0, 0.0])))], l1=0.5, l2=0.1).report()
    assert report.scalars("penalty") == {
        "penalty/group 0/value": 6.0,
        "penalty/group 0/norm": 5.0,
        "penalty/group 0/zero_share": 0.5,
        "penalty/group 0/l1": 0.5,
        "penalty/group 0/l2": 0.1,
        "penalty/group 0/l2_norm": 0.0,
        "penalty/w/value": 6.0,
        "penalty/w/norm": 5.0,
        "penalty/w/zero_share": 0.5,
        "penalty/value": 6.0,
        "penalty/norm": 5.0,
        "penalty/zero_share": 0.5,
    }
    assert next(iter(report.scalars())).startswith("regularizer/")


def test_text():
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([2.0, -1.0, 2.0])
    params = [("layer.weight", nn.Parameter(weight)), ("scale", nn.Parameter(torch.full((1000,), 0.5)))]
    report = Regularizer(params, l1=1.0, rules=[("layer.*", {"l1": 0, "l2_norm": 1e-3, "group": "row"})]).report()
    assert str(report) == (
        "                elements  l1  l2  l2_norm    value     norm       zeros  zero slices\n"
        "group 0                6   0   0    0.001    0.003        3  3 (50.0 %)       1 of 2\n"
        "  layer.weight         6                     0.003        3  3 (50.0 %)       1 of 2\n"
        "group 1            1,000   1   0        0      500  15.8114   0 (0.0 %)\n"
        "  scale            1,000                       500  15.8114   0 (0.0 %)\n"
        "total              1,006                   500.003  16.0935   3 (0.3 %)"
    )
    plain = Regularizer([("w", nn.Parameter(torch.tensor([3.0, 0.0, -4.0, 0.0])))], l1=0.5).report()
    assert str(plain) == (
        "         elements   l1  l2  l2_norm  value  norm       zeros\n"
        "group 0         4  0.5   0        0    3.5     5  2 (50.0 %)\n"
        "  w             4                      3.5     5  2 (50.0 %)\n"
        "total           4                      3.5     5  2 (50.0 %)"
    )


def test_nothing_trained():
    report = Regularizer([nn.Parameter(torch.ones(2), requires_grad=False)], l1=1.0).report()
    assert [(row["name"], row["elements"], row["value"]) for row in report.rows] == [("total", 0, 0)]
    assert str(report)


def test_only_empty_parameters():
    (row, _, total) = Regularizer([nn.Parameter(torch.zeros(0, 3))], l1=0.1).report().rows
    assert (row["elements"], row["value"], row["norm"], total["zero_share"]) == (0, 0, 0, 0)


def test_rows_by_name():
    """A parameter's is found before those of groups and of all."""
    p, q, r = (torch.nn.Parameter(torch.full((n,), 2.0)) for n in (1, 2, 3))
    regularizer = Regularizer([("group 0", p), ("a", q), ("total", r)], l1=0.5, rules=[("a", {"l1": 1.0})])
    report = regularizer.report()
    assert [(report[name]["level"], report[name]["elements"]) for name in ("group 0", "a", "total", "group 1")] == [
        *[("parameter", 1), ("parameter", 2), ("parameter", 3)],
        ("group", 2),
    ]
    assert (report.total["level"], report.total["elements"], report.total["value"]) == ("total", 6, 8.0)
    with pytest.raises(KeyError, match="report: name must be that of a row, got 'group 11'; the nearest is 'group 1'"):
        report["group 11"]
    for _, param in regularizer.named_parameters():
        param.requires_grad_(False)
    assert regularizer.report()["total"]["elements"] == regularizer.report().total["elements"] == 0
