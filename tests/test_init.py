"""Rules for first weights and the generators they draw from: spreads and bounds from the papers'
formulas, and PyTorch's own draws."""

import os
import subprocess
import sys
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

import portacnn
from portacnn import init, seeds
from portacnn.errors import ArgumentError
from portacnn.layers import Conv2d, Linear
from portacnn.models import Model, load
from support.matrix import needs

BIG = (400, 500)


@pytest.mark.parametrize(
    ("what", "std"),
    [
        (0.01, 0.01),
        (1, 1.0),
        (np.float64(0.5), 0.5),
        ("he", sqrt(2 / 50)),
        ("relu", sqrt(2 / 50)),
        ("ReLU", sqrt(2 / 50)),
        ("xavier", sqrt(1 / 50)),
        ("sigmoid", sqrt(1 / 50)),
        ("default", sqrt(1 / 50 / 3)),
    ],
)
def test_measured_spread(what, std):
    drawn = init.rule(what)(np.random.default_rng(0), BIG, 50, 7)
    assert drawn.shape == BIG
    assert drawn.dtype == np.float64
    assert drawn.std() == pytest.approx(std, rel=0.01)
    assert abs(drawn.mean()) < 4 * std / sqrt(drawn.size)
    within = np.mean(np.abs(drawn) < std)  # 68 % of a normal distribution, 58 % of a uniform one
    assert within == pytest.approx(0.5774 if what == "default" else 0.6827, abs=0.005)


def test_constants():
    rng = np.random.default_rng(0)
    assert (init.rule("zeros")(rng, (3, 2), 1, 1) == 0).all()
    assert (init.rule("ones")(rng, (3, 2), 1, 1) == 1).all()
    assert (init.rule(0)(rng, (3, 2), 1, 1) == 0).all()
    assert (init.constant(2.5)(rng, (3,), 1, 1) == 2.5).all()


def test_a_rule_is_itself():
    def mine(rng, shape, fan_in, fan_out):
        return np.full(shape, fan_in * 100.0 + fan_out)

    assert init.rule(mine) is mine
    conv = Conv2d(4, 6, (3, 5), groups=2, weight_init=mine, bias_init=mine).build((4, 8, 8))
    assert (conv.params["weight"] == 30 * 100 + 45).all()  # fan_in C/G*KH*KW, fan_out O/G*KH*KW
    assert (conv.params["bias"] == 3045).all()
    linear = Linear(7, 3, weight_init=mine).build((7,))
    assert (linear.params["weight"] == 703).all()


@pytest.mark.parametrize(
    "what", ["", "glorot", -0.1, float("inf"), float("nan"), True, None, [0.1], {}]
)
def test_what_is_no_rule(what):
    with pytest.raises(ArgumentError, match="weight initializer") as caught:
        init.rule(what)
    assert repr(what) in str(caught.value)


def test_generators_depend_on_seed_and_name_alone():
    def draw(*name):
        return seeds.generator(*name).standard_normal(4).tolist()

    assert draw(0, "a") == draw(0, "a")
    different = [
        draw(0, "a"),
        draw(1, "a"),
        draw(-1, "a"),
        draw(0, "b"),
        draw(0),
        draw(0, "a", 0),
        draw(0, "ab"),
    ]
    assert len({tuple(values) for values in different}) == len(different)
    state = np.random.get_state()[1].tolist()  # noqa: NPY002 (that the global state is left alone is the point)
    draw(0, "a")
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002


def test_generators_are_the_same_in_another_process():
    """Python's own hash of text differs from process to process."""
    code = (
        "from portacnn.seeds import generator; print(generator(0, 'conv1.weight').integers(10**9))"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": str(Path(portacnn.__file__).parents[1]),
    }
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) == seeds.generator(0, "conv1.weight").integers(10**9)


def test_permutations():
    orders = [seeds.permutation(3, epoch, 50) for epoch in range(3)]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 3
    assert seeds.permutation(3, 1, 50).tolist() == orders[1].tolist()
    # Another epoch of one seed is no epoch of another seed.
    every = [tuple(seeds.permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)]
    assert len(set(every)) == 25
    # A training that is resumed by a later version must see the same batches and masks.
    assert seeds.permutation(5, 1, 8).tolist() == [5, 6, 0, 7, 4, 1, 3, 2]
    assert seeds.words(3, "dropout", "fc") == (799462685, 195616444)
    assert seeds.permutation(0, 0, 0).shape == (0,)


@pytest.mark.parametrize("seed", [0, -1, 2**80, np.int64(3), np.uint8(3)])
def test_whole_seeds(seed):
    assert seeds.check_seed(seed) == seed
    assert type(seeds.check_seed(seed)) is int


@pytest.mark.parametrize("seed", [1.0, "1", True, [1]])
def test_what_is_no_seed(seed):
    with pytest.raises(ArgumentError, match=r"seed must be a whole number or None"):
        seeds.check_seed(seed)


def test_no_seed_is_a_fresh_one():
    drawn = {seeds.check_seed(None) for _ in range(5)}
    assert len(drawn) == 5
    assert all(0 <= seed < 2**32 for seed in drawn)


# name -> (torch's function, its arguments), for weights (48, 32, 3, 3)
TORCH = {
    "he": ("kaiming_normal_", {"mode": "fan_in"}),
    "he_normal": ("kaiming_normal_", {"mode": "fan_in"}),
    "he_fan_out": ("kaiming_normal_", {"mode": "fan_out"}),
    "he_uniform": ("kaiming_uniform_", {"mode": "fan_in"}),
    "he_uniform_fan_out": ("kaiming_uniform_", {"mode": "fan_out"}),
    "xavier_normal": ("xavier_normal_", {}),
    "xavier_uniform": ("xavier_uniform_", {}),
    "default": ("kaiming_uniform_", {"a": sqrt(5)}),  # as torch.nn.Conv2d calls it
}


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("he_normal", sqrt(2 / 40)),
        ("he_fan_out", sqrt(2 / 90)),
        ("he_uniform", sqrt(2 / 40)),
        ("he_uniform_fan_out", sqrt(2 / 90)),
        ("xavier", sqrt(1 / 40)),
        ("xavier_normal", sqrt(2 / 130)),
        ("xavier_uniform", sqrt(2 / 130)),
        ("XAVIER_UNIFORM", sqrt(2 / 130)),
    ],
)
def test_spread_of_the_papers_formulas(name, std):
    drawn = init.rule(name)(np.random.default_rng(0), (400, 500), 40, 90)
    assert drawn.std() == pytest.approx(std, rel=0.01)
    assert abs(drawn.mean()) < 4 * std / sqrt(drawn.size)
    if "uniform" in name.lower():
        assert std * sqrt(3) * 0.999 < np.abs(drawn).max() <= std * sqrt(3)
    else:
        assert np.abs(drawn).max() > 3.5 * std


@needs("torch")
@pytest.mark.parametrize("name", TORCH)
def test_distributed_as_torch_draws_them(name):
    import torch

    stats = pytest.importorskip("scipy.stats")
    function, arguments = TORCH[name]
    weight = torch.empty(48, 32, 3, 3)
    theirs = getattr(torch.nn.init, function)(
        weight, generator=torch.Generator().manual_seed(0), **arguments
    )
    conv = Conv2d(32, 48, 3, weight_init=name).build((32, 5, 5), seed=1)
    assert stats.ks_2samp(conv.params["weight"].ravel(), theirs.numpy().ravel()).pvalue > 1e-3


def test_fans_of_layers():
    conv = Conv2d(8, 4, 3, groups=2, weight_init="xavier_uniform").build((8, 9, 9), seed=0)
    assert np.abs(conv.params["weight"]).max() <= sqrt(6 / (4 * 9 + 2 * 9))
    linear = Linear(300, 200, weight_init="he_uniform_fan_out").build((300,), seed=0)
    assert np.abs(linear.params["weight"]).max() == pytest.approx(sqrt(6 / 200), rel=1e-3)


def test_older_names_draw_what_they_drew():
    def draw(what):
        return init.rule(what)(np.random.default_rng(3), (5, 4), 20, 30)

    rng = np.random.default_rng
    assert (draw("he") == sqrt(2 / 20) * rng(3).standard_normal((5, 4))).all()
    assert (draw("relu") == draw("he")).all()
    assert (draw("xavier") == sqrt(1 / 20) * rng(3).standard_normal((5, 4))).all()
    assert (draw("sigmoid") == draw("xavier")).all()
    assert (draw("default") == rng(3).uniform(-1 / sqrt(20), 1 / sqrt(20), (5, 4))).all()


def test_a_name_travels_with_the_model(tmp_path):
    model = Model(fc=Linear(None, 3, weight_init="xavier_uniform")).build((4,), seed=0)
    model.save(tmp_path / "model")
    assert load(tmp_path / "model").children["fc"].weight_init == "xavier_uniform"
