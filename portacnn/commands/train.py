"""``portacnn train``: train a model on any data, into a run's folder."""

import argparse
import logging
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

from portacnn import losses, run_folder
from portacnn.arguments import keyword_problem
from portacnn.commands import settings as of
from portacnn.commands.environment import environment, installed, peak_memory
from portacnn.commands.evaluate import evaluated
from portacnn.commands.sets import absolute, load, output_count
from portacnn.commands.settings import FRESH, Settings
from portacnn.console import mute, say
from portacnn.distributed import Communicator, control, join, launch, taking_down
from portacnn.errors import ArgumentError, DependencyError
from portacnn.files import make_folder, write_atomically
from portacnn.losses import Loss
from portacnn.losses.named import LOSSES
from portacnn.metrics import metrics_for
from portacnn.models import Model, ModelInfo, Normalize, make_model, model_options
from portacnn.models.info import LONGEST
from portacnn.runtime import Backend
from portacnn.seeds import check_seed
from portacnn.text import cut, printable
from portacnn.training import Trainer, folder, stopping_on_signals

HELP = "train a model on images"
_SAME = (
    *("metrics", "class_weight", "epochs", "batch_size", "drop_last", "optimizer", "schedule"),
    *(
        "augment",
        "clip_norm",
        "label_smoothing",
        "accumulate",
        "early_stopping",
        "seed",
        "precision",
    ),
    *("compile_step", "checkpoint_dir", "checkpoint_every", "keep"),
    *("sync_batch_norm", "compress_gradients"),
)
"""Settings that the Trainer takes as they are."""
_FEWEST, _MOST, _STEPS = 16, 100, 20
"""The default batch size: limits, and the steps of an epoch that it aims at."""
_NO_FILES = "safetensors is not installed"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.usage = "%(prog)s [OPTIONS]"
    parser.add_argument(
        "--settings",
        metavar="FILE",
        help="a TOML file that says all that these options say; options win. A run writes its own "
        f"to OUT/{run_folder.SETTINGS}",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="resume from a checkpoint, or the newest in a folder: by default --checkpoint-dir, "
        f"else OUT/{run_folder.CHECKPOINTS}",
    )
    of.add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Train; return the exit status."""
    said = of.given(options)
    filed = {} if options.settings is None else of.read(options.settings)
    can_save = installed("safetensors")
    settings = of.merged(of.merged(Settings(), filed), said)
    _settle_who_speaks(settings.distributed is not None)
    if not can_save and (options.resume is not None or settings.checkpoint_dir is not None):
        raise DependencyError(
            f"checkpoints need safetensors: {_NO_FILES}; run: pip install safetensors"
        )
    engine: Any = settings.distributed
    with taking_down(control(engine)):  # files and devices may be missing on one host
        path, known = None, True
        if options.resume is not None:
            path = Path(options.resume or settings.checkpoint_dir or _checkpoints(settings))
            settings, known = _of_resumed(path, filed, said)
        ranks, home = join(engine, settings.device)
        if path is None:
            _check_words(settings)
            sets = _load(settings)
            trainer, settings = _new(settings, home, sets, ranks)
        else:
            sets = _load(settings)
            device = settings.device if ranks.size == 1 else home
            trainer, settings = _resumed(path, settings, sets, device, ranks)
        out = trainer.ranks.on_first(lambda: _made(settings.out))
        return _Run(trainer, settings, sets, Path(out), can_save, path is not None, known).train()


def _made(out: str) -> str:
    return str(make_folder(out, "the results", "--out").absolute())


def _settle_who_speaks(together: bool) -> None:
    """Of ranks that train together, the first alone prints messages."""
    started = launch()
    if started is None or started.size == 1:
        return
    if together and started.rank > 0:
        mute()
        logging.getLogger("portacnn").setLevel(logging.ERROR)
    if not together and started.rank == 0:
        say(
            f"warning: {started.launcher} has started {started.size} processes, and each trains "
            "alone into the same folder; --distributed lets them train together",
            error=True,
        )


def _load(settings: Settings) -> tuple[Any, Any]:
    return load(
        settings.data,
        image_size=settings.image_size,
        mode=settings.mode,
        test_share=settings.test_share,
        on_error=settings.on_error,
    )


class _Run:
    """A training from its first line on the screen to its files."""

    def __init__(
        self,
        trainer: Trainer,
        settings: Settings,
        sets: tuple[Any, Any],
        out: Path,
        can_save: bool,
        resumed: bool,
        known: bool,
    ) -> None:
        self.trainer, self.settings, self.sets = trainer, settings, sets
        self.out, self.can_save, self.resumed = out, can_save, resumed
        self.known = known  # whether the settings are those of the whole run

    def train(self) -> int:
        """Train and write the results; return the exit status."""
        trainer, before = self.trainer, self.trainer.epoch
        on_first = trainer.ranks.on_first
        self._say_what()
        on_first(self._record)
        date, start = datetime.now(UTC), time.perf_counter()
        ranks = trainer.ranks.communicator
        with stopping_on_signals(trainer) as caught:
            trainer.train()
            # A signal may have reached some ranks only; all of them have stopped.
            caught.number = max(ranks.gather(caught.number or 0)) or None
            ran_on = {
                "date": date.isoformat(timespec="seconds"),
                "seconds": time.perf_counter() - start,
                "peak_memory": peak_memory(),
                **environment(trainer.backend),
            }
            if caught.number is not None:
                say(*on_first(self._where_it_stopped))
                say(*on_first(lambda: self._write(ran_on)))
                return caught.exit_status
        told = [f"trained  {trainer.epoch - before} epochs in {ran_on['seconds']:.1f} s"]
        final = on_first(self._final)
        told += [f"final test {n.replace('_', ' ')} {v:.4f}" for n, v in final.items()]
        say(*told, *on_first(lambda: self._write(ran_on)))
        return 0

    def _say_what(self) -> None:
        trainer, (train, test) = self.trainer, self.sets
        model, settings = trainer.model, self.settings
        count = sum(prod(array.shape) for array in model.named_parameters().values())
        parts = [type(model).__name__, f"{count:,} parameters"]
        if self.resumed:
            parts.append(f"{trainer.steps_done:,} steps done")
        elif "weight_init" in model_options(settings.model):
            parts.append(f"weights by {_rule(settings)}")
        parts.append(f"seed {trainer.seed}")
        ranks = trainer.ranks
        several = "" if ranks.alone else f", {ranks.size} ranks by {ranks.communicator.name}"
        told = [
            f"backend  {trainer.backend}{several}",
            f"model    {', '.join(parts)}",
            f"data     {settings.data}: {len(train):,} training and {len(test):,} test images",
        ]
        if names := model.info.class_names:
            told.append(f"classes  {len(names)}: {_some(names)}")
        if not self.can_save:
            told.append(
                f"note     {_NO_FILES}: the weights will not be saved (pip install safetensors)"
            )
        say(*told)

    def _final(self) -> dict[str, float]:
        """Return the figures of the test set for the weights that the model has now."""
        trainer, known = self.trainer, self.trainer.model.info.figures
        found = {name: known.get(f"test_{name}") for name in trainer.metrics or ("loss",)}
        mid = trainer.batch or not trainer.epoch  # the figures are not those of these weights
        if mid or self.settings.evaluate_images is not None:
            loss = trainer.loss.for_evaluation()
            whole = evaluated(trainer.model, [self.sets[1]], loss, trainer.metrics)
            found = {name: whole[name] for name in found}
        return {name: value for name, value in found.items() if isinstance(value, float)}

    def _record(self) -> None:
        """Write the settings beside the checkpoints, for a training that is resumed."""
        folder = self.trainer.checkpoint_dir
        if self.known and folder is not None:
            path = folder / _record_name(self.trainer.run)
            write_atomically(path, self._settings_file())

    def _settings_file(self) -> bytes:
        """Return the settings as TOML, with the data by a path that holds in any folder."""
        settings = self.settings
        return of.written(replace(settings, data=absolute(settings.data))).encode()

    def _write(self, ran_on: Mapping[str, Any]) -> list[str]:
        """Write the results, those so far of a training that was stopped; return a line about each
        file."""
        trainer, out, shown = self.trainer, self.out, Path(self.settings.out)
        told = []
        if self.can_save:
            trainer.model.save(out / run_folder.PARAMS)
            told.append(f"weights  {shown / run_folder.PARAMS}")
        run_folder.clear(out, keep=run_folder.PARAMS if self.can_save else None)
        table = run_folder.table(trainer.history)
        write_atomically(out / run_folder.ACCURACY, table.encode())
        run_folder.write_history(out, trainer.history, trainer.train_loss_list, ran_on)
        told.append(f"history  {shown / run_folder.HISTORY}, {run_folder.ACCURACY}")
        if self.known:
            write_atomically(out / run_folder.SETTINGS, self._settings_file())
            told.append(f"settings {shown / run_folder.SETTINGS}")
        else:
            told.append("settings not written: the checkpoint's folder does not hold those it had")
        if not trainer.epoch:
            told.append("curves   not drawn: no epoch was trained")
        elif installed("matplotlib"):
            title = f"{type(trainer.model).__name__}, {trainer.backend}"
            from portacnn import plot

            plot.curves(trainer, title=title).savefig(out / run_folder.CURVES)
            told.append(f"curves   {shown / run_folder.CURVES}")
        else:
            told.append(
                'curves   not drawn: matplotlib is not installed (pip install "portacnn[plot]")'
            )
        return told

    def _where_it_stopped(self) -> list[str]:
        """After a signal, return lines about the current step and the checkpoint to resume from;
        write one if there is none.

        The options in them are those that checkpoints do not hold, quoted for a shell.
        """
        trainer, settings = self.trainer, self.settings
        epoch = min(trainer.epoch + 1, trainer.epochs)
        stopped = f"stopped  after step {trainer.steps_done} (epoch {epoch})"
        if not self.can_save:
            return [stopped, f"note     no checkpoint: {_NO_FILES}"]
        if trainer.checkpoint_dir is None:
            trainer.checkpoint_dir = make_folder(self.out / run_folder.CHECKPOINTS)
            self._record()
            trainer.checkpoint()
        on = ["--resume", str(trainer.last_checkpoint), "--out", settings.out]
        on += ["--data", settings.data]
        if settings.distributed is not None:
            on += ["--distributed", settings.distributed]
        return [stopped, f"saved    {trainer.last_checkpoint}", f"resume   {shlex.join(on)}"]


# --- a new training -------------------------------------------------------------------------------


def _check_words(settings: Settings) -> None:
    """Raise ArgumentError for an unknown model, loss option or metric, before data are loaded."""
    model_options(settings.model)
    metrics_for(_loss(settings), settings.metrics)


def _new(
    settings: Settings, backend: Backend, sets: tuple[Any, Any], ranks: Communicator
) -> tuple[Trainer, Settings]:
    """Return the Trainer of a new training, and its settings with everything that was drawn or
    chosen."""
    train, test = sets
    settings = replace(
        settings,
        seed=ranks.share(check_seed(settings.seed)),
        epochs=20 if settings.epochs is None else settings.epochs,
        keep=3 if settings.keep is None else settings.keep,
        batch_size=_batch_size(settings, len(train)),
    )
    if settings.checkpoint_every is not None and settings.checkpoint_dir is None:
        settings = replace(settings, checkpoint_dir=str(_checkpoints(settings)))
    loss = _loss(settings)
    model = _model(settings, backend, output_count(loss, train, test), train)
    arguments = {name: getattr(settings, name) for name in _SAME}
    arguments["compile_step"] = settings.compile_step or None  # else what the backend prefers
    trainer = Trainer(
        model,
        train,
        None,
        test,
        None,
        loss=loss,
        optimizer_param=_optimizer_param(settings),
        evaluate_sample_num_per_epoch=settings.evaluate_images,
        verbose=not settings.quiet,
        distributed=ranks,
        **arguments,
    )
    return trainer, _placed(settings, trainer)


def _batch_size(settings: Settings, count: int) -> int:
    """Return the images of one step. By default an epoch has about 20 steps or more: with fewer, a
    small set is trained for too few steps, and batch norm's running statistics lag behind."""
    if settings.batch_size is not None:
        return settings.batch_size
    return min(count, max(_FEWEST, min(_MOST, count // _STEPS)))


def _model(settings: Settings, backend: Backend, outputs: int, train: Any) -> Model:
    """Return the model for these images, which knows the names of its classes."""
    options = {"num_classes": outputs, **settings.model_option}
    outputs = options.pop("num_classes")
    if settings.weight_init is not None or "weight_init" in model_options(settings.model):
        options.setdefault("weight_init", _rule(settings))
    shape = tuple(train.images.shape[1:])
    model = make_model(
        settings.model, shape, outputs, device=backend, seed=settings.seed, **options
    )
    names = tuple(cut(printable(name), LONGEST) for name in train.class_names)
    if len(names) == outputs:
        model.info = ModelInfo(class_names=names)
    if str(train.images.dtype) == "uint8":
        model.preprocess = Normalize()
    return model


def _rule(settings: Settings) -> float | str:
    return "he" if settings.weight_init is None else settings.weight_init


def _loss(settings: Settings) -> Loss:
    """Return the loss with its options. Raises ArgumentError for an unknown one."""
    kind, options = LOSSES[settings.loss], settings.loss_option
    if not options:
        return losses.named(settings.loss)
    if problem := keyword_problem(kind, options, settings.loss):
        raise ArgumentError(problem)
    return kind(**options)


def _optimizer_param(settings: Settings) -> dict[str, Any]:
    """Return the optimizer's arguments that were given."""
    given = {
        "lr": settings.lr,
        "momentum": settings.momentum,
        "weight_decay": settings.weight_decay,
        **settings.optimizer_option,
    }
    return {name: value for name, value in given.items() if value is not None}


def _placed(settings: Settings, trainer: Trainer) -> Settings:
    """Return settings that name what the Trainer has: the device and the number of epochs. Of
    several ranks, each has a device of its own."""
    home = trainer.backend
    return replace(
        settings,
        device=f"{home.name}:{home.place(home.device)}" if trainer.ranks.alone else settings.device,
        epochs=trainer.epochs,
        keep=trainer.keep,
    )


# --- a resumed one --------------------------------------------------------------------------------


def _checkpoints(settings: Settings) -> Path:
    return Path(settings.out) / run_folder.CHECKPOINTS


def _record_name(run: str) -> str:
    return f"settings-{run}.toml"


def _of_resumed(
    path: Path, filed: Mapping[str, Any], said: Mapping[str, Any]
) -> tuple[Settings, bool]:
    """Return the settings of a training that is resumed: those that it had, with what is said now;
    and whether the folder of its checkpoints has them.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ArgumentError: if something is said that the checkpoint has.
    """
    refused = [name for name in said if name in FRESH]
    if refused:
        words = ", ".join(map(of.word, refused))
        raise ArgumentError(f"--resume takes {words} from the checkpoint; omit it")
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint to resume from: {path} does not exist; choose one: --resume PATH"
        )
    before = path if path.is_dir() else path.parent
    found = folder.checkpoints(before)
    run = next((each.run for each in reversed(found) if path in (before, each.path)), None)
    record = before / _record_name(run or "")
    had = of.read(record) if record.is_file() else {}
    # One process returns to the checkpoint's device; ranks have one each, by the device asked for.
    several = {**filed, **said}.get("distributed") is not None
    base = of.merged(Settings(), {n: v for n, v in had.items() if n != "device" or several})
    for name in filed:
        if name in FRESH and (not had or filed[name] != getattr(base, name)):
            raise ArgumentError(
                f"the settings file says {name} = {filed[name]!r}, but --resume takes it from the "
                "checkpoint; omit it"
            )
    return of.merged(of.merged(base, filed), said), bool(had)


def _resumed(
    path: Path,
    settings: Settings,
    sets: tuple[Any, Any],
    device: str | Backend | None,
    ranks: Communicator,
) -> tuple[Trainer, Settings]:
    """Return the Trainer that continues from a checkpoint, and the settings of the whole run."""
    trainer = Trainer.resume(
        path,
        sets[0],
        None,
        sets[1],
        None,
        device=device,
        epochs=settings.epochs,
        checkpoint_dir=settings.checkpoint_dir,
        checkpoint_every=settings.checkpoint_every,
        keep=settings.keep,
        verbose=not settings.quiet,
        distributed=ranks,
    )
    return trainer, _placed(replace(settings, seed=trainer.seed), trainer)


def _some(names: Sequence[str]) -> str:
    """Return the first names, as many as fit a line."""
    fit = [
        name
        for name, end in zip(names, accumulate(len(n) + 2 for n in names), strict=True)
        if end <= 64
    ]
    shown = ", ".join(fit or [cut(names[0], 60)])
    return shown if len(fit) == len(names) else f"{shown}, ..."
