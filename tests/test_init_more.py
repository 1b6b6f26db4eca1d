"""The wider choice of first weights: spreads and bounds from the papers' formulas, and PyTorch's
own draws."""

from math import sqrt

import numpy as np
import pytest

from portacnn import init
from portacnn.layers import Conv2d, Linear
from portacnn.models import Model, load
from support.matrix import needs

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
def test_spread(name, std):
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
