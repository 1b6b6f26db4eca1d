"""scikit-learn's own checks of estimators, and its tools around ours: pipelines, searches, bagging,
joblib."""

import os
import re
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.ensemble import BaggingClassifier
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from portacnn.sklearn import ConvNetClassifier, ConvNetRegressor

DIGITS, LABELS = load_digits(return_X_y=True)
QUICK = {"epochs": 3, "lr": 0.01, "random_state": 0}

_ROUNDING = "float32 sums of another order differ by 1e-7; the check allows less. float64 passes"
_LIBRARIES = (
    "images of another library than those fitted are taken: NumPy arrays are sent to the model's "
    "device, and memory is shared where both libraries can"
)
REASONS = {
    "float64": {"check_array_api_same_namespace": _LIBRARIES},
    "float32": {
        "check_array_api_same_namespace": _LIBRARIES,
        "check_sample_weight_equivalence_on_dense_data": _ROUNDING,
        "check_methods_sample_order_invariance": _ROUNDING,
        "check_regressor_multioutput": "predictions are float32, as the model is; it wants float64",
    },
}
"""Checks that fail, and why."""


def test_the_page_lists_the_checks_that_fail():
    page = (Path(__file__).parents[2] / "docs" / "sklearn.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(check_\w+)` \| ([\w ]+) \|", page, re.M))
    always = REASONS["float64"]
    assert rows == {n: "any dtype" if n in always else "float32" for n in REASONS["float32"]}


_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[3])
from sklearn.utils.estimator_checks import check_estimator
from test_checks import REASONS
import portacnn.sklearn
estimator = getattr(portacnn.sklearn, sys.argv[1])(epochs=6, lr=0.01, dtype=sys.argv[2])
found = check_estimator(estimator, expected_failed_checks=REASONS[sys.argv[2]], on_skip=None)
print(*sorted({check["check_name"] for check in found if check["status"] == "passed"}))
print(*{str(check["exception"]) for check in found if check["status"] == "skipped"}, sep=" / ")
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["ConvNetClassifier", "ConvNetRegressor"])
def test_check_estimator(name, dtype):
    """In a process of its own: array API checks need a variable that is read by SciPy's import."""
    environment = {**os.environ, "SCIPY_ARRAY_API": "1", "PORTACNN_KERNELS": "native"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, name, dtype, os.path.dirname(__file__)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passed, skipped = done.stdout.splitlines()
    assert {"check_array_api_input", "check_fit_idempotent", "check_estimators_pickle"} <= set(
        passed.split()
    )
    for reason in skipped.split(" / "):  # another device or library that is not here
        assert "not installed" in reason or "available" in reason or "not set" in reason, reason


def test_in_a_pipeline_cross_validated():
    net = make_pipeline(StandardScaler(), ConvNetClassifier(**QUICK))
    found = cross_validate(net, DIGITS[:300], LABELS[:300], cv=2, return_estimator=True)
    assert found["test_score"].min() > 0.5
    first, second = (each[-1].model_.state_dict() for each in found["estimator"])
    assert any((first[name] != second[name]).any() for name in first)


def test_clone_and_joblib(tmp_path):
    net = ConvNetClassifier(**QUICK, trainer_params={"clip_norm": 1.0}).fit(
        DIGITS[:100], LABELS[:100]
    )
    joblib.dump(net, tmp_path / "net.joblib")
    again = joblib.load(tmp_path / "net.joblib")
    np.testing.assert_array_equal(again.predict_proba(DIGITS), net.predict_proba(DIGITS))
    fresh = clone(net)
    assert not hasattr(fresh, "model_")
    assert str(fresh.get_params()) == str(net.get_params())
    np.testing.assert_array_equal(
        fresh.fit(DIGITS[:100], LABELS[:100]).predict_proba(DIGITS), net.predict_proba(DIGITS)
    )


def test_bagging():
    bag = BaggingClassifier(ConvNetClassifier(**QUICK), n_estimators=3, random_state=0)
    bag.fit(DIGITS[:200], LABELS[:200])
    assert bag.score(DIGITS[:200], LABELS[:200]) > 0.6
    assert len({each.random_state for each in bag.estimators_}) == 3


@pytest.mark.slow
def test_a_grid_search_in_two_processes():
    net = make_pipeline(StandardScaler(), ConvNetClassifier(epochs=4, random_state=0))
    name = "convnetclassifier__lr"
    search = GridSearchCV(net, {name: [0.0, 0.005]}, cv=2, n_jobs=2)
    search.fit(DIGITS[:600], LABELS[:600])
    assert search.best_params_ == {name: 0.005}
    assert search.score(DIGITS[600:], LABELS[600:]) > 0.85
    alone = clone(search.best_estimator_).fit(DIGITS[:600], LABELS[:600])
    np.testing.assert_allclose(
        alone.predict_proba(DIGITS[600:]), search.predict_proba(DIGITS[600:]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_the_defaults_learn_digits():
    net = make_pipeline(StandardScaler(), ConvNetClassifier(random_state=0))
    assert net.fit(DIGITS[:1200], LABELS[:1200]).score(DIGITS[1200:], LABELS[1200:]) > 0.9
    regressor = make_pipeline(StandardScaler(), ConvNetRegressor(random_state=0))
    assert regressor.fit(DIGITS[:1200], LABELS[:1200] / 9).score(DIGITS, LABELS / 9) > 0.8
