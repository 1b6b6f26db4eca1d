"""Convolution and pooling on some thousands of geometries, against PyTorch: equal in values and
gradients, or both refuse.

Sizes are tiny and the numbers small integers, so that sums are exact and only geometry can differ.
What we take and PyTorch does not (or the other way round) is listed with its reason; everything
else must agree.
"""

import random
from itertools import product
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import PortacnnError
from portacnn.ops import use_kernels
from support.matrix import Here

torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
F = torch.nn.functional

pytestmark = pytest.mark.slow
COUNT = 1500  # configurations of each op, drawn from its grid


def sample(grid: dict[str, list], count: int = COUNT) -> list[dict[str, Any]]:
    """So many members of the product of the grid's lists; the same ones on every run."""
    rng = random.Random(0)
    return [{name: rng.choice(values) for name, values in grid.items()} for _ in range(count)]


def per_axis(low: int, high: int) -> list:
    """For one to three axes, as the rest of the configuration asks: a function of their number."""
    rng = random.Random(low * 10 + high)
    return [tuple(rng.randint(low, high) for _ in range(3)) for _ in range(40)] + [
        (n,) * 3 for n in range(low, high + 1)
    ]


def integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-4, 5, shape).astype("float64")


def outcome(run: Any, refusals: tuple) -> Any:
    try:
        return run()
    except refusals as error:
        return error


def compare(here: Here, ours: Any, theirs: Any, arrays: list[np.ndarray], config: Any) -> str:
    """Run both on the same arrays, values and gradients. Gives "equal", "refused", or who alone
    refused: "ours", "theirs"."""

    def mine() -> list[np.ndarray]:
        y, backward = ours(*[here.array(a) for a in arrays])
        dy = integers(tuple(y.shape), 9)
        gradients = backward(here.array(dy))
        return [
            here.host(g)
            for g in (y, *(gradients if isinstance(gradients, tuple) else (gradients,)))
        ]

    got = outcome(mine, (PortacnnError,))

    def other() -> list[np.ndarray]:
        leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
        y = theirs(*leaves)
        # where a window sees padding only, PyTorch's backward writes out of bounds
        if isinstance(got, Exception):
            return []
        y.backward(torch.tensor(integers(tuple(y.shape), 9)))
        return [y.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]

    expected = outcome(other, (RuntimeError, ValueError))
    if isinstance(got, Exception) or isinstance(expected, Exception):
        if isinstance(got, Exception) and isinstance(expected, Exception):
            return "refused"
        return "ours" if isinstance(got, Exception) else "theirs"
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12, err_msg=str(config))
    return "equal"


def check(
    here: Here, configurations: list, pair: Any, allowed: Any = lambda who, config: False
) -> None:
    seen = {"equal": 0, "refused": 0, "ours": 0, "theirs": 0}
    for choice, config in product(
        ("auto", "reference") if here.backend.kernels else ("auto",), configurations
    ):
        ours, theirs, arrays = pair(config)
        with use_kernels(choice):
            who = compare(here, ours, theirs, arrays, config)
        seen[who] += 1
        assert who in ("equal", "refused") or allowed(who, config), f"only {who} refused: {config}"
    print(seen)
    assert seen["equal"] > len(configurations) / 4


def sized(config: dict[str, Any]) -> tuple:
    axes = config["axes"]
    return axes, *(
        tuple(config[name][:axes]) for name in ("size", "kernel", "stride", "padding", "dilation")
    )


GRID = {
    "axes": [1, 2, 3],
    "size": per_axis(2, 9),
    "kernel": per_axis(1, 5),
    "stride": per_axis(1, 3),
    "padding": per_axis(0, 3),
    "dilation": per_axis(1, 3),
}
CHANNELS = {"groups": [1, 1, 2, 3], "cg": [1, 2], "og": [1, 2], "n": [1, 2]}


@pytest.fixture(params=["numpy", "torch"])
def here(request: pytest.FixtureRequest) -> Here:
    from portacnn.runtime import resolve

    return Here(request.param, resolve(request.param))


def test_conv(here: Here) -> None:
    def pair(config: dict[str, Any]) -> tuple:
        axes, size, kernel, stride, padding, dilation = sized(config)
        groups, cg, og = config["groups"], config["cg"], config["og"]
        shapes = [(config["n"], cg * groups, *size), (og * groups, cg, *kernel), (og * groups,)]
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        op, backward = getattr(ops, f"conv{axes}d"), getattr(ops, f"conv{axes}d_backward")

        def ours(*arrays: Any) -> Any:
            y, cache = op(*arrays, **options)
            return y, lambda dy: backward(dy, cache)

        def theirs(*leaves: Any) -> Any:
            return getattr(F, f"conv{axes}d")(*leaves, **options)

        return ours, theirs, [integers(s, i) for i, s in enumerate(shapes)]

    check(here, sample({**GRID, **CHANNELS}), pair)


def test_conv_transpose(here: Here) -> None:
    def pair(config: dict[str, Any]) -> tuple:
        axes, size, kernel, stride, padding, dilation = sized(config)
        groups, cg, og = config["groups"], config["cg"], config["og"]
        shapes = [(config["n"], cg * groups, *size), (cg * groups, og, *kernel), (og * groups,)]
        options = {
            "stride": stride,
            "padding": padding,
            "output_padding": config["output_padding"][:axes],
            "groups": groups,
            "dilation": dilation,
        }
        op, backward = (
            getattr(ops, f"conv_transpose{axes}d"),
            getattr(ops, f"conv_transpose{axes}d_backward"),
        )

        def ours(*arrays: Any) -> Any:
            y, cache = op(*arrays, **options)
            return y, lambda dy: backward(dy, cache)

        def theirs(*leaves: Any) -> Any:
            return getattr(F, f"conv_transpose{axes}d")(*leaves, **options)

        return ours, theirs, [integers(s, i) for i, s in enumerate(shapes)]

    small = {"size": per_axis(1, 4), "output_padding": [(0, 0, 0)] * 20 + per_axis(0, 2)}
    check(here, sample({**GRID, **CHANNELS, **small}), pair)


def pools(kind: str, options: Any) -> Any:
    def pair(config: dict[str, Any]) -> tuple:
        axes, chosen = config["axes"], options(config)
        op, backward = getattr(ops, f"{kind}{axes}d"), getattr(ops, f"{kind}{axes}d_backward")

        def ours(x: Any) -> Any:
            y, cache = op(x, **chosen)
            return y, lambda dy: backward(dy, cache)

        def theirs(x: Any) -> Any:
            return getattr(F, f"{kind}{axes}d")(x, **chosen)

        x = integers((config["n"], config["cg"], *config["size"][:axes]), config["seed"])
        return ours, theirs, [np.where(x < config["floor"], -np.inf, x) if "max" in kind else x]

    return pair


# Ties abound among nine integers; a floor of 4 makes nearly all -inf.
POOLS = {**GRID, "padding": [(0, 0, 0)] * 20 + per_axis(0, 2), "ceil_mode": [False, True]}
POOLS |= {"n": [1, 2], "cg": [1, 2], "seed": [1, 2, 3], "floor": [-9, -9, 4]}


def test_max_pool(here: Here) -> None:
    def options(config: dict[str, Any]) -> dict[str, Any]:
        _, _, kernel, stride, padding, dilation = sized(config)
        return {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "ceil_mode": config["ceil_mode"],
        }

    def allowed(who: str, config: dict[str, Any]) -> bool:
        _, size, kernel, _, padding, dilation = sized(config)
        # PyTorch keeps the padding to half of the kernel as it is before it is dilated
        if who == "theirs":
            return any(p > k // 2 for k, p in zip(kernel, padding, strict=True))
        # Spread by dilation, a window may miss a small input altogether. PyTorch answers -inf; we
        # refuse.
        return any(p and n < d for n, p, d in zip(size, padding, dilation, strict=True))

    check(here, sample(POOLS), pools("max_pool", options), allowed)


def test_avg_pool(here: Here) -> None:
    def options(config: dict[str, Any]) -> dict[str, Any]:
        axes, _, kernel, stride, padding, _ = sized(config)
        chosen = {
            "kernel_size": kernel,
            "stride": stride,
            "padding": padding,
            "ceil_mode": config["ceil_mode"],
            "count_include_pad": config["include"],
        }
        return {**chosen, "divisor_override": config["divisor"]} if axes > 1 else chosen

    grid = {**POOLS, "include": [True, False], "divisor": [None, None, 1, 3]}

    def allowed(who: str, config: dict[str, Any]) -> bool:
        axes, size, kernel, *_ = sized(config)
        # avg_pool3d alone asks that the kernel fit into the input without its padding
        return (
            who == "theirs" and axes == 3 and any(n < k for n, k in zip(size, kernel, strict=True))
        )

    check(here, sample(grid), pools("avg_pool", options), allowed)


@pytest.mark.parametrize("kind", ["adaptive_avg_pool", "adaptive_max_pool"])
def test_adaptive_pool(here: Here, kind: str) -> None:
    def options(config: dict[str, Any]) -> dict[str, Any]:
        wanted = config["output"][: config["axes"]]
        return {
            "output_size": wanted if config["axes"] > 1 or None not in wanted else config["size"][0]
        }

    outputs = [*per_axis(1, 9), (None, 2, 3), (2, None, None)]
    grid = {**POOLS, "output": outputs}
    check(here, sample(grid, 500), pools(kind, options))


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_pad(here: Here, mode: str) -> None:
    def pair(config: dict[str, Any]) -> tuple:
        axes = config["axes"]
        pad = [
            n
            for both in zip(config["before"][:axes], config["after"][:axes], strict=True)
            for n in both
        ]

        def ours(x: Any) -> Any:
            y, cache = ops.pad(x, pad, mode)
            return y, lambda dy: ops.pad_backward(dy, cache)

        x = integers((config["n"], config["cg"], *config["size"][:axes]), 1)
        return ours, lambda x: F.pad(x, pad, mode), [x]

    grid = {
        "axes": [1, 2, 3],
        "size": per_axis(1, 7),
        "before": per_axis(0, 3),
        "after": per_axis(0, 3),
    }
    check(here, sample({**grid, "n": [1, 2], "cg": [1, 2]}, 500), pair)
