"""Optimizers with their arguments, and steps for them, the same in PyTorch."""

import numpy as np

from portacnn.optim import (
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Momentum,
    RMSprop,
)

SHAPES = {
    "conv1.weight": (3, 2, 2, 2),
    "conv1.bias": (3,),
    "bn1.weight": (3,),
    "fc1.weight": (4, 5),
    "scale": (),
}


CASES = [
    (SGD, "SGD", {"lr": 0.1}),
    (SGD, "SGD", {"lr": 0.1, "weight_decay": 0.02}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.9}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (Momentum, "SGD", {"lr": 0.05, "momentum": 0.9}),
    (AdaGrad, "Adagrad", {}),
    (
        AdaGrad,
        "Adagrad",
        {
            "lr": 0.3,
            "lr_decay": 0.1,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.5,
            "eps": 1e-3,
        },
    ),
    (RMSprop, "RMSprop", {}),
    (RMSprop, "RMSprop", {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.7}),
    (RMSprop, "RMSprop", {"alpha": 0.8, "eps": 1e-4, "centered": True}),
    (
        RMSprop,
        "RMSprop",
        {"alpha": 0.8, "eps": 1e-2, "centered": True, "momentum": 0.5, "weight_decay": 0.01},
    ),
    (Adam, "Adam", {}),
    (Adam, "Adam", {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1}),
    (Adam, "Adam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (AdamW, "AdamW", {}),
    (AdamW, "AdamW", {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.2}),
]


WORDS = [f"{kind.__name__}-{'-'.join(arguments) or 'defaults'}" for kind, _, arguments in CASES]


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {path: np.asarray(rng.standard_normal(shape)) for path, shape in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng(1000 + step)
    return {path: np.asarray(0.3 + rng.standard_normal(shape)) for path, shape in SHAPES.items()}


def writable(here, values, dtype="float64"):
    return {path: here.backend.asarray(value, dtype) for path, value in values.items()}


def given(here, values, dtype="float64"):
    return {path: here.array(value, dtype) for path, value in values.items()}


def close(here, params, expected, tolerance=1e-12):
    for path, value in expected.items():
        np.testing.assert_allclose(
            here.host(params[path]), value, rtol=tolerance, atol=tolerance, err_msg=path
        )
