"""The parameter lists: the shapes of real networks, written as formulas so that no model library is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]

#: The spread of the weights: about that of a trained network's.
WEIGHT_SCALE = 0.05


@dataclass(frozen=True)
class Case:
    """A parameter list: its name on the command line, its title in a table, the shape of every tensor, the dtype."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def bytes(self) -> int:
        """Of the parameters."""
        return self.elements * self.dtype.itemsize

    @property
    def is_large(self) -> bool:
        """Whether its memory is what it costs: below, it is the calls."""
        return self.elements >= 10_000_000

    def make_params(self, device: torch.device) -> list[Tensor]:
        """The parameters, leaves that require grad, seeded."""
        generator = torch.Generator(device).manual_seed(0)
        return [
            torch.randn(shape, generator=generator, device=device, dtype=self.dtype).mul_(WEIGHT_SCALE).requires_grad_()
            for shape in self.shapes
        ]


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _resnet50() -> list[Shape]:
    """He et al. 2015, in torchvision's order: no bias in a convolution, a scale and a shift in each norm."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(blocks):
            shapes += convolution(inputs, width, 1)
            shapes += convolution(width, width, 3)
            shapes += convolution(width, outputs, 1)
            if block == 0:
                shapes += convolution(inputs, outputs, 1)  # the shortcut
            inputs = outputs
    return shapes + _linear(inputs, 1000)


def _gpt2_small() -> list[Shape]:
    """Radford et al. 2019: 12 layers of width 768; the output layer shares the token embedding."""
    width = 768
    norm: list[Shape] = [(width,), (width,)]
    block = norm + _linear(width, 3 * width) + _linear(width, width)
    block += norm + _linear(width, 4 * width) + _linear(4 * width, width)
    return [(50257, width), (1024, width), *block * 12, *norm]


def _vit_b16() -> list[Shape]:
    """Dosovitskiy et al. 2020, in torchvision's order: 16x16 patches of a 224x224 image, 12 layers of width 768."""
    width, patch = 768, 16
    positions = (224 // patch) ** 2 + 1
    norm: list[Shape] = [(width,), (width,)]
    block = norm + _linear(width, 3 * width) + _linear(width, width)
    block += norm + _linear(width, 4 * width) + _linear(4 * width, width)
    stem: list[Shape] = [(1, 1, width), (width, 3, patch, patch), (width,), (1, positions, width)]
    return [*stem, *block * 12, *norm, *_linear(width, 1000)]


def _tinyllama() -> list[Shape]:
    """Zhang et al. 2024: 22 layers of width 2048, 4 key and value heads of 64, and an output layer of its own."""
    width, heads, inner, vocabulary = 2048, 4 * 64, 5632, 32000
    attention: list[Shape] = [(width, width), (heads, width), (heads, width), (width, width)]
    block = [*attention, (inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *block * 22, (width,), (vocabulary, width)]


CASES = {
    case.name: case
    for case in (
        Case("net", "10-20-1 net", (*_linear(10, 20), *_linear(20, 1))),
        Case("mlp", "784-128-10 MLP", (*_linear(784, 128), *_linear(128, 10))),
        Case("small_tensors", "1,000 tensors of 64", ((64,),) * 1000),
        Case("resnet50", "ResNet-50", tuple(_resnet50())),
        Case("vit_b16", "ViT-B/16", tuple(_vit_b16())),
        Case("one_tensor", "one tensor of 100M", ((100_000_000,),)),
        Case("gpt2", "GPT-2 small", tuple(_gpt2_small())),
        Case("tinyllama_bf16", "TinyLlama 1.1B, bfloat16", tuple(_tinyllama()), torch.bfloat16),
        Case("tinyllama", "TinyLlama 1.1B", tuple(_tinyllama())),
    )
}

#: The cases that a run measures if it is not told which, by the kind of device.
DEVICE_CASES: dict[str, tuple[str, ...]] = {
    "cpu": tuple(name for name in CASES if not name.startswith("tinyllama")),
    "cuda": ("small_tensors", "resnet50", "vit_b16", "one_tensor", "gpt2", "tinyllama_bf16", "tinyllama"),
}


def title(name: str) -> str:
    """The title of a case; of what is none, its name."""
    return CASES[name].title if name in CASES else name
