"""scikit-learn's interface to networks: ``ConvNetClassifier`` and ``ConvNetRegressor``.

    from portacnn.sklearn import ConvNetClassifier

    net = ConvNetClassifier(epochs=10, random_state=0).fit(x_train, t_train)
    net.predict(x_test), net.score(x_test, t_test)

They work within pipelines, grid searches and cross-validation, and are pickled by joblib. This
package needs scikit-learn: ``pip install "portacnn[sklearn]"``. The rest of portacnn does not
import it. docs/sklearn.md shows how it is used.

Images are arrays (N, features), (N, H, W) or (N, C, H, W), see ``portacnn.sklearn.images``. Arrays
of another library than NumPy stay on their device, and predictions are arrays of that library
there. Data frames, lists and arrays of unknown libraries become NumPy arrays.
"""

from portacnn.errors import DependencyError

try:
    from sklearn.utils.validation import validate_data as _validate_data  # noqa: F401 (new in 1.6)
except ImportError as error:
    raise DependencyError(
        'portacnn.sklearn needs scikit-learn 1.6 or later: pip install "portacnn[sklearn]"'
    ) from error

from portacnn.sklearn.classifier import ConvNetClassifier
from portacnn.sklearn.networks import small_net
from portacnn.sklearn.regressor import ConvNetRegressor

__all__ = ["ConvNetClassifier", "ConvNetRegressor", "small_net"]
