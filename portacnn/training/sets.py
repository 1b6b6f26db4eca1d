"""The data of a training: a checked training set, and a checked test set if there is one."""

from dataclasses import dataclass, replace
from typing import Any

from portacnn.errors import ArgumentError
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.runtime import Array, backend_of
from portacnn.seeds import permutation
from portacnn.training.feed import Samples, fingerprint, take_samples

_SPLIT = 1 << 62
"""The epoch whose order says which images are split off: none that a training reaches."""


@dataclass(frozen=True)
class Sets:
    """What a ``Trainer`` trains on and is tested on, for a loss."""

    loss: Loss
    train: Samples
    test: Samples | None

    @classmethod
    def take(
        cls,
        model: Model,
        loss: Loss,
        x_train: Array,
        t_train: Any,
        x_test: Array | None,
        t_test: Any,
        sample_weight: Array | None,
        validation_split: float | None,
        seed: int,
    ) -> "Sets":
        """Check both sets and copy them to the model's device if they fit.

        Args:
            validation_split: the share of the training set to test on instead of x_test. The seed
                says which images; both sets keep their order.

        Raises:
            ArgumentError: if a set is incomplete, or there are two test sets.
        """
        if (x_test is None) != (t_test is None):
            missing, given = ("t_test", "x_test") if t_test is None else ("x_test", "t_test")
            raise ArgumentError(f"{given} needs {missing}; give both or neither")
        if x_test is not None and validation_split is not None:
            raise ArgumentError("give x_test and t_test, or validation_split, not both")
        train = take_samples(model, loss, x_train, t_train, "train", sample_weight)
        if validation_split is not None:
            return cls(loss, *_split(train, validation_split, seed))
        test = None if x_test is None else take_samples(model, loss, x_test, t_test, "test")
        return cls(loss, train, test)

    def fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints of the sets (``feed.fingerprint``), by "train" and "test"."""
        return {
            "train": fingerprint(self.train),
            "test": None if self.test is None else fingerprint(self.test),
        }

    def on_host(self) -> "Sets":
        """Return the sets as NumPy arrays."""

        def host(samples: Samples) -> Samples:
            arrays = (samples.images, *samples.parts)
            return Samples(*(backend_of(array).to_host(array) for array in arrays))

        return replace(
            self, train=host(self.train), test=None if self.test is None else host(self.test)
        )

    def on(self, model: Model) -> "Sets":
        """Return sets from ``on_host`` on the model's device."""

        def placed(samples: Samples, what: str) -> Samples:
            targets, weights = samples.targets, samples.weights
            return take_samples(model, self.loss, samples.images, targets, what, weights)

        test = None if self.test is None else placed(self.test, "test")
        return replace(self, train=placed(self.train, "train"), test=test)


def _split(samples: Samples, share: float, seed: int) -> tuple[Samples, Samples]:
    """Return the training set without the images split off, and these."""
    count = round(share * samples.count)
    if not 0 < count < samples.count:
        raise ArgumentError(
            f"validation_split={share:g} of {samples.count} images would leave {count} to test on "
            f"and {samples.count - count} to train on; both need at least one"
        )
    order = permutation(seed, _SPLIT, samples.count)
    chosen = (sorted(order[count:].tolist()), sorted(order[:count].tolist()))
    train, test = (
        Samples(*(_taken(array, places) for array in (samples.images, *samples.parts)))
        for places in chosen
    )
    return train, test


def _taken(array: Array, places: list[int]) -> Array:
    home = backend_of(array)
    indices = home.xp.asarray(places, dtype=home.xp.int64, device=array.device)
    return home.contiguous(home.xp.take(array, indices, axis=0))
