"""``portacnn.sklearn``: images, labels, weights, and where predictions are.

scikit-learn's own checks of estimators are in test_checks.py.
"""

import importlib.util
import pickle
import sys

import numpy as np
import pytest
from sklearn.base import clone

import portacnn
import portacnn.sklearn as estimators
from portacnn.augment import CutOut, Shift
from portacnn.errors import ArgumentError, ArrayError, DependencyError, LabelError, ShapeError
from portacnn.sklearn import ConvNetClassifier, ConvNetRegressor, small_net
from support.matrix import EACH_LIBRARY, Here, backends

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(24, 8, 8))
T = np.where(np.arange(24) % 3 == 0, "few", "many")
FEW = {"epochs": 2, "random_state": 0, "dtype": "float64"}
# one batch an epoch: the order of its images changes nothing but the last bits
WHOLE = {**FEW, "batch_size": 24}


def tiny(image_shape, outputs, units=4):
    """A model in a module, which other processes can import."""
    from portacnn.layers import Flatten, Linear, ReLU

    return portacnn.Model(Flatten(), Linear(None, units), ReLU(), Linear(None, outputs))


def weights(estimator):
    return estimator.model_.state_dict()


def assert_same_weights(one, other, rtol=1e-9):
    for name, array in weights(one).items():
        np.testing.assert_allclose(array, weights(other)[name], rtol=rtol, atol=1e-12)


def test_a_classifier_is_the_training_that_one_would_write():
    net = ConvNetClassifier(tiny, **FEW, batch_size=10).fit(X, T)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    model = tiny((1, 8, 8), 2).build((1, 8, 8), device="cpu", dtype="float64", seed=seed)
    labels = (T == "many").astype(int)
    portacnn.Trainer(
        model, X[:, None], labels, epochs=2, batch_size=10, seed=seed, verbose=False
    ).train()
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, weights(net)[name])
    logits = model.predict(X[:, None])
    exponentials = np.exp(logits)
    np.testing.assert_array_equal(net.predict(X), np.array(["few", "many"])[logits.argmax(1)])
    np.testing.assert_allclose(
        net.predict_proba(X), exponentials / exponentials.sum(1, keepdims=True)
    )
    assert net.score(X, T) == np.mean(net.predict(X) == T)
    assert net.n_iter_ == 2
    assert len(net.history_["train_loss"]) == 2


def test_partial_fit_continues_as_one_training_does():
    """Adam's moments are kept from call to call, and through a pickle."""
    fitted = ConvNetClassifier(tiny, **{**WHOLE, "epochs": 3}).fit(X, T)
    parts = ConvNetClassifier(tiny, **WHOLE).partial_fit(X, T, classes=["many", "few"])
    parts = pickle.loads(pickle.dumps(parts)).partial_fit(X, T).partial_fit(X, T)
    assert_same_weights(parts, fitted)
    assert parts.n_iter_ == 3
    once = ConvNetRegressor(tiny, **FEW, batch_size=10).partial_fit(X, X[:, 0, 0])
    whole = ConvNetRegressor(tiny, **{**FEW, "epochs": 1}, batch_size=10).fit(X, X[:, 0, 0])
    assert_same_weights(once, whole, rtol=0)


def test_partial_fit_refuses_what_does_not_fit():
    net = ConvNetClassifier(tiny, **FEW)
    with pytest.raises(ValueError, match="classes must be passed"):
        net.partial_fit(X, T)
    with pytest.raises(LabelError, match=r"unknown classes \['few'\]"):
        net.partial_fit(X, T, classes=["many", "none"])
    assert not hasattr(net, "classes_")  # the next call is the first again
    net.partial_fit(X, T, classes=["few", "many"])
    with pytest.raises(ValueError, match="63 features"):
        net.partial_fit(X.reshape(24, -1)[:, 1:], T)
    with pytest.raises(ArgumentError, match="needs all labels at once"):
        ConvNetClassifier(tiny, class_weight="balanced").partial_fit(X, T, classes=["few", "many"])


def test_weights_of_classes_and_of_samples_are_factors_of_the_loss():
    factors = np.where(T == "few", 5.0, 1.0)
    own = np.linspace(0.5, 2, 24)
    by_sample = ConvNetClassifier(tiny, **WHOLE).fit(X, T, sample_weight=own * factors)
    by_class = ConvNetClassifier(tiny, **WHOLE, class_weight={"few": 5.0})
    assert_same_weights(by_class.fit(X, T, sample_weight=own), by_sample)
    balanced = ConvNetClassifier(tiny, **WHOLE, class_weight="balanced").fit(X, T)
    by_sample.fit(X, T, sample_weight=np.where(T == "few", 24 / (2 * 8), 24 / (2 * 16)))
    assert_same_weights(balanced, by_sample)
    twice = np.concatenate([np.arange(24), np.flatnonzero(T == "few")])
    regressor = ConvNetRegressor(tiny, **{**WHOLE, "batch_size": 32})
    repeated = regressor.fit(X[twice], X[twice, 0, 0])
    weighted = ConvNetRegressor(tiny, **WHOLE)
    weighted.fit(X, X[:, 0, 0], sample_weight=np.where(T == "few", 2, 1))
    assert_same_weights(repeated, weighted, rtol=1e-7)


@pytest.mark.parametrize(
    ("sample", "image_shape", "expected"),
    [
        ((64,), None, (1, 8, 8)),
        ((49,), None, (1, 1, 49)),  # a square too small for an image
        ((65,), None, (1, 1, 65)),
        ((1,), None, (1, 1, 1)),
        ((48,), (3, 4, 4), (3, 4, 4)),
        ((24,), (4, 6), (1, 4, 6)),
        ((4, 6), None, (1, 4, 6)),
        ((3, 4, 6), None, (3, 4, 6)),
    ],
)
def test_the_shape_of_images(sample, image_shape, expected):
    x = RANDOM.normal(size=(6, *sample))
    net = ConvNetClassifier(image_shape=image_shape, epochs=1, random_state=0)
    net.fit(x, [0, 1] * 3)
    assert net.image_shape_ == net.model_.input_shape == expected
    assert net.n_features_in_ == np.prod(sample)
    flat = net.predict_proba(x.reshape(6, -1))
    np.testing.assert_array_equal(net.predict_proba(x.reshape(6, *expected)), flat)
    assert small_net(expected, 2).build(expected, device="cpu").output_shape == (2,)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X, {"image_shape": (3, 4, 4)}, ShapeError, "has 48 values, but the samples have 64"),
        (X, {"image_shape": (4, 16)}, ShapeError, "expected images"),
        (X[:, None, None], {}, ShapeError, r"samples of shape \(1, 1, 8, 8\)"),
        (X, {"model": "lenet"}, ArgumentError, "unknown model 'lenet'"),
        (X, {"model": "lenet5", "model_params": {"size": 3}}, ArgumentError, "does not take size"),
        (X, {"model": lambda shape, outputs: 3}, ArgumentError, "must return a portacnn.Model"),
        (X, {"model": lambda shape, outputs: tiny(shape, 3)}, ShapeError, "must have 2 outputs"),
        (X, {"batch_size": 0}, ArgumentError, "batch_size must be a whole number"),
        (X, {"validation_split": 2}, ArgumentError, "validation_split must lie in"),
    ],
)
def test_wrong_arguments(x, options, error, message):
    with pytest.raises(error, match=message):
        ConvNetClassifier(**{**FEW, **options}).fit(x, T)


@pytest.mark.parametrize("kind", [ConvNetClassifier, ConvNetRegressor])
def test_one_parameter_may_be_given_by_position(kind):
    """The others have names only: their order is no promise."""
    assert kind("resnet20").model == "resnet20"
    with pytest.raises(TypeError, match="positional"):
        kind("resnet20", "mse")
    assert set(kind().get_params()) - {"class_weight"} == set(ConvNetRegressor().get_params())
    assert kind().loss == {ConvNetClassifier: "cross_entropy", ConvNetRegressor: "mse"}[kind]


def test_wrong_data():
    net = ConvNetClassifier(tiny, **FEW)
    with pytest.raises(LabelError, match="at least two classes, got one class: 'few'"):
        net.fit(X, ["few"] * 24)
    net.fit(X, T)
    with pytest.raises(ShapeError, match=r"expected images \(N, 1, 8, 8\), got shape \(24, 4, 16"):
        net.predict(X.reshape(24, 4, 16))
    regressor = ConvNetRegressor(tiny, **FEW).partial_fit(X, X[:, 0, :2])
    assert regressor.predict(X).shape == (24, 2)
    with pytest.raises(LabelError, match=r"expected targets"):
        regressor.partial_fit(X, X[:, 0, 0])


def test_the_same_values_are_the_same_images_whatever_their_dtype():
    pixels = RANDOM.integers(0, 256, (24, 8, 8), dtype="uint8")
    of_bytes = ConvNetClassifier(tiny, **FEW).fit(pixels, T)
    of_shares = ConvNetClassifier(tiny, **FEW).fit(pixels / 255, T)
    assert_same_weights(of_bytes, of_shares)
    for other in (pixels, pixels.astype("float64"), pixels.astype("int32")):
        np.testing.assert_allclose(
            of_bytes.predict_proba(other), of_shares.predict_proba(pixels / 255), rtol=1e-6
        )
    of_floats = ConvNetClassifier(tiny, **FEW).fit(pixels.astype("float64"), T)
    np.testing.assert_allclose(
        of_floats.predict_proba(pixels), of_floats.predict_proba(pixels.astype("float64"))
    )


def test_augmented_as_by_a_trainer():
    """Through copies too, as a search makes them; each call of ``partial_fit`` draws anew."""
    pixels = RANDOM.integers(0, 256, (24, 8, 8), dtype="uint8")
    labels = (T == "many").astype(int)
    net = clone(ConvNetClassifier(tiny, **FEW, batch_size=10, augment=[Shift(2), CutOut(3)]))
    net = pickle.loads(pickle.dumps(net)).fit(pixels, T)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    model = tiny((1, 8, 8), 2).build((1, 8, 8), device="cpu", dtype="float64", seed=seed)
    model.preprocess = portacnn.Normalize()
    how = {"epochs": 2, "batch_size": 10, "seed": seed, "verbose": False}
    augment = [Shift(2), CutOut(3)]
    portacnn.Trainer(model, pixels[:, None], labels, **how, augment=augment).train()
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, weights(net)[name])
    plain = ConvNetClassifier(tiny, **FEW, batch_size=10).fit(pixels, T)
    assert any((weights(plain)[name] != weights(net)[name]).any() for name in weights(net))
    first, second = (
        ConvNetRegressor(tiny, **WHOLE, lr=0.0, augment=Shift(2)).partial_fit(pixels, labels)
        for _ in range(2)
    )
    before = second.history_["train_loss"]
    after = second.partial_fit(pixels, labels).history_["train_loss"]
    assert before == first.history_["train_loss"] != after
    with pytest.raises(ArgumentError, match="unknown transform 'nothing'"):
        ConvNetClassifier(tiny, **FEW, augment="nothing").fit(pixels, T)


def test_options_of_the_training():
    net = ConvNetClassifier(
        "simple_conv_net",
        model_params={"conv_param": {"filter_size": 3}, "hidden_size": 7},
        validation_split=0.25,
        early_stopping=1,
        trainer_params={"schedule": "cosine"},
        epochs=30,
        lr=0.0,
        random_state=np.random.RandomState(3),
    ).fit(X, T)
    assert type(net.model_).__name__ == "SimpleConvNet"
    assert weights(net)["fc1.weight"].shape[0] == 7
    assert net.n_iter_ == 2  # nothing is learned, so the first epoch stays the best
    assert len(net.history_["test_accuracy"]) == 2


@EACH_LIBRARY
def test_predictions_stay_where_the_images_are(backend: Here):
    flat = X.reshape(24, -1).astype("float32")
    labels = (T == "many") + 3
    options = {"epochs": 2, "random_state": 0}
    host = ConvNetClassifier(tiny, **options, device="cpu").fit(flat, labels)
    x, t = backend.array(flat), backend.array(labels)
    net = ConvNetClassifier(tiny, **options).fit(x, t, sample_weight=backend.array(np.ones(24)))
    assert net.model_.home == (backend.backend if backend.name != "numpy" else net.model_.home)
    for found, expected in (
        (net.predict(x), host.predict(flat)),
        (net.predict_proba(x), host.predict_proba(flat)),
    ):
        assert type(found) is type(x)
        assert found.device == x.device
        np.testing.assert_allclose(backend.host(found), expected, rtol=1e-4, atol=1e-5)
    assert net.score(x, t) == host.score(flat, labels)
    assert isinstance(net.predict(flat), np.ndarray)  # NumPy arrays are sent to the model
    text = ConvNetClassifier(tiny, **options).fit(x, T)
    assert set(text.predict(x)) <= {"few", "many"}
    regressor = ConvNetRegressor(tiny, **options).fit(x, backend.array(flat[:, 0]))
    assert type(regressor.predict(x)) is type(x)
    assert regressor.predict(x).shape == (24,)
    assert isinstance(regressor.score(x, backend.array(flat[:, 0])), float)


@backends("strict-device1", "torch", "torch-cuda", "cupy", "cupy-emulated")
def test_arrays_of_a_device_are_checked_as_numpys_are(backend: Here):
    flat = X.reshape(24, -1).astype("float32")
    net = ConvNetClassifier(tiny, epochs=1, random_state=0).fit(backend.array(flat), T)
    net.partial_fit(backend.array(flat.reshape(24, 1, 8, 8)), T)
    with pytest.raises(ValueError, match="X has 63 features, but ConvNetClassifier is expecting"):
        net.predict(backend.array(flat[:, 1:]))
    with pytest.raises(ValueError, match="NaN"):
        net.predict(backend.array(np.where(flat > 2, np.nan, flat)))
    with pytest.raises(ShapeError, match=r"at least one; got shape \(64,\)"):
        net.fit(backend.array(flat[0]), T)
    with pytest.raises(LabelError, match="a target for each of 24 images, got 23"):
        net.fit(backend.array(flat), T[1:])
    with pytest.raises(ArrayError, match="Complex"):
        net.fit(backend.xp.astype(backend.array(flat), backend.xp.complex64), T)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.utils.validation", None)
    spec = importlib.util.spec_from_file_location("again", estimators.__file__)
    with pytest.raises(DependencyError, match=r'pip install "portacnn\[sklearn\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
