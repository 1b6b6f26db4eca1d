"""The data of a training run: a checked training set, and a checked test set if there is one."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from portacnn.data import Dataset, Rows, Stream
from portacnn.errors import ArgumentError
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.runtime import Array, backend_of, dtype_name
from portacnn.seeds import permutation
from portacnn.training.feed import Samples, fingerprint, take_samples, take_stream

_SPLIT = 1 << 62
"""The epoch whose order says which images are split off: none that a training run reaches."""


@dataclass(frozen=True)
class Sets:
    """What a ``Trainer`` trains on and is tested on, for a loss."""

    loss: Loss
    train: Samples
    test: Samples | None
    class_names: tuple[str, ...] = ()

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
        part: tuple[int, int] = (0, 1),
    ) -> "Sets":
        """Check both sets and copy them to the model's device if they fit.

        Args:
            validation_split: the share of the training set to test on instead of x_test. The seed
                says which images; both sets keep their order.
            part: see ``take_samples``.

        Raises:
            ArgumentError: if a set is incomplete, or there are two test sets.
        """
        names = x_train.class_names if isinstance(x_train, Dataset | Stream) else ()
        if isinstance(x_train, Stream):
            refused = {
                "t_train": t_train,
                "sample_weight": sample_weight,
                "validation_split": validation_split,
            }
            if refusals := [name for name, value in refused.items() if value is not None]:
                raise ArgumentError(
                    f"x_train is a Stream, not taken with {', '.join(refusals)}; its items "
                    "have their labels"
                )
            test = None
            if x_test is not None:
                arrays = _arrays(x_test, t_test, "test")
                test = take_samples(model, loss, *arrays, "test", part=part)
            return cls(loss, take_stream(model, loss, x_train), test, names)
        x_train, t_train = _arrays(x_train, t_train, "train")
        x_test, t_test = _arrays(x_test, t_test, "test")
        if (x_test is None) != (t_test is None):
            missing, given = ("t_test", "x_test") if t_test is None else ("x_test", "t_test")
            raise ArgumentError(f"{given} needs {missing}; pass both or neither")
        if x_test is not None and validation_split is not None:
            raise ArgumentError("pass x_test and t_test, or validation_split, not both")
        train = take_samples(model, loss, x_train, t_train, "train", sample_weight, part)
        if validation_split is not None:
            return cls(loss, *_split(train, validation_split, seed), names)
        test = None
        if x_test is not None:
            test = take_samples(model, loss, x_test, t_test, "test", part=part)
        return cls(loss, train, test, names)

    def facts(self) -> dict[str, Any]:
        """Return count, shape and dtype of the images, and a hash of the labels, of both sets: what
        is known without a look at the images."""
        facts: dict[str, Any] = {}
        for name, samples in (("training set", self.train), ("test set", self.test)):
            if samples is not None:
                images = samples.images
                facts[name] = [samples.count, *images.shape[1:], dtype_name(images)]
                facts[f"labels of the {name}"] = samples.labels_hash()
        return facts

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
            return replace(Samples(*map(_on_host, arrays)), stream=samples.stream)

        return replace(
            self, train=host(self.train), test=None if self.test is None else host(self.test)
        )

    def on(self, model: Model) -> "Sets":
        """Return sets from ``on_host`` on the model's device."""

        def placed(samples: Samples, what: str) -> Samples:
            targets, weights = samples.targets, samples.weights
            taken = take_samples(model, self.loss, samples.images, targets, what, weights)
            return replace(taken, stream=samples.stream)

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


def _on_host(array: Any) -> Any:
    return array if isinstance(array, Rows) else backend_of(array).to_host(array)


def _arrays(x: Any, t: Any, what: str) -> tuple[Any, Any]:
    """Return images and targets of what a caller gave: arrays as they are; those of a ``Dataset``,
    or of another object with ``__len__`` and ``__getitem__``."""
    if isinstance(x, Stream):
        raise ArgumentError(
            f"x_{what} is a Stream, which is for training only; pass arrays or a Dataset"
        )
    if isinstance(x, Dataset):
        if t is not None:
            raise ArgumentError(
                f"x_{what} is a Dataset, which has its labels; leave t_{what} out (None)"
            )
        return x.images, x.labels
    if _is_object(x):
        made = Dataset(x, t)
        return made.images, made.labels
    return x, t


def _is_object(x: Any) -> bool:
    """Return whether x is neither an array nor one of Python's own containers."""
    return (
        not isinstance(x, list | tuple | str | bytes | Mapping | Rows)
        and not any(hasattr(x, name) for name in ("shape", "__dlpack__", "__array__"))
        and all(hasattr(x, name) for name in ("__len__", "__getitem__"))
    )


def _taken(array: Any, places: list[int]) -> Any:
    if isinstance(array, Rows):
        return array.subset(places)
    home = backend_of(array)
    indices = home.xp.asarray(places, dtype=home.xp.int64, device=array.device)
    return home.contiguous(home.xp.take(array, indices, axis=0))
