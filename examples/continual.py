"""Two tasks one after the other: what does a network still know of the first when it has learned the second? Without a
penalty, with L2-SP (stay near the weights of the first task), and with EWC (near where the first task needs it).

    python examples/continual.py

Twice with scikit-learn's digits: the second task has the same digits with their pixels in another order, or other
digits, 5 to 9 after 0 to 4. All networks of a seed begin as the one that has learned the first task. A strength is
chosen on validation images, by the mean accuracy of both tasks; accuracies are those of test images.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from common import extras, parser, prepare, save_picture, save_results, spread
from prune import Images, accuracy, load, one_thread
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fused_reg import Regularizer

with extras():
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import Progress

HIDDEN, EPOCHS, LEARNING_RATE, BATCH = 256, 20, 0.1, 32
STRENGTHS = {
    "no penalty": [0.0],
    "L2-SP": [0.01, 0.03, 0.1, 0.3],
    "EWC": [10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0],
}
TASKS = ("permuted pixels", "other digits")
COLORS = dict(zip(STRENGTHS, ("0.4", "#0072B2", "#D55E00"), strict=True))  # Okabe and Ito's
STYLES = dict(zip(STRENGTHS, ("o", "s-", "^-"), strict=True))

Task = tuple[Images, Images, Images]  # images to train, validate and test with


def two_tasks(which: str, seed: int) -> tuple[Task, Task]:
    data = load(seed)
    x_and_y = [(x.flatten(1), y) for x, y in (data.train, data.validation, data.test)]
    if which == "permuted pixels":
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        first, second = x_and_y, [(x[:, order], y) for x, y in x_and_y]
    else:
        first, second = ([(x[of], y[of]) for x, y in x_and_y for of in [(y < 5) == low]] for low in (True, False))
    return tuple(first), tuple(second)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def fisher(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Fisher information: the squared gradient of each label's log-probability, in the mean over
    images and over labels, each as probable as the network says."""
    params = {name: p.detach() for name, p in net.named_parameters()}

    def log_probabilities(params: dict[str, Tensor], image: Tensor, label: int) -> Tensor:
        return functional_call(net, params, (image,)).log_softmax(0)[label]

    with torch.no_grad():
        probabilities = net(x).softmax(1)
    found = {name: torch.zeros_like(p) for name, p in params.items()}
    for label, probability in enumerate(probabilities.T):
        grads = vmap(grad(log_probabilities), in_dims=(None, 0, None))(params, x, label)
        for name, g in grads.items():
            found[name] += torch.tensordot(probability, g**2, 1) / len(x)
    return found


def near(net: nn.Module, strength: float, importance: dict[str, Tensor] | None) -> Regularizer:
    """strength * sum(importance * (w - w0)**2), w0 being the weights as they are now. L2-SP has no importance, which is
    1 then; EWC has the Fisher information of the task that was learned."""
    return Regularizer(net, l2=strength, toward="start", importance=importance)


def train(
    net: nn.Module, images: Images, epochs: int, penalty: Regularizer | None = None, watch: tuple[Images, ...] = ()
) -> list[list[float]]:
    """Trains in place; returns the accuracies on watched images after each epoch. A proximal step toward w0 is stable
    for any strength, where the penalty's gradient would want a smaller learning rate."""
    x, y = images
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    if penalty is not None:
        penalty.attach(optimizer, mode="prox")
    found = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        found.append([round(accuracy(net, part), 4) for part in watch])
    return found


def run(which: str, seed: int, strengths: dict[str, list[float]], epochs: int) -> dict[str, Any]:
    """One seed: all accuracies are those of the first and the second task."""
    first, second = two_tasks(which, seed)
    torch.manual_seed(seed)
    start = network()
    train(start, first[0], epochs)
    importance = fisher(start, first[0][0])
    test, validation = (first[2], second[2]), (first[1], second[1])
    numbers: dict[str, Any] = {
        "before": round(accuracy(start, first[2]), 4),
        "together": together(first, second, seed, epochs),
    }
    for method, tried in strengths.items():
        numbers[method] = {}
        for strength in tried:
            torch.manual_seed(seed)
            net = copy.deepcopy(start)
            penalty = near(net, strength, importance if method == "EWC" else None) if strength else None
            epochwise = train(net, second[0], epochs, penalty, test)
            scores = [round(accuracy(net, part), 4) for part in validation]
            numbers[method][str(strength)] = {"validation": scores, "test": epochwise[-1], "epochs": epochwise}
    return numbers


def together(first: Task, second: Task, seed: int, epochs: int) -> list[float]:
    """What one network learns that has the images of both tasks at once."""
    torch.manual_seed(seed)
    net = network()
    x, y = (torch.cat(both) for both in zip(first[0], second[0], strict=True))
    return train(net, (x, y), epochs, watch=(first[2], second[2]))[-1]


def choose(runs: list[dict[str, Any]], method: str) -> str:
    """The strength with the best mean accuracy over seeds, tasks and validation images."""
    return max(runs[0][method], key=lambda s: statistics.mean(sum(found[method][s]["validation"]) for found in runs))


def forget_epochs(runs: list[dict[str, Any]], chosen: dict[str, str]) -> None:
    """But for what the picture shows."""
    for method, strength in chosen.items():
        for found in runs:
            for tried, numbers in found[method].items():
                if tried != strength:
                    del numbers["epochs"]


def report(results: dict[str, Any]) -> None:
    for which, found in results["tasks"].items():
        runs = found["seeds"]
        print(f"{which}: {len(runs)} seeds, accuracy of the first task before the second: ", end="")
        print(spread([of["before"] for of in runs]))
        print(f"{'':14}{'strength':>10}{'first task':>20}{'second task':>20}{'mean':>20}")
        for method, strength in found["chosen"].items():
            row(method, strength, [of[method][strength]["test"] for of in runs])
        row("both together", "", [of["together"] for of in runs])
        print()


def row(name: str, strength: str, scores: list[list[float]]) -> None:
    columns = [*zip(*scores, strict=True), [statistics.mean(both) for both in scores]]
    print(f"{name:14}{strength:>10}" + "".join(f"{spread(column):>20}" for column in columns))


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    figures = {"epochs": draw_epochs(results["tasks"]), "tradeoff": draw_tradeoff(results["tasks"])}
    paths = [save_picture(figure, folder, f"continual-{what}") for what, figure in figures.items()]
    plt.close("all")
    return paths


def draw_epochs(tasks: dict[str, Any]) -> Any:
    """Of each chosen strength, the mean of the seeds."""
    figure, columns = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, (which, found) in zip(columns, tasks.items(), strict=True):
        for method, strength in found["chosen"].items():
            curves = torch.tensor([of[method][strength]["epochs"] for of in found["seeds"]]).mean(dim=0).T
            epochs = range(1, curves.shape[1] + 1)
            axes.plot(epochs, curves[0], color=COLORS[method], linewidth=2, label=f"{method}, first task")
            axes.plot(epochs, curves[1], "--", color=COLORS[method], linewidth=1.2, label="the second")
        axes.set(title=which, xlabel="epoch of the second task", ylim=(-0.02, 1.02))
        axes.xaxis.get_major_locator().set_params(integer=True)
    columns[0].set_ylabel("accuracy on test images")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_tradeoff(tasks: dict[str, Any]) -> Any:
    """Every strength that was tried, the mean of the seeds; the chosen one is larger."""
    figure, columns = plt.subplots(1, 2, figsize=(9, 4.3), sharey=True, layout="constrained")
    for axes, (which, found) in zip(columns, tasks.items(), strict=True):
        for method, chosen in found["chosen"].items():
            scores = {
                strength: torch.tensor([of[method][strength]["test"] for of in found["seeds"]]).mean(dim=0).tolist()
                for strength in found["seeds"][0][method]
            }
            axes.plot(*zip(*scores.values(), strict=True), STYLES[method], color=COLORS[method], markersize=5)
            axes.plot(*scores[chosen], STYLES[method][0], color=COLORS[method], markersize=10, label=method)
        both = torch.tensor([of["together"] for of in found["seeds"]]).mean(dim=0).tolist()
        axes.plot(*both, "*", color="#009E73", markersize=11, label="both together")
        axes.set(title=which, xlabel="accuracy on the first task")
    columns[0].set_ylabel("accuracy on the second task")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parser(__doc__, "continual").parse_args(arguments)
    folder = prepare(given.out)
    seeds, epochs = (min(given.seeds, 2), 8) if given.quick else (given.seeds, EPOCHS)
    strengths = {method: tried[1:4:2] or tried for method, tried in STRENGTHS.items()} if given.quick else STRENGTHS
    results: dict[str, Any] = {"epochs": epochs, "tasks": {}}
    with one_thread(), Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=seeds * len(TASKS))
        for which in TASKS:
            runs = []
            for seed in range(seeds):
                runs.append(run(which, seed, strengths, epochs))
                progress.advance(bar)
            chosen = {method: choose(runs, method) for method in strengths}
            results["tasks"][which] = {"chosen": chosen, "seeds": runs}
            forget_epochs(runs, chosen)
    save_results(folder, "continual", results)
    report(results)
    print("pictures:", *draw(results, folder))
    return results


if __name__ == "__main__":
    main()
