"""What a run of `benchmarks.gpu` covers, and how its time is shared out; the most telling comes first everywhere."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_models import SIDE


@dataclass(frozen=True)
class Settings:
    """What a run measures: Linear ``shapes`` (n_out, n_in), one convolution in ``every``, ``shares`` of time."""

    seconds: float
    shapes: tuple[tuple[int, int], ...] = ((4096, 25088), (4096, 4096), (1000, 2048))
    rows: tuple[int, ...] = (1, 8, 4, 2, 16, 32, 64, 128, 256)
    conv_networks: tuple[str, ...] = ("resnet50", "mobilenet_v2")
    conv_batches: tuple[int, ...] = (8, 1, 32, 128)
    every: int = 1
    networks: tuple[str, ...] = ("resnet50", "mobilenet_v2", "vgg16", "efficientnet_b0")
    batches: tuple[int, ...] = (8, 1, 32, 128)
    compiled: tuple[tuple[str, int], ...] = (
        ("resnet50", 8),
        ("mobilenet_v2", 8),
        ("resnet50", 32),
        ("vgg16", 8),
        ("efficientnet_b0", 8),
        ("mobilenet_v2", 32),
        ("resnet50", 128),
        ("mobilenet_v2", 128),
        ("vgg16", 32),
        ("efficientnet_b0", 32),
        ("vgg16", 128),
        ("efficientnet_b0", 128),
        ("resnet50", 1),
        ("mobilenet_v2", 1),
        ("vgg16", 1),
        ("efficientnet_b0", 1),
    )
    side: int = SIDE
    plan_seconds: float = 8.0  # of each version of each network
    warm_seconds: float = 80.0  # at most, to compile kernels in several processes before any is timed
    warm_processes: int = 8
    shares: tuple[tuple[str, float], ...] = (("linear", 0.27), ("conv", 0.21), ("networks", 0.52))


FULL = Settings(seconds=465.0)
QUICK = Settings(
    seconds=60.0,
    shapes=((4096, 25088), (4096, 4096)),
    rows=(1, 8, 64),
    conv_batches=(8,),
    every=9,
    networks=("mobilenet_v2",),
    batches=(8, 1),
    compiled=(),
    plan_seconds=4.0,
    warm_seconds=18.0,
)
REHEARSAL = Settings(
    seconds=120.0,
    shapes=((24, 48),),
    rows=(1, 3),
    conv_networks=("rehearsal",),
    conv_batches=(2,),
    networks=("rehearsal",),
    batches=(2, 1),
    compiled=(("rehearsal", 2),),
    side=32,
    plan_seconds=3.0,
    warm_seconds=0.0,
)
