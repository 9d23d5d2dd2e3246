"""The table of what can be measured: stages on the shapes of known models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[int, ...]

# Data; latents; whether mu and logvar are packed on dimension 1, as an encoder of images returns them. The video's latents are
# compressed 4 times in time and 8 times in space, to 16 channels (CogVideoX, arXiv:2408.06072, section 2.1).
MODELS: dict[str, tuple[Shape, Shape, bool]] = {
    "MNIST": ((128, 784), (128, 20), False),
    "CIFAR": ((512, 3072), (512, 128), False),
    "latent diffusion": ((16, 3, 512, 512), (16, 4, 64, 64), True),
    "video": ((1, 3, 17, 512, 512), (1, 16, 5, 64, 64), True),
    "genes": ((4096, 30000), (4096, 64), False),
    "huge": ((1024, 2**20), (1024, 2**20), False),
}
# On a CPU.
SMALL_HUGE: Shape = (4096, 4096)

LATENT_PARTS = ("latent forward", "latent backward")

SWEEP = tuple(2**k for k in range(6, 25))
SWEEP_ROW = 1024

# The training steps: a batch by name. "narrow" is a VAE of layers so narrow that the loss is a fair part of its step.
STEPS: dict[str, tuple[Shape, ...]] = {
    "mlp": ((32, 784),),
    "conv": ((32, 784),),
    "narrow": ((128, 784), (4096, 3072)),
}

# Of an item on a CPU, in float32: ratios to (eager, compiled), or for "bandwidth" a percentage of a copy's.
TARGETS = {
    "latent 128x2048": (7.0, 15.0),
    "latent 4096x4096": (8.0, 6.0),
    "nll 128x784": (2.5, 3.5),
    "nll 4096x3072": (4.0, 3.0),
    "classic 128x784x20": (4.0, 3.5),
    "bandwidth 4096x4096": (85.0,),
    "bandwidth 4096x3072": (85.0,),
}

# How many tensors of the latents' and of the data's size plain PyTorch may hold at once, inputs and gradients included.
EAGER_TENSORS = (18, 7)


@dataclass(frozen=True)
class Item:
    """One line of the table.

    Attributes:
        stage: a key of ``work.STAGES``, or "step".
        data, latents: shapes of x_hat and of mu, () where there is none.
        packed: mu and logvar are one tensor, twice as long on dimension 1.
        model: whose shapes these are; "" for those of nobody.
        targets: as in ``TARGETS``.
        sweep: one of many sizes, which meets eager PyTorch alone.
        eager: without torch.compile, which takes longer for this model than all else together.
    """

    stage: str
    data: Shape = ()
    latents: Shape = ()
    packed: bool = False
    model: str = ""
    targets: tuple[float, ...] = ()
    sweep: bool = False
    eager: bool = False

    @property
    def name(self) -> str:
        if self.sweep:
            return f"sweep {self.stage} {math.prod(self.data or self.latents)}"
        latents = (self.latents[0], 2 * self.latents[1], *self.latents[2:]) if self.packed else self.latents
        if self.stage == "step":
            return f"step {self.model} {_sizes(self.data)}"
        if self.data and self.latents:
            flat = len(self.data) == len(self.latents) == 2
            return f"{self.stage} {_sizes((*self.data, self.latents[1]) if flat else self.data)}" + (
                "" if flat else f" {_sizes(latents)}"
            )
        return f"{self.stage} {_sizes(self.data or latents)}"

    @property
    def title(self) -> str:
        """The name, and whose shape it is."""
        return f"{self.name} ({self.model})" if self.model and self.stage != "step" else self.name

    @property
    def elements(self) -> tuple[int, int]:
        """Of the latents and of the data."""
        return math.prod(self.latents) if self.latents else 0, math.prod(self.data) if self.data else 0

    def working_set(self, itemsize: int, further_bytes: int = 0) -> int:
        """An upper estimate of the bytes that plain PyTorch holds at once, and ``further_bytes`` of inputs besides."""
        return sum(n * held for n, held in zip(self.elements, EAGER_TENSORS, strict=True)) * itemsize + further_bytes


def items(device_type: str, *, everything: bool = False, sweep: bool = False) -> Iterator[Item]:
    """All that is measured on a kind of device, what matters most first.

    Those that a run has time for, or with ``everything`` all stages on all shapes; with ``sweep`` many sizes besides.
    """
    found = _gpu_items(everything) if device_type != "cpu" else _cpu_items(everything)
    listed = {}
    for item in found:
        listed.setdefault(item.name, item)
    yield from listed.values()
    for stage in ("latent", "nll") if sweep else ():
        for count in SWEEP:
            row = min(count, SWEEP_ROW)
            yield _sized(stage, (count // row, row), sweep=True)


def _gpu_items(everything: bool) -> Iterator[Item]:
    for stage in ("both", "nll", "latent"):
        for model in MODELS:
            yield _modelled(stage, model)
    for model in ("MNIST", "latent diffusion"):
        yield _modelled("classic", model)
    yield from _steps(compiled=tuple(STEPS))
    for stage in LATENT_PARTS:
        for model in MODELS if everything else ("MNIST", "latent diffusion", "huge"):
            yield _modelled(stage, model)
    yield from _bandwidths()
    for model in MODELS if everything else ():
        yield _modelled("classic", model)


def _cpu_items(everything: bool) -> Iterator[Item]:
    huge = {"model": "huge"}
    for shape in ((8, 8), (128, 20), (128, 2048), SMALL_HUGE):
        yield _sized("latent", shape, **{(128, 20): {"model": "MNIST"}, SMALL_HUGE: huge}.get(shape, {}))
    for shape in ((8, 8), (128, 784), (128, 3072), (1024, 3072), (4096, 3072)):
        yield _sized("nll", shape, **({"model": "MNIST"} if shape == (128, 784) else {}))
    yield _modelled("classic", "MNIST")
    yield from _bandwidths()
    yield from _steps(compiled=("narrow", *(STEPS if everything else ())))
    for model in ("MNIST", "CIFAR", "latent diffusion"):
        yield _modelled("both", model)
    for stage in LATENT_PARTS:
        yield _modelled(stage, "MNIST")
        yield _sized(stage, (128, 2048))
    for model in ("video", "genes"):
        yield _modelled("nll", model)
    if everything:
        for stage in ("both", "nll", "latent", "classic", *LATENT_PARTS):
            for model in MODELS:
                if model != "huge":
                    yield _modelled(stage, model)
            if stage in ("nll", "latent", *LATENT_PARTS):
                yield _sized(stage, SMALL_HUGE, **huge)


def _bandwidths() -> Iterator[Item]:
    yield _sized("bandwidth", (4096, 4096))
    yield _sized("bandwidth", (4096, 3072))


def _steps(*, compiled: tuple[str, ...]) -> Iterator[Item]:
    for model, shapes in STEPS.items():
        for shape in shapes:
            yield Item("step", data=shape, model=model, eager=model not in compiled)


def _modelled(stage: str, model: str) -> Item:
    data, latents, packed = MODELS[model]
    if stage in ("nll", "bandwidth"):
        return Item(stage, data=data, model=model, **_target(Item(stage, data=data)))
    if stage.startswith("latent"):
        return Item(stage, latents=latents, packed=packed, model=model)
    made = Item(stage, data, latents, packed, model)
    return Item(stage, data, latents, packed, model, **_target(made))


def _sized(stage: str, shape: Shape, *, model: str = "", sweep: bool = False) -> Item:
    shapes = {"latents": shape} if stage.startswith("latent") else {"data": shape}
    made = Item(stage, **shapes, sweep=sweep)
    return Item(stage, **shapes, model=model, sweep=sweep, **_target(made))


def _target(item: Item) -> dict[str, tuple[float, ...]]:
    return {"targets": TARGETS.get(item.name, ())}


def _sizes(shape: Shape) -> str:
    return "x".join(map(str, shape))
