"""``examples/finetune.py``: the short form runs, and the penalty is the same whichever way it is computed."""

import json

import pytest
import torch
from loaded_examples import DOCS, loaded

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of their imports
]


@pytest.fixture
def finetune():
    with loaded("finetune") as module:
        yield module


def test_trains_alike_with_the_loop_and_attached(finetune, tmp_path, capsys):
    results = finetune.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    assert results["largest_differences"]["task_loss"] == results["largest_differences"]["weight"] == 0
    assert results["largest_differences"]["penalty"] < 1e-6
    assert results["accuracy"]["attach"] == results["accuracy"]["loop"]
    runs = results["seed_0"]
    assert runs["attach"]["losses"] != runs["none"]["losses"]
    assert runs["attach"]["losses"][0] == runs["none"]["losses"][0]
    penalties = runs["attach"]["penalties"]  # the strengths are warming up, and the weights move little
    assert penalties == pytest.approx([penalties[0] * (i + 1) for i in range(len(penalties))], rel=0.1)
    assert results["milliseconds"]["none"]["step"] > 0
    assert results["milliseconds"].keys() == finetune.NAMES.keys()

    assert json.loads((tmp_path / "finetune.json").read_text()) == results
    for picture in ("finetune-losses.png", "finetune-time.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "largest differences of attached from loop: task loss 0.0e+00, weight 0.0e+00" in printed.out
    assert "timing" in printed.err
    assert "timing" not in printed.out


def test_no_legend_of_the_picture_covers_a_line(finetune):
    drawn = json.loads((DOCS / "pictures" / "finetune.json").read_text())["seed_0"]
    runs = [finetune.Run(drawn[kind]["losses"], drawn[kind]["penalties"], [], 0.0) for kind in ("loop", "attach")]
    figure = finetune.draw_losses(*runs)
    assert len(figure.legends) == 1
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_strengths_are_by_layer(finetune):
    model = finetune.network(seed=0)
    regularizer = finetune.Regularizer(model, **finetune.PENALTY)
    names = [name for name, _ in regularizer.named_parameters()]
    assert names == [name for name, p in model.named_parameters() if p.ndim > 1]
    assert not any("norm" in name or name.endswith("bias") for name in names)
    regularizer.step = finetune.WARM_UP
    strengths = {row["name"]: (row.get("l1"), row.get("l2")) for row in regularizer.report().rows}
    assert strengths["classifier.weight"] == (finetune.HEAD_L1, finetune.HEAD_L2)
    assert strengths["vit.embeddings.cls_token"] == (0, finetune.EMBEDDINGS_L2)
    assert strengths["vit.layers.0.mlp.fc1.weight"] == (0, finetune.WEIGHTS_L2)


@pytest.mark.parametrize("step", [0, 7, 29, 30, 1000])
def test_loop_is_the_same_penalty(finetune, step):
    """With the same bits of the gradient, at every step of the schedule."""
    model = finetune.network(seed=1)
    params = [p for p in model.parameters() if p.ndim > 1]
    regularizer = finetune.Regularizer(model, **finetune.PENALTY)
    regularizer.step = step
    ours, loop = regularizer(), finetune.loop_penalty(model, step)
    torch.testing.assert_close(ours, loop, rtol=1e-6, atol=0)
    for a, b in zip(torch.autograd.grad(ours, params), torch.autograd.grad(loop, params), strict=True):
        assert torch.equal(a, b)


def test_computes_in_bfloat16(finetune, tmp_path):
    study = finetune.Study(finetune.Sizes(1, 1, 0, 1), lambda: None, tmp_path)
    trainer, _ = study.fine_tuning(1, seed=0)
    seen = []
    trainer.model.vit.layers[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    trainer.train()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_times_are_paired_by_rounds(finetune):
    """A machine that becomes slower from round to round, and penalties that add 1 and 2 ms."""
    rounds = [{"none": t, "loop": t + 0.002, "attach": t + 0.001} for t in (0.01, 0.02, 0.03, 0.04, 0.05)]
    table = finetune.times(rounds)
    assert table["loop"]["step"] == pytest.approx(32)
    assert [table["loop"][what] for what in ("added", "added_low", "added_high")] == pytest.approx([2, 2, 2])
    assert table["attach"]["added"] == pytest.approx(1)
    assert table["attach"]["ratio"] == pytest.approx(31 / 30)
    assert table["none"]["added"] == 0
