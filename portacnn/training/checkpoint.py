"""Describe a training run as a checkpoint, and make a ``Trainer`` from a checkpoint.

A checkpoint is one safetensors file. Arrays: ``model.*`` (weights and buffers), ``optimizer.*``
(its state), ``callbacks.*`` (theirs), ``best.*`` (the best weights so far, for early stopping) and
``history.*`` (figures per step and per epoch, float64; int64 for whole numbers). The header holds
the rest as JSON: architecture, optimizer, schedule, options, seed and position. There is no random
state to store: batches and masks are drawn from the seed and the numbers of epoch and step. Data
are not stored either. They are given again and compared with a fingerprint.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from portacnn.arguments import fraction, plain, told, whole
from portacnn.augment.applying import checked, describe_augment, rebuild_augment
from portacnn.errors import ArgumentError, BackendError, ModelFormatError
from portacnn.files import load_tensors, within
from portacnn.layers.freezing import frozen_paths, restore
from portacnn.layers.state import check_state
from portacnn.losses import Loss, describe_loss, rebuild_loss
from portacnn.metrics import Metric, describe_metric, rebuild_metric
from portacnn.models import Model
from portacnn.models.files import NONSENSE
from portacnn.optim import Optimizer, rebuild_optimizer
from portacnn.runtime import Backend, HostArray, resolve
from portacnn.schedules import PerEpoch, Schedule, describe_schedule, rebuild_schedule
from portacnn.seeds import check_seed
from portacnn.training.early_stopping import EarlyStopping
from portacnn.training.folder import RUN
from portacnn.training.options import Options

AnyTrainer = TypeVar("AnyTrainer")  # a Trainer, whose module imports this one
FORMAT = 3
"""Number of the format: 3 holds loss, metrics and ``Trainer.history``. Earlier ones are refused."""
_OPTIONS = tuple(field.name for field in fields(Options))
"""The names of the options, which are in the header unchanged."""
_LATER = {field.name: field.default for field in fields(Options) if field.default is not MISSING}
"""Options that checkpoints of earlier versions lack, with what those did."""


def describe_training(trainer: Any) -> dict[str, Any]:
    """Return a checkpoint's header without the position: what does not change during a training
    run.

    Raises:
        ArgumentError: if a file cannot hold the optimizer.
    """
    return {
        "checkpoint": FORMAT,
        "run": trainer.run,
        "ranks": trainer.ranks.size,
        "place": f"{trainer.backend.name}:{trainer.backend.place(trainer.backend.device)}",
        "model_seed": trainer.model.seed,
        **what_is_trained(trainer),
        "optimizer": trainer.optimizer.description(),
        "data": trainer.fingerprints(),
    }


def what_is_trained(trainer: Any) -> dict[str, Any]:
    """Return model, optimizer, schedule, loss, augmentation, metrics and options, as JSON values,
    each with the reason if a file cannot hold it."""
    schedule, stopping = trainer.schedule, trainer.early_stopping
    if trainer.schedule_unit == "epoch" and isinstance(schedule, PerEpoch):
        schedule = schedule.schedule
    return {
        "model": _or_why_not(trainer.model.description),
        "frozen": frozen_paths(trainer.model),
        "optimizer": _or_why_not(trainer.optimizer.description),
        "schedule": _or_why_not(lambda: describe_schedule(schedule)),
        "loss": _or_why_not(lambda: describe_loss(trainer.loss)),
        "augment": _or_why_not(lambda: describe_augment(trainer.augment)),
        "metrics": _or_why_not(
            lambda: {name: describe_metric(metric) for name, metric in trainer.metrics.items()}
        ),
        "early_stopping": None if stopping is None else plain(asdict(stopping)),
        "options": {name: plain(getattr(trainer, name)) for name in _OPTIONS},
    }


def contents(trainer: Any) -> tuple[dict[str, HostArray], dict[str, Any]]:
    """Return arrays and header of a checkpoint at this moment, between two steps."""
    state = trainer.optimizer.state_dict()
    best, host = trainer._best_weights or {}, resolve("numpy")
    # the lists may also contain entries of an interrupted epoch
    history = {
        name: _saved_figures(host, figures[: trainer.epoch])
        for name, figures in trainer.history.items()
    }
    states, callbacks = trainer.callbacks.state()
    steps = host.asarray(trainer.train_loss_list[: trainer.steps_done], "float64")
    parts = {
        "model": trainer.model.state_dict(),
        "optimizer": state.pop("arrays"),
        "callbacks": states,
        "best": best,
        "history": history,
        "steps": {"loss": steps},
    }
    header = describe_training(trainer)
    header["optimizer"]["state"] = state
    header["callbacks"] = callbacks
    header["position"] = {
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "stopped_early": trainer.stopped_early,
    }
    header["best"] = trainer._best_weights is not None
    return {
        f"{part}.{name}": array for part, arrays in parts.items() for name, array in arrays.items()
    }, header


def _seed(name: str, value: Any) -> int:
    """Return a seed from a file: any whole number. Raises ArgumentError."""
    if value is None:
        raise ArgumentError(f"{name} is missing")
    return check_seed(value)


def _or_why_not(describe: Any) -> Any:
    """Return ``describe()``, or if a file cannot hold that, the reason under "not saved"."""
    try:
        described = describe()
        json.dumps(described)
    except (ArgumentError, TypeError) as error:
        return {"not saved": str(error)}
    return described


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. Its methods raise ModelFormatError if the header makes no
    sense."""

    path: Path
    tensors: Mapping[str, HostArray]
    header: Any

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a file. Raises ModelFormatError if it is damaged or not a checkpoint."""
        tensors, header = load_tensors(path, checked=True)
        if not isinstance(header, dict) or "checkpoint" not in header:
            raise ModelFormatError("it is not a checkpoint of a Trainer", str(path))
        if header["checkpoint"] != FORMAT:
            told = repr(header["checkpoint"])[:40]
            raise ModelFormatError(
                f"it is a checkpoint of format {told}, but this version reads {FORMAT}; "
                "resume it with the version of portacnn that wrote it",
                str(path),
            )
        return cls(path, tensors, header)

    def _said(self, make: Any) -> Any:
        """Return ``make()``. An error while reading the header becomes a ModelFormatError."""
        try:
            return make()
        except ModelFormatError as error:
            raise error.at(str(self.path), over=True)
        except NONSENSE as error:
            what = f"{type(error).__name__}: {error}"
            raise ModelFormatError(
                f"it does not describe a training run correctly: {what}", str(self.path)
            ) from error

    def place(self, number: int | None = None) -> Backend:
        """Return the backend of the training run. Raises BackendError if it is unavailable.

        Args:
            number: of the device, instead of that of rank 0, if there are several.
        """
        place = self.header.get("place")
        if not isinstance(place, str) or not re.fullmatch(r"\w+:[a-z]+\d*(:\d+)?", place, re.ASCII):
            raise ModelFormatError(
                "it does not state the device of the training run", str(self.path)
            )
        if number is not None:
            place = re.sub(r":\d+$", f":{number}", place)
        try:
            return resolve(place)
        except BackendError as error:
            raise BackendError(
                f"{self.path}: the training run was on {place}; {error}. Or choose another device: "
                "resume(..., device=...)"
            ) from error

    def model(self, device: Any) -> Model:
        """Return the model on ``device``, with its weights and the seed of its dropout."""
        described = self.header.get("model")
        if isinstance(described, dict) and "not saved" in described:
            raise ArgumentError(
                f"{self.path} does not describe its model ({described['not saved']}); build the "
                "model and pass it: resume(..., model=model)"
            )
        backend, seed = (
            resolve(device),
            self._said(lambda: _seed("model_seed", self.header["model_seed"])),
        )
        return Model.rebuild(
            within("model", self.tensors), described, backend, str(self.path), seed
        )

    def load_into(self, model: Model) -> None:
        """Load the weights and the seed of dropout into a model that the caller has built."""

        def load() -> None:
            seed = _seed("model_seed", self.header["model_seed"])
            model.load_state_dict(within("model", self.tensors))
            restore(model, self.header.get("frozen", []))
            for layer in model.walk():
                layer.seed = seed

        self._said(load)

    def schedule(self) -> Schedule:
        """Return the schedule. Raises ArgumentError if it was the caller's own function."""
        return self._own_or_given("schedule", rebuild_schedule)

    def loss(self) -> Loss:
        """Return the loss. Raises ArgumentError if it was the caller's own."""
        return self._own_or_given("loss", rebuild_loss)

    def augment(self, given: Any, input_shape: tuple[int, ...] | None) -> Any:
        """Return the transforms, or ``given`` if they were the caller's own. Raises ArgumentError
        if they are missing, or are not those of the training run."""
        described = self.header.get("augment")
        own = isinstance(described, dict) and "not saved" in described
        if given is None or not own:
            made = self._own_or_given("augment", rebuild_augment)
            if given is not None and checked(given, input_shape) != tuple(made):
                raise ArgumentError(
                    f"the training run has augment={made}, got {told(given)}; leave it out: it "
                    "comes from the checkpoint"
                )
            return made
        return given

    def metrics(self) -> dict[str, Metric]:
        """Return the metrics by name. Raises ArgumentError if one was the caller's own."""
        return self._own_or_given(
            "metrics",
            lambda described: {
                _name(name): rebuild_metric(metric) for name, metric in described.items()
            },
        )

    def check_metrics(self, given: Mapping[str, Metric]) -> None:
        """Raise ArgumentError if the names of these metrics are not those of the training run."""
        names = (name.removeprefix("train_") for name in within("history", self.tensors))
        figures = ("loss", "lr", "seconds", "images_per_second")
        had = sorted({name for name in names if not name.startswith("test_")} - {*figures})
        if had != sorted(given):
            raise ArgumentError(
                f"{self.path}: the training run had the metrics {', '.join(had) or 'none'}, got "
                f"{', '.join(sorted(given)) or 'none'}; pass the same, by the same names"
            )

    def _own_or_given(self, what: str, rebuild: Callable[[Any], Any]) -> Any:
        described = self.header.get(what)
        if isinstance(described, dict) and "not saved" in described:
            article = "a " if what in ("loss", "schedule") else ""
            raise ArgumentError(
                f"{self.path} was made with {article}{what} that a file cannot hold "
                f"({described['not saved']}); pass it again: resume(..., {what}=...)"
            )
        return self._said(lambda: rebuild(described))

    def arguments(self) -> dict[str, Any]:
        """Return the Trainer's arguments, except model, data, schedule and folder."""

        def make() -> dict[str, Any]:
            options = {**_LATER, **self.header["options"]}
            options = {name: options[name] for name in _OPTIONS}
            stopping, split = self.header["early_stopping"], options["validation_split"]
            optimizer: Optimizer = rebuild_optimizer(self.header["optimizer"])
            return {
                **options,
                "seed": _seed("seed", options["seed"]),
                "validation_split": None if split is None else fraction("validation_split", split),
                "optimizer": optimizer,
                "early_stopping": None if stopping is None else EarlyStopping(**stopping),
            }

        return self._said(make)

    def callbacks(self) -> tuple[dict[str, HostArray], Any]:
        """Return the states of the callbacks: arrays and the rest, see ``Callbacks.load``."""
        rest = self._said(lambda: self.header["callbacks"])
        return within("callbacks", self.tensors), rest

    def check_data(self, given: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare fingerprints. Raises ArgumentError if the data are not those of the training
        run."""

        def listed() -> list[tuple[str, Any, Any]]:
            saved = self.header["data"]
            return [
                (what, saved[what] if saved[what] is None else dict(saved[what]), given[what])
                for what in ("train", "test")
            ]

        problems = []
        for what, expected, came in self._said(listed):
            if expected is None or came is None:
                if expected is not came:
                    had, has = ("none", "one") if expected is None else ("one", "none")
                    problems.append(f"the training run had {had} test set, got {has}")
                continue
            for key, name in (("shape", f"x_{what}"), ("dtype", f"x_{what}")):
                if expected.get(key) != came[key]:
                    problems.append(
                        f"expected {name} of {key} {expected.get(key)!r:.80}, got {came[key]}"
                    )
            if not problems and expected.get("labels") != came["labels"]:
                problems.append(f"t_{what} has other labels or another order")
            if not problems and expected.get("images") != came["images"]:
                problems.append(f"x_{what} has other images or another order")
        if problems:
            raise ArgumentError(
                f"the data differ from those of {self.path}: "
                f"{'; '.join(problems)}; pass the same data"
            )

    def made(self, make: Callable[[], AnyTrainer]) -> AnyTrainer:
        """Return the Trainer that ``make`` returns, restored to the checkpoint's position."""
        return self._said(lambda: self._restored(make()))

    def _restored(self, trainer: Any) -> Any:
        position, state = self.header["position"], self.header["optimizer"]["state"]
        trainer.epoch = whole("epoch", position["epoch"], 0)
        trainer.batch = whole("batch", position["batch"], 0)
        trainer.stopped_early = bool(position["stopped_early"])
        if trainer.batch >= trainer.steps_per_epoch:
            raise ModelFormatError(
                f"batch {trainer.batch} is not below the "
                f"{trainer.steps_per_epoch} steps of an epoch"
            )
        trainer.run = self.header["run"]
        if not isinstance(trainer.run, str) or not re.fullmatch(
            RUN, trainer.run
        ):  # it becomes part of file names
            raise ModelFormatError(f"run must be six hexadecimal digits, got {trainer.run!r:.80}")
        saved = within("history", self.tensors)
        history = {name: _figures(saved, name, trainer.epoch) for name in trainer.history}
        steps = _figures(within("steps", self.tensors), "loss", trainer.steps_done)
        trainer.history, trainer.train_loss_list = history, steps
        trainer.optimizer.load_state_dict(
            {**state, "arrays": within("optimizer", self.tensors)}, trainer.model.named_parameters()
        )
        best = within("best", self.tensors)
        if self.header["best"] or best:
            own = {path: tuple(array.shape) for path, array in trainer.model.named_state().items()}
            check_state(own, best, "the best weights")
            trainer._best_weights = {path: array.copy() for path, array in best.items()}
        return trainer


def _saved_figures(host: Backend, figures: list[Any]) -> HostArray:
    """Return figures as float64, or as int64 if all are whole numbers (a confusion matrix)."""
    array = host.asarray(figures)
    return host.asarray(array, "int64" if array.dtype.kind in "iu" else "float64")


def _figures(saved: Mapping[str, HostArray], name: str, length: int) -> list[float]:
    """Return the figures of this name. Raises ModelFormatError if there are not so many."""
    array = saved.get(name)
    if (
        array is None
        or array.shape[:1] != (length,)
        or str(array.dtype) not in ("float64", "int64")
    ):
        got = "none" if array is None else f"{array.dtype} of shape {array.shape}"
        raise ModelFormatError(f"{name} must be {length} float64 or int64 values, got {got}")
    return array.tolist()


def _name(name: Any) -> str:
    """Return the name of a metric: text that is short enough to show."""
    if not isinstance(name, str) or len(name) > 100:
        raise ModelFormatError(f"the name of a metric must be text, got {name!r:.80}")
    return name
