"""What a checkpoint holds, and how a ``Trainer`` is made of one again.

One safetensors file. Arrays: ``model.*`` (weights and buffers), ``optimizer.*`` (its state),
``best.*`` (the best weights so far, for early stopping) and ``history.*`` (figures by step and by
epoch, float64). Its header says all the rest in JSON: architecture, optimizer, schedule, options,
seed, and the position. No random state is kept, since there is none: batches and masks are drawn
from the seed and the number of the epoch and step. Nor are the data: they are given again, and
compared with a fingerprint.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from portacnn.arguments import plain, whole
from portacnn.errors import ArgumentError, BackendError, ModelFormatError
from portacnn.files import load_tensors, within
from portacnn.layers.state import check_state
from portacnn.models import Model
from portacnn.models.model import NONSENSE
from portacnn.optim import Optimizer, rebuild_optimizer
from portacnn.runtime import Backend, HostArray, resolve
from portacnn.schedules import PerEpoch, Schedule, describe_schedule, rebuild_schedule
from portacnn.seeds import check_seed
from portacnn.training.early_stopping import EarlyStopping
from portacnn.training.folder import RUN

AnyTrainer = TypeVar("AnyTrainer")  # a Trainer, whose module imports this one
FORMAT = 1
_OPTIONS = (
    "epochs",
    "mini_batch_size",
    "drop_last",
    "schedule_unit",
    "clip_norm",
    "label_smoothing",
    "accumulate",
    "evaluate_sample_num_per_epoch",
    "seed",
    "precision",
    "compile_step",
    "checkpoint_every",
    "keep",
    "verbose",
)
"""The Trainer's arguments that stand in the header as they are; each is an attribute of that
name."""
_ADDED = {"drop_last": False}
"""Options that older checkpoints lack, and what they were then."""
_BY_EPOCH = ("epoch_loss_list", "train_acc_list", "test_acc_list")
_HISTORY = ("train_loss_list", *_BY_EPOCH, "test_loss_list")


def describe_training(trainer: Any) -> dict[str, Any]:
    """A checkpoint's header, all but the position: what stays the same throughout a training.

    Raises:
        ArgumentError: an optimizer that no file can hold.
    """
    schedule, stopping = trainer.schedule, trainer.early_stopping
    if trainer.schedule_unit == "epoch" and isinstance(schedule, PerEpoch):
        schedule = schedule.schedule
    return {
        "checkpoint": FORMAT,
        "run": trainer.run,
        "place": f"{trainer.backend.name}:{trainer.backend.place(trainer.backend.device)}",
        "model": _or_why_not(trainer.model.description),
        "model_seed": trainer.model.seed,
        "optimizer": trainer.optimizer.description(),
        "schedule": _or_why_not(lambda: describe_schedule(schedule)),
        "early_stopping": None if stopping is None else plain(asdict(stopping)),
        "options": {name: plain(getattr(trainer, name)) for name in _OPTIONS},
        "data": trainer.fingerprints(),
    }


def contents(trainer: Any) -> tuple[dict[str, HostArray], dict[str, Any]]:
    """Arrays and header of a checkpoint of this moment, between two steps."""
    state = trainer.optimizer.state_dict()
    best, host = trainer._best_weights or {}, resolve("numpy")
    # of an epoch that was broken off, there may be more in the lists
    done = {"train_loss_list": trainer.steps_done}
    history = {
        name: host.asarray(getattr(trainer, name)[: done.get(name, trainer.epoch)], "float64")
        for name in _HISTORY
    }
    parts = {
        "model": trainer.model.state_dict(),
        "optimizer": state.pop("arrays"),
        "best": best,
        "history": history,
    }
    header = describe_training(trainer)
    header["optimizer"]["state"] = state
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
    """A seed out of a file: any whole number. Raises ArgumentError."""
    if value is None:
        raise ArgumentError(f"{name} is missing")
    return check_seed(value)


def _or_why_not(describe: Any) -> dict[str, Any]:
    """What ``describe`` gives; where no file can hold that, the reason, under "not saved"."""
    try:
        described: dict[str, Any] = describe()
        json.dumps(described)
    except (ArgumentError, TypeError) as error:
        return {"not saved": str(error)}
    return described


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read. Its properties are made of what the file says, and raise
    ModelFormatError for nonsense."""

    path: Path
    tensors: Mapping[str, HostArray]
    header: Any

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Read a file. Raises ModelFormatError where it is no whole one, or no checkpoint."""
        tensors, header = load_tensors(path, checked=True)
        if not isinstance(header, dict) or "checkpoint" not in header:
            raise ModelFormatError("is no checkpoint of a Trainer's", str(path))
        if header["checkpoint"] != FORMAT:
            told = repr(header["checkpoint"])[:40]
            raise ModelFormatError(
                f"is a checkpoint of format {told}, this version reads {FORMAT}", str(path)
            )
        return cls(path, tensors, header)

    def _said(self, make: Any) -> Any:
        """What ``make`` makes of the header; whatever it stumbles over is the file's fault."""
        try:
            return make()
        except ModelFormatError as error:
            raise error.at(str(self.path), over=True)
        except NONSENSE as error:
            what = f"{type(error).__name__}: {error}"
            raise ModelFormatError(
                f"it does not describe a training, or not rightly: {what}", str(self.path)
            ) from error

    def place(self) -> Backend:
        """Where the training was. Raises BackendError where there is no such place here."""
        place = self.header.get("place")
        if not isinstance(place, str) or not re.fullmatch(r"\w+:[a-z]+\d*(:\d+)?", place, re.ASCII):
            raise ModelFormatError(
                "it does not say on which device the training was", str(self.path)
            )
        try:
            return resolve(place)
        except BackendError as error:
            raise BackendError(
                f"{self.path}: the training was on {place}; {error}. Or give another device="
            ) from error

    def model(self, device: Any) -> Model:
        """The model on ``device``, with its weights and the seed of its dropout."""
        described = self.header.get("model")
        if isinstance(described, dict) and "not saved" in described:
            raise ArgumentError(
                f"{self.path} does not hold how to build its model ({described['not saved']}); "
                "build it and give it: "
                "resume(..., model=model)"
            )
        backend, seed = (
            resolve(device),
            self._said(lambda: _seed("model_seed", self.header["model_seed"])),
        )
        return Model.rebuild(
            within("model", self.tensors), described, backend, str(self.path), seed
        )

    def load_into(self, model: Model) -> None:
        """The weights, and the seed of dropout, into a model that was built by the caller."""

        def load() -> None:
            seed = _seed("model_seed", self.header["model_seed"])
            model.load_state_dict(within("model", self.tensors))
            for layer in model.walk():
                layer.seed = seed

        self._said(load)

    def schedule(self) -> Schedule:
        """The schedule. Raises ArgumentError where it was a function of the caller's own."""
        described = self.header.get("schedule")
        if isinstance(described, dict) and "not saved" in described:
            raise ArgumentError(
                f"{self.path} was made with a schedule that no file can hold "
                f"({described['not saved']}); give it again: "
                "resume(..., schedule=...)"
            )
        return self._said(lambda: rebuild_schedule(described))

    def arguments(self) -> dict[str, Any]:
        """The Trainer's arguments besides model, data, schedule and folder."""

        def make() -> dict[str, Any]:
            given = _ADDED | self.header["options"]
            options = {name: given[name] for name in _OPTIONS}
            stopping = self.header["early_stopping"]
            optimizer: Optimizer = rebuild_optimizer(self.header["optimizer"])
            return {
                **options,
                "seed": _seed("seed", options["seed"]),
                "optimizer": optimizer,
                "early_stopping": None if stopping is None else EarlyStopping(**stopping),
            }

        return self._said(make)

    def check_data(self, given: Mapping[str, Mapping[str, Any]]) -> None:
        """Compare fingerprints. Raises ArgumentError where the data are others than those of the
        training."""

        def listed() -> list[tuple[str, Any, Any]]:
            return [
                (what, dict(self.header["data"][what]), given[what]) for what in ("train", "test")
            ]

        problems = []
        for what, expected, came in self._said(listed):
            for key, name in (("shape", f"x_{what}"), ("dtype", f"x_{what}")):
                if expected.get(key) != came[key]:
                    problems.append(
                        f"the {key} of {name} is {came[key]}, it was {expected.get(key)!r:.80}"
                    )
            if not problems and expected.get("labels") != came["labels"]:
                problems.append(f"t_{what} has other labels, or in another order")
            if not problems and expected.get("images") != came["images"]:
                problems.append(f"x_{what} has other images, or in another order")
        if problems:
            raise ArgumentError(f"these are not the data of {self.path}: {'; '.join(problems)}")

    def made(self, make: Callable[[], AnyTrainer]) -> AnyTrainer:
        """The Trainer that ``make`` makes of the arguments, put where it was."""
        return self._said(lambda: self._restored(make()))

    def _restored(self, trainer: Any) -> Any:
        position, state = self.header["position"], self.header["optimizer"]["state"]
        trainer.epoch = whole("epoch", position["epoch"], 0)
        trainer.batch = whole("batch", position["batch"], 0)
        trainer.stopped_early = bool(position["stopped_early"])
        if trainer.batch >= trainer.steps_per_epoch:
            raise ModelFormatError(f"batch {trainer.batch} of {trainer.steps_per_epoch} is none")
        trainer.run = self.header["run"]
        if not isinstance(trainer.run, str) or not re.fullmatch(
            RUN, trainer.run
        ):  # it becomes a part of names of files
            raise ModelFormatError(f"{trainer.run!r:.80} is no run")
        watches_loss = (
            trainer.early_stopping is not None and trainer.early_stopping.monitor == "loss"
        )
        lengths = dict.fromkeys(_BY_EPOCH, trainer.epoch)
        lengths |= {
            "train_loss_list": trainer.steps_done,
            "test_loss_list": trainer.epoch if watches_loss else 0,
        }
        history = within("history", self.tensors)
        for name, length in lengths.items():
            if history[name].shape != (length,) or str(history[name].dtype) != "float64":
                raise ModelFormatError(
                    f"{name} has the shape {history[name].shape}, expected {length} figures"
                )
            setattr(trainer, name, history[name].tolist())
        trainer.optimizer.load_state_dict(
            {**state, "arrays": within("optimizer", self.tensors)}, trainer.model.named_parameters()
        )
        best = within("best", self.tensors)
        if self.header["best"] or best:
            own = {path: tuple(array.shape) for path, array in trainer.model.named_state().items()}
            check_state(own, best, "the best weights")
            trainer._best_weights = {path: array.copy() for path, array in best.items()}
        return trainer
