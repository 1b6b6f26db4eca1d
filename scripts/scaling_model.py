"""Predict the efficiency of data-parallel training from the time of a step on one device and an
alpha-beta model of the links: ``python scripts/scaling_model.py`` prints the tables of
docs/scaling.md.

A message of m bytes takes alpha + m / beta seconds on a link. The sums of gradients run in buckets
during the backward pass, as in ``portacnn.training.reducing``; what has not ended when the backward
pass ends is exposed. The batch per device is the same for any number of devices, so the compute
time is too, and the efficiency is compute / (compute + exposed).
"""

# Notation: n devices, g of them in a node, m bytes of gradients.

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

BUCKET = 4 << 20  # bytes; as portacnn.training.reducing.BUCKET
BACKWARD = 2 / 3
"""The backward pass's share of a step: two products for each one of the forward pass."""
SIZES = (8, 64, 256, 1024)


class Link(NamedTuple):
    """alpha: seconds of a message without content. beta: bytes per second in one direction."""

    alpha: float
    beta: float


class Cluster(NamedTuple):
    """Nodes of ``size`` devices each, with a network adapter for each device."""

    inside: Link
    between: Link
    size: int


GPUS = Cluster(Link(3e-6, 200e9), Link(8e-6, 20e9), 8)
"""Assumed: NVLink of an H100 node at 200 GB/s, a network of 200 Gbit/s per GPU at 20 GB/s."""
RATE = 10e12
"""Assumed FLOP/s of a GPU in a step: the estimate for ResNet20 in docs/gpu.md."""


# --- the time of a sum ----------------------------------------------------------------------------


def ring(link: Link, n: int, m: float) -> float:
    """Return the seconds of an all-reduce in a ring: n - 1 steps that reduce and scatter parts of
    m / n bytes, n - 1 that gather them."""
    return 2 * (n - 1) * (link.alpha + m / n / link.beta)


def tree(link: Link, n: int, m: float) -> float:
    """Return the seconds of an all-reduce in a pipelined binary tree: up and down its levels, each
    byte twice over each link."""
    return 2 * (math.ceil(math.log2(n)) * link.alpha + m / link.beta) if n > 1 else 0.0


def fastest(link: Link, n: int, m: float) -> float:
    """Return the seconds of the faster of the two, which NCCL and MPI choose by size."""
    return min(ring(link, n, m), tree(link, n, m))


Sum = Callable[[Link, int, float], float]


def in_nodes(cluster: Cluster, n: int, m: float, between: Sum = fastest) -> float:
    """Return the seconds of an all-reduce in two levels: parts are reduced and scattered within
    each node, then each device sums its part with those of other nodes, then nodes gather."""
    g = min(n, cluster.size)
    return ring(cluster.inside, g, m) + between(cluster.between, n // g, m / g)


# --- overlap with the backward pass ---------------------------------------------------------------


class Layer(NamedTuple):
    """Of one layer: its parameters, and the multiply-adds of one sample."""

    parameters: int
    multiply_adds: int


class Bucket(NamedTuple):
    """bytes: of gradients. ready: when they are complete, as a share of the backward pass."""

    bytes: float
    ready: float


def buckets(layers: Sequence[Layer], least: float = BUCKET, width: int = 4) -> list[Bucket]:
    """Return the buckets of a network in the order in which the backward pass completes them.

    Args:
        layers: in the order of the forward pass.
        least: bytes that a bucket has at least, except the last one.
        width: bytes of a value on the wire.
    """
    whole = sum(layer.multiply_adds for layer in layers)
    found, done, waiting = [], 0, 0
    for layer in reversed(layers):
        done += layer.multiply_adds
        waiting += layer.parameters
        if waiting * 4 >= least:
            found.append(Bucket(waiting * width, done / whole))
            waiting = 0
    return [*found, Bucket(waiting * width, 1.0)] if waiting else found


def exposed(parts: Sequence[Bucket], backward: float, seconds: Callable[[float], float]) -> float:
    """Return the seconds that a step waits for sums after its backward pass.

    Args:
        backward: seconds of the backward pass.
        seconds: the time of a sum by its bytes. Sums run one after the other.
    """
    free = 0.0
    for part in parts:
        free = max(free, part.ready * backward) + seconds(part.bytes)
    return max(0.0, free - backward)


def efficiency(layers: Sequence[Layer], step: float, seconds: Callable[[float], float]) -> float:
    """Return the compute share of a step that takes ``step`` seconds on one device."""
    return step / (step + exposed(buckets(layers), BACKWARD * step, seconds))


# --- the networks ---------------------------------------------------------------------------------


class Case(NamedTuple):
    """A network, the images of one device, and the seconds of a step there if they are known."""

    net: str
    batch: int
    step: float | None = None


CASES = (Case("simple", 100, 0.115e-3), Case("resnet18", 32), Case("resnet50", 32))
"""Of SimpleConvNet the time is docs/gpu.md's estimate."""


def layers_of(net: str) -> list[Layer]:
    """Return the layers of a benchmark's network that have parameters or multiply-adds."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from bench_portacnn import portacnn_model

    from portacnn.models.summary import rows

    model = portacnn_model(net, "cpu")
    network = model.network if hasattr(model, "network") else model
    return [
        Layer(row.parameters, row.multiply_adds)
        for row in rows(network, model.input_shape)
        if row.parameters or row.multiply_adds
    ]


def compute_of(layers: Sequence[Layer], batch: int) -> float:
    """Return the seconds of a step on one GPU: forward pass and twice as much backward, with two
    operations for each multiply-add."""
    return 6 * batch * sum(layer.multiply_adds for layer in layers) / RATE


# --- the tables -----------------------------------------------------------------------------------


def table() -> list[str]:
    """Return the lines of the table of efficiencies."""
    sizes = " | ".join(f"{n:,} GPUs" for n in SIZES)
    lines = [
        f"| network, images per GPU | step, ms | gradients, MB | sums | {sizes} |",
        f"|---|---|---|---|{'---|' * len(SIZES)}",
    ]
    ways: dict[str, Sum] = {"ring": ring, "tree": tree, "the faster": fastest}
    for case in CASES:
        layers = layers_of(case.net)
        step = compute_of(layers, case.batch) if case.step is None else case.step
        parameters = sum(layer.parameters for layer in layers)
        for name, between in ways.items():
            shares = [
                efficiency(layers, step, lambda m, n=n, b=between: in_nodes(GPUS, n, m, b))
                for n in SIZES
            ]
            cells = " | ".join(f"{100 * share:.0f}%" for share in shares)
            lines.append(
                f"| {case.net}, {case.batch} | {1e3 * step:.2f} | {4e-6 * parameters:.1f} | {name} "
                f"| {cells} |"
            )
    return lines


def same_batch(batch: int = 1024, nets: Sequence[str] = ("resnet18", "resnet50")) -> list[str]:
    """Return the lines of the table of steps with the same global batch on any number of GPUs."""
    sizes = " | ".join(f"{n:,} GPUs, {batch // n} each" for n in SIZES)
    lines = [f"| network | {sizes} |", f"|---|{'---|' * len(SIZES)}"]
    for net in nets:
        layers, cells = layers_of(net), []
        for n in SIZES:
            step = compute_of(layers, batch // n)
            share = efficiency(layers, step, lambda m, n=n: in_nodes(GPUS, n, m))
            cells.append(f"{1e3 * step / share:.1f} ms, {100 * share:.0f}%")
        lines.append(f"| {net} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print("\n".join([*table(), "", *same_batch()]))
