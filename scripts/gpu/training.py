"""Training on a GPU: the losses of NumPy, equal bits when replayed, no transfers; sections of
``gpu_check.py``.

The Trainer is used through its public interface. Its schedule is a function that it calls before
each step; the sections use it to observe, and to disturb, what happens between two steps.
"""

import gc
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from gpu.tools import Gpu, NotHereError, Section, add_root, replaced

add_root()

from portacnn import Model, Normalize, SimpleConvNet, Trainer, load_mnist, load_mnist_sample  # noqa: E402
from portacnn.errors import OutOfMemoryError  # noqa: E402
from portacnn.layers import (  # noqa: E402
    GELU,
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    Branches,
    Conv2d,
    Flatten,
    HardSwish,
    Linear,
    Take,
)
from portacnn.models import DeepConvNet, ResNet20  # noqa: E402

GOAL = 0.985

Sets = tuple[tuple[Any, Any], tuple[Any, Any]]


def digits(section: Section, *, whole: bool = False) -> Sets:
    """Return training and test set of MNIST as uint8: from the folder, else portacnn's sample,
    unless ``whole`` is required.
    """
    if section.data is not None:
        return load_mnist(normalize=False, root=section.data)
    if whole:
        raise NotHereError("needs all of MNIST: pass --data DIR")
    return load_mnist_sample(normalize=False)


def first(sets: Sets, count: int, test: int) -> Sets:
    (x, t), (x_test, t_test) = sets
    return (x[:count], t[:count]), (x_test[:test], t_test[:test])


def trainer(model: Model, sets: Sets, **options: Any) -> Trainer:
    """Return a Trainer of the model on the two sets, with a preprocess for uint8 images."""
    (x, t), (x_test, t_test) = sets
    if x.dtype == np.uint8:
        model.preprocess = Normalize()
    return Trainer(model, x, t, x_test, t_test, verbose=False, **options)


def random_images(shape: tuple[int, ...], count: int) -> Sets:
    rng = np.random.default_rng(7)
    x = rng.integers(0, 256, (count + 20, *shape), dtype=np.uint8)
    t = rng.integers(0, 10, count + 20)
    return (x[:count], t[:count]), (x[count:], t[count:])


# --- replayed -------------------------------------------------------------------------------------


@contextmanager
def graphs_of(gpu: Gpu) -> Iterator[list[Any]]:
    """Collect every graph that is captured inside a ``with`` block."""
    found: list[Any] = []
    kind = gpu.cp.cuda.Stream
    captured = kind.end_capture

    def end_capture(stream: Any) -> Any:
        found.append(captured(stream))
        return found[-1]

    with replaced(kind, "end_capture", end_capture):
        yield found


@contextmanager
def words_of() -> Iterator[tuple[list[str], list[str]]]:
    """Collect portacnn's logged warnings in the first list, and Python's warnings in the second, at
    the end.
    """
    found: list[str] = []
    others: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, logger = Keep(logging.WARNING), logging.getLogger("portacnn")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found, others
        others += [str(warning.message) for warning in caught]
    finally:
        logger.removeHandler(handler)


def capture(section: Section) -> None:
    """Train with and without ``compile_step``; losses, weights and statistics must be equal bit by
    bit.
    """
    gpu = Gpu(section.device)
    epochs, per_epoch, size = (2, 3, 4) if section.quick else (10, 10, 96)
    small, color = (
        random_images((1, 28, 28), per_epoch * size - size // 2),
        random_images((3, 32, 32), per_epoch * size - size // 2),
    )
    cases: list[tuple[str, Callable[[], Model], Sets, str]] = [
        ("simple", lambda: SimpleConvNet(device=gpu.home, seed=0), small, "sgd"),
        ("simple", lambda: SimpleConvNet(device=gpu.home, seed=0), small, "adam"),
        ("deep, dropout", lambda: DeepConvNet(device=gpu.home, seed=0), small, "adam"),
        ("resnet20", lambda: ResNet20(device=gpu.home, seed=0), color, "momentum"),
    ]
    for name, build, sets, optimizer in cases[:3:2] if section.quick else cases:
        if not section.room(2.0 if section.quick else 8.0, f"{name} with {optimizer}"):
            continue
        with section.caught(f"{name} with {optimizer}"):
            found = []
            for compiled in (False, True):
                with words_of() as (words, others):
                    found.append(_trained(gpu, build(), sets, epochs, size, optimizer, compiled))
                section.notes += [
                    f"{name} with {optimizer}: {word}" for word in dict.fromkeys(others)
                ]
            (losses, state, _), (again, replayed, graphs) = found
            what = f"{name} with {optimizer}"
            section.expect(graphs > 0, f"{what}: nothing was captured")
            # at most one per batch shape; the shorter last batch of an epoch may run without a
            # graph
            section.expect(
                graphs <= 2, f"{what}: {graphs} graphs were captured for two batch shapes"
            )
            section.expect(not words, f"{what}: {'; '.join(words[:3])}")
            wrong = [
                step
                for step, pair in enumerate(zip(losses, again, strict=True))
                if pair[0] != pair[1]
            ]
            section.expect(
                not wrong,
                f"{what}: {len(wrong)} of {len(losses)} losses differ, the first at "
                f"step {wrong[:1]}",
            )
            other = [path for path in state if state[path].tobytes() != replayed[path].tobytes()]
            section.expect(not other, f"{what}: other bits in {', '.join(other[:5])}")
            same = not wrong and not other
            section.row(
                net=name, optimizer=optimizer, steps=len(losses), graphs=graphs, same_bits=same
            )
        gpu.forget()


def _trained(
    gpu: Gpu, model: Model, sets: Sets, epochs: int, size: int, optimizer: str, compiled: bool
) -> tuple[list[float], dict[str, np.ndarray], int]:
    """Return losses, weights and statistics, and the number of graphs. Between steps, other memory
    is allocated, written and freed.
    """
    held: list[Any] = []
    rng = np.random.default_rng(3)

    def disturb(step: int, lr: float) -> float:
        held.append(gpu.cp.full(int(rng.integers(1, 1 << 16)), float("nan"), dtype="float32"))
        if len(held) > 7:
            del held[int(rng.integers(0, 7))]
        return lr / (1 + 0.01 * step)  # differs at each step

    with graphs_of(gpu) as graphs:
        options = {
            "optimizer": optimizer,
            "optimizer_param": {"lr": 0.002},
            "schedule": disturb,
            "seed": 4,
        }
        done = trainer(
            model, sets, epochs=epochs, batch_size=size, compile_step=compiled, **options
        )
        done.train()
    return done.train_loss_list, model.state_dict(), len(graphs)


# --- transfers and memory -------------------------------------------------------------------------

FETCHES = (
    "get",
    "item",
    "tolist",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__complex__",
    "__array__",
)


@contextmanager
def carried(gpu: Gpu) -> Iterator[Counter[str]]:
    """Count the transfers between host and GPU through CuPy inside a ``with`` block, by function
    name.
    """
    cp, counts = gpu.cp, Counter[str]()

    def counted(
        name: str, method: Callable[..., Any], carries: Callable[[Any], bool]
    ) -> Callable[..., Any]:
        def call(thing: Any, *args: Any, **options: Any) -> Any:
            counts[name] += carries(thing)
            return method(thing, *args, **options)

        return call

    with ExitStack() as stack:
        for name in (*FETCHES, "set"):
            if (method := getattr(cp.ndarray, name, None)) is not None:
                stack.enter_context(
                    replaced(cp.ndarray, name, counted(name, method, lambda _: True))
                )
        for name in ("array", "asarray", "ascontiguousarray"):
            own = counted(name, getattr(cp, name), lambda thing: not isinstance(thing, cp.ndarray))
            stack.enter_context(replaced(cp, name, own))
        yield counts


def transfers(section: Section) -> None:
    """Report the transfers of a step by name, with and without a graph; the nodes of its graph; and
    its memory over many steps.
    """
    gpu = Gpu(section.device)
    size, steps = (2, 30) if section.quick else (100, 1000)
    sets = random_images((1, 28, 28), 10 * size)
    cases: list[tuple[str, Callable[[], Model], str]] = [
        ("simple", lambda: SimpleConvNet(device=gpu.home, seed=0), "sgd"),
        ("deep, dropout", lambda: DeepConvNet(device=gpu.home, seed=0), "adam"),
        ("what CuPy sends for", lambda: _sent_for(gpu), "rmsprop"),
    ]
    for name, build, optimizer in cases[::2] if section.quick else cases:
        for compiled in (False, True):
            if name == "what CuPy sends for":
                steps = min(steps, 200)
                if not compiled:
                    continue  # allowed without a graph
            what = f"{name}, {'replayed' if compiled else 'eager'}"
            if section.room(2.0 if section.quick else 6.0, what):
                with section.caught(what):
                    _watch(section, gpu, what, build(), sets, optimizer, size, steps, compiled)
            gpu.forget()


def _sent_for(gpu: Gpu) -> Model:
    """Return a model with layers for which CuPy would transfer or synchronize: concatenation of
    many parts, indices, masks.
    """
    return Model(
        conv=Conv2d(1, 4, 3, 2),
        many=Branches(*(Conv2d(4, 1, 1) for _ in range(9))),
        gelu=GELU(),
        pool=AdaptiveAvgPool2d(9),
        hard=HardSwish(),
        largest=AdaptiveMaxPool2d((3, 9)),
        take=Take([8, 0, 0, 3], 1),
        flatten=Flatten(),
        fc=Linear(None, 10),
    ).build((1, 28, 28), device=gpu.home, seed=0)


def _watch(
    section: Section,
    gpu: Gpu,
    what: str,
    model: Model,
    sets: Sets,
    optimizer: str,
    size: int,
    steps: int,
    compiled: bool,
) -> None:
    seen: list[dict[str, int]] = []  # the memory, twice
    per_epoch = 10
    # the same position in its epoch as the last, because losses accumulate during an epoch
    begin = 19 if section.quick else 99

    with carried(gpu) as counts, graphs_of(gpu) as graphs:
        by_step: list[Counter[str]] = []  # before each step, how much was carried so far

        def look(step: int, lr: float) -> float:
            by_step.append(Counter(counts))
            if step in (begin, steps - 1):
                gc.collect()
                seen.append(gpu.memory())
            return lr

        options = {
            "optimizer": optimizer,
            "optimizer_param": {"lr": 0.002},
            "schedule": look,
            "seed": 4,
        }
        options |= {
            "epochs": steps // per_epoch,
            "evaluate_sample_num_per_epoch": 10,
            "compile_step": compiled,
        }
        done = trainer(model, sets, batch_size=size, **options)
        del seen[:], by_step[:]  # the Trainer calls its schedule for the first and last rate
        done.train()
    # between two steps of one epoch nothing else happens: losses are read at its end
    inside = [n for n in range(begin, len(by_step) - 1) if (n + 1) % per_epoch]
    moved: Counter[str] = sum((by_step[n + 1] - by_step[n] for n in inside), Counter())
    words = ", ".join(f"{name} {count / len(inside):.3g} times" for name, count in moved.items())
    section.expect(not moved, f"{what}: a step transfers data between host and GPU: {words}")
    first_, last = seen
    for kind in ("used", "held"):
        grown = last[kind] - first_[kind]
        section.expect(
            grown <= 0, f"{what}: the pool's {kind} bytes grew by {grown} in {steps - begin} steps"
        )
    grown = first_["free"] - last["free"]
    section.expect(
        grown < 8 << 20,
        f"{what}: the GPU's free memory fell by {grown} bytes in {steps - begin} steps",
    )
    section.expect(graphs or not compiled, f"{what}: nothing was captured")
    nodes = _nodes(section, what, graphs)
    carries = sum(moved.values()) / len(inside)
    memory = {"pool_MB": last["held"] / 1e6, "pool_grew_B": last["held"] - first_["held"]}
    section.row(step=what, steps=steps, carries_a_step=carries, **memory, **nodes)


def _nodes(section: Section, what: str, graphs: list[Any]) -> dict[str, int | None]:
    """Return the number of nodes of each kind in the first graph; copies to or from the host are
    errors.
    """
    if not graphs:
        return {"nodes": None, "copies": None}
    try:
        # verbose; otherwise the direction of a copy may be missing
        dot = graphs[0].debug_dot_str(1)
    except Exception as error:
        section.notes.append(f"{what}: the nodes of the graph are unavailable: {error}")
        return {"nodes": None, "copies": None}
    upper = dot.upper()
    section.figures.setdefault("graphs", {})[what] = dot[:4000]
    foreign = upper.count("HTOD") + upper.count("DTOH")
    section.expect(not foreign, f"{what}: the graph has {foreign} copies to or from the host")
    return {"nodes": dot.count("label="), "copies": upper.count("MEMCPY")}


# --- a full memory, a second device ---------------------------------------------------------------


def memory(section: Section) -> None:
    """Check that a batch that does not fit raises an error and leaves the model unchanged, that a
    smaller one works, and the second device.
    """
    gpu = Gpu(section.device)
    size = 200 if section.quick else 20_000
    images = random_images((1, 28, 28), size)
    for compiled in (False, True):
        what = "replayed" if compiled else "eager"
        with section.caught(what):
            _overfull(section, gpu, what, images, size, compiled)
        gpu.forget()
    with section.caught("second device"):
        _second_device(section, gpu)


def _overfull(
    section: Section, gpu: Gpu, what: str, images: Sets, size: int, compiled: bool
) -> None:
    """Fill the GPU's memory, except for several times the need of the small batch, which is far
    below that of the large one.
    """
    model = DeepConvNet(device=gpu.home, seed=0)
    small = max(size // 200, 2)
    options = {"epochs": 1, "compile_step": compiled, "seed": 1}
    goes_on = trainer(model, first(images, 5 * small, 10), batch_size=small, **options)
    goes_on.train()
    large = trainer(model, images, batch_size=size, **options)
    gpu.forget()
    room = size * 60_000  # bytes; the large batch's activations take some 300,000 an image
    ballast = gpu.cp.empty(max(gpu.memory()["free"] - room, 0), dtype="uint8")
    before = model.state_dict()
    try:
        large.train()
        section.expect(False, f"{what}: a batch of {size} images went through in {room} bytes")
    except OutOfMemoryError as error:
        section.expect(
            str(size) in str(error), f"{what}: the error does not name the batch size: {error}"
        )
        section.expect(
            "bytes requested" in str(error), f"{what}: the error does not name the bytes: {error}"
        )
        section.figures[f"{what}, full"] = str(error)
    after = model.state_dict()
    changed = [path for path in before if before[path].tobytes() != after[path].tobytes()]
    section.expect(not changed, f"{what}: the step that did not fit changed {', '.join(changed)}")
    again = trainer(model, first(images, 5 * small, 10), batch_size=small, **options)
    again.train()
    section.expect(
        np.isfinite(again.train_loss_list).all(),
        f"{what}: the smaller batch's losses are not finite",
    )
    section.row(step=what, batch=size, smaller_batch=small, steps_after=len(again.train_loss_list))
    del ballast


def _second_device(section: Section, gpu: Gpu) -> None:
    count = gpu.cp.cuda.runtime.getDeviceCount()
    if count < 2:
        section.notes.append("cuda:1 was not tested: there is one device")
        return
    images = random_images((1, 28, 28), 300)
    found = []
    for device in ("numpy", "cuda:1"):
        model = SimpleConvNet(device=device, seed=0)
        done = trainer(model, images, epochs=1, seed=1, optimizer="sgd")
        done.train()
        found.append(done.train_loss_list)
        if device == "cuda:1":
            places = {array.device.id for array in model.named_parameters().values()}
            section.expect(places == {1}, f"cuda:1: parameters lie on devices {places}")
    section.expect(
        np.allclose(*found, rtol=1e-4), f"cuda:1: losses {found[1]}, on NumPy {found[0]}"
    )


# --- how long it takes ----------------------------------------------------------------------------


def accuracy(section: Section) -> None:
    """Train SimpleConvNet on all of MNIST, stored as bytes on the GPU, to the target test accuracy;
    measured after start-up.
    """
    sets = digits(section, whole=True)
    gpu = Gpu(section.device)
    if section.quick:
        sets = first(sets, 1000, 200)
    # start-up: a short training loads and compiles what this one uses
    _, _ = _to_goal(gpu, first(sets, 250, 100), 1)
    seconds, done = _to_goal(gpu, sets, 1 if section.quick else 10)
    best = max(done.test_acc_list)
    section.expect(
        section.quick or best >= GOAL, f"the test accuracy is {best:.4f} after {done.epoch} epochs"
    )
    for epoch, (loss, test) in enumerate(
        zip(done.epoch_loss_list, done.test_acc_list, strict=True), 1
    ):
        section.row(epoch=epoch, loss=loss, test_accuracy=test)
    section.figures |= {
        "seconds": seconds,
        "batch": done.batch_size,
        "training_images": len(sets[0][0]),
    }
    section.figures["what"] = (
        "adam, replayed steps, both accuracies after each epoch included, start-up not"
    )


def _to_goal(gpu: Gpu, sets: Sets, epochs: int) -> tuple[float, Trainer]:
    model = SimpleConvNet(device=gpu.home, seed=0, weight_init="he")
    done = trainer(model, sets, epochs=0, compile_step=True, seed=1, batch_size=100)
    gpu.home.synchronize()
    start = time.perf_counter()
    while done.epochs < epochs and not (done.test_acc_list and done.test_acc_list[-1] >= GOAL):
        done.epochs += 1
        done.train()
    gpu.home.synchronize()
    return time.perf_counter() - start, done
