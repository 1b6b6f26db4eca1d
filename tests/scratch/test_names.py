"""The tutorials' names: each is there, documented, and takes what the tutorials pass it."""

import inspect
from pathlib import Path

import numpy as np

from portacnn import optim, scratch

ROOT = Path(__file__).resolve().parents[2]


def test_the_sample_has_the_form_that_the_book_expects():
    """The loader that load_mnist's own error recommends."""
    names = {}
    exec("from portacnn.scratch import *", names)
    (x, t), (v, _) = names["load_mnist_sample"]()
    assert (x.shape, v.shape, t.shape) == ((4000, 784), (1000, 784), (4000,))
    np.testing.assert_array_equal(
        names["load_mnist_sample"](flatten=False)[0][0].reshape(4000, 784), x
    )
    assert names["load_mnist_sample"](one_hot_label=True)[1][1].shape == (1000, 10)


def test_names():
    assert list(scratch.__all__) == sorted(
        scratch.__all__, key=lambda name: (not name.isupper(), name)
    )
    for name in scratch.__all__:
        thing = getattr(scratch, name)
        assert inspect.getdoc(thing)
        if inspect.isclass(thing) and not issubclass(thing, optim.Optimizer):
            for method, function in vars(thing).items():
                assert method.startswith("_") or not callable(function) or function.__doc__, (
                    f"{name}.{method}"
                )


SIGNATURES = {
    "im2col": "input_data filter_h filter_w stride pad",
    "col2im": "col input_shape filter_h filter_w stride pad",
    "Convolution": "W b stride pad",
    "Pooling": "pool_h pool_w stride pad",
    "Affine": "W b",
    "Dropout": "dropout_ratio",
    "BatchNormalization": "gamma beta momentum running_mean running_var",
    "SimpleConvNet": "input_dim conv_param hidden_size output_size weight_init_std",
    "SGD": "lr",
    "Momentum": "lr momentum",
    "Nesterov": "lr momentum",
    "AdaGrad": "lr",
    "RMSprop": "lr decay_rate",
    "Adam": "lr beta1 beta2",
    "Trainer": "network x_train t_train x_test t_test epochs mini_batch_size optimizer "
    "optimizer_param "
    "evaluate_sample_num_per_epoch verbose",
    "load_mnist": "normalize flatten one_hot_label",
    "numerical_gradient": "f x",
    "cross_entropy_error": "y t",
}


def test_signatures_begin_as_the_books():
    for name, arguments in SIGNATURES.items():
        parameters = inspect.signature(getattr(scratch, name)).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional[: len(arguments.split())] == arguments.split(), name
