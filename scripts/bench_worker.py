"""One measurement in its own process, for ``bench.py``: the task as JSON on the command line, the
result as JSON on stdout.

Imports, measures the memory, builds, warms up, times. For a peer in another interpreter this needs
NumPy and the peer, but not portacnn.
"""

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_nets
import bench_peers
import numpy as np

WARM_UP_STEPS, WARM_UP_SECONDS = 5, 0.3
MIN_STEPS, MAX_STEPS = 5, 5000


@dataclass
class Subject:
    """What is timed.

    Attributes:
        run: one step, prediction or epoch.
        warm_up: what to do first. None calls ``run`` itself for a while and then many times;
            otherwise ``run`` is timed once.
        check: called after the timing; raises if results are not finite.
        device_bytes: the peak memory of a device with its own memory, else None.
    """

    run: Callable[[], Any]
    synchronize: Callable[[], None]
    parameters: int
    where: str
    warm_up: Callable[[], Any] | None = None
    check: Callable[[], None] = lambda: None
    device_bytes: Callable[[], int | None] = lambda: None


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Do the task. If the contender is unavailable, the result has the reason under
    "unavailable".
    """
    if task["what"] == "machine":
        return machine()
    try:
        load(task)
    except ModuleNotFoundError as error:
        return {"unavailable": f"{error.name} is not installed in {sys.executable}"}
    except (ImportError, OSError) as error:
        return {"unavailable": str(error).splitlines()[0]}
    except Exception as error:
        if type(error).__module__ == "portacnn.errors":
            return {"unavailable": str(error)}
        raise
    if task["what"] == "profile":
        return profile(task)
    reset_peak()
    before = memory()
    subject = portacnn_subject(task) if task["contender"] == "portacnn" else peer_subject(task)
    times = timed(subject, task["seconds"])
    after = memory()
    subject.check()
    device = subject.device_bytes()
    return {
        "median_ms": 1e3 * statistics.median(times),
        "min_ms": 1e3 * min(times),
        "max_ms": 1e3 * max(times),
        "steps": len(times),
        "peak_mib": (after[1] - before[0]) / 2**20 if before and after else None,
        "device_peak_mib": None if device is None else device / 2**20,
        "parameters": subject.parameters,
        "where": subject.where,
        **about(task),
    }


def load(task: dict[str, Any]) -> None:
    """Import what the contender needs, and initialize its device."""
    if task["contender"] == "portacnn":
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import portacnn

        home = portacnn.resolve(task["device"])
        if task["precision"] not in home.precisions:
            raise OSError(
                f"{home} does not support {task['precision']}, only {', '.join(home.precisions)}"
            )
        one = home.xp.ones((1,), dtype=home.xp.float32, device=home.device)
        portacnn.ops.relu(one)  # the first op imports the kernels
    elif task["contender"] in bench_peers.WITH_DEVICE:
        import bench_torch
        import torch

        bench_torch.Torch.load()
        try:
            torch.zeros(1, device=task["device"] or "cpu")
        except (RuntimeError, AssertionError) as error:
            raise OSError(str(error)) from error
    elif task["contender"] != "tutorials":
        __import__(task["contender"])


def timed(subject: Subject, seconds: float) -> list[float]:
    """Return the seconds of each run, including the wait for the device."""

    def once() -> float:
        start = time.perf_counter()
        subject.run()
        subject.synchronize()
        return time.perf_counter() - start

    if subject.warm_up is not None:
        subject.warm_up()
        subject.synchronize()
        return [once()]
    repeat(once, WARM_UP_STEPS, WARM_UP_SECONDS)
    return repeat(once, MIN_STEPS, seconds)


def repeat(once: Callable[[], float], steps: int, seconds: float) -> list[float]:
    """Run at least ``steps`` times, and as often as runs start within ``seconds``."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < steps or (time.perf_counter() < end and len(times) < MAX_STEPS):
        times.append(once())
    return times


# --- the contenders -------------------------------------------------------------------------------


def images(net: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return random float32 images and their labels."""
    rng = np.random.default_rng(seed)
    x = rng.random((count, *bench_nets.SHAPES[net]), dtype=np.float32)
    return x, rng.integers(0, bench_nets.CLASSES[net], count)


def epoch_sets(task: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return training and test set of an epoch: from the folder, else random images."""
    count = task["images"]
    if task["data"] is None:
        return [images(task["net"], count), images(task["net"], max(count // 6, 1), seed=1)]
    stored = [
        np.load(Path(task["data"]) / f"{name}.npy")
        for name in ("x_train", "t_train", "x_test", "t_test")
    ]
    x_train, t_train, x_test, t_test = stored
    return [
        ((x[:n] / np.float32(255)).astype(np.float32), t[:n])
        for x, t, n in ((x_train, t_train, count), (x_test, t_test, max(count // 6, 1)))
    ]


def peer_subject(task: dict[str, Any]) -> Subject:
    net, batch, mode = task["net"], task["batch"], task["mode"]
    peer = bench_peers.make(task["contender"], net, task["device"])
    place = f"{task['contender']} on {task['device'] or 'cpu'}"
    shared = {"parameters": peer.parameters, "where": place, "device_bytes": peer.device_bytes}
    if mode == "epoch":
        sets = [(peer.put(x), peer.put(t)) for x, t in epoch_sets(task)]
        few = [(x[: 10 * batch], t[: 10 * batch]) for x, t in sets]
        return Subject(
            lambda: bench_peers.epoch(peer, sets, batch),
            peer.synchronize,
            warm_up=lambda: bench_peers.epoch(peer, few, batch),
            **shared,
        )
    host_x, host_t = images(net, batch)
    x, t = peer.put(host_x), peer.put(host_t)
    peer.begin(training=mode == "train")
    last: list[Any] = [None]  # the last loss or logits

    def run() -> None:
        last[0] = peer.step(x, t) if mode == "train" else peer.predict(x)

    def check() -> None:
        if not np.isfinite(np.asarray(last[0].cpu() if hasattr(last[0], "cpu") else last[0])).all():
            raise ArithmeticError("its results are not finite")

    return Subject(run, peer.synchronize, check=check, **shared)


def portacnn_model(net: str, device: str | None) -> Any:
    """Return portacnn's version of the net."""
    from portacnn import Model, SimpleConvNet, layers
    from portacnn.models import AlexNet, LeNet5, ResNet20

    if net == "deep":
        made: list[Any] = []
        for spec in bench_nets.PLAIN[net]:
            if isinstance(spec, bench_nets.Conv):
                made += [
                    layers.Conv2d(spec.inputs, spec.outputs, spec.kernel, padding=spec.padding),
                    layers.ReLU(),
                ]
            elif isinstance(spec, bench_nets.Pool):
                made.append(layers.MaxPool2d(2))
            else:
                if not any(isinstance(layer, layers.Flatten) for layer in made):
                    made.append(layers.Flatten())
                made += [layers.Linear(*spec), layers.ReLU()]
        return Model(*made[:-1]).build(bench_nets.SHAPES[net], device=device, seed=0)
    offered: dict[str, Callable[[], Any]] = {
        "simple": lambda: SimpleConvNet(hidden_size=100, device=device, seed=0),
        "lenet": lambda: LeNet5(variant="modern", device=device, seed=0),
        "resnet20": lambda: ResNet20(device=device, seed=0),
        "alexnet": lambda: AlexNet(device=device, seed=0),
    }
    return offered[net]()


def portacnn_trainer(
    model: Any,
    sets: list[tuple[Any, Any]],
    batch: int,
    precision: str = "float32",
    compile_step: bool = False,
) -> Any:
    from portacnn import Trainer

    (x, t), (x_test, t_test) = sets
    rate = {"lr": bench_nets.LEARNING_RATE}
    options = {
        "mini_batch_size": batch,
        "optimizer": "sgd",
        "optimizer_param": rate,
        "verbose": False,
        "epochs": 1,
    }
    return Trainer(
        model, x, t, x_test, t_test, precision=precision, compile_step=compile_step, **options
    )


def portacnn_step(
    model: Any, task: dict[str, Any], compile_step: bool = False
) -> Callable[[], None]:
    """Run what ``Trainer`` does for a batch: gather, forward, loss, backward, update."""
    x, t = images(task["net"], task["batch"])
    trainer = portacnn_trainer(
        model,
        [(x, t), (x[:1], t[:1])],
        task["batch"],
        task.get("precision", "float32"),
        compile_step,
    )
    chosen = model.backend.asarray(np.random.default_rng(0).permutation(len(x)))
    return lambda: trainer.run_batch(chosen)


def portacnn_subject(task: dict[str, Any]) -> Subject:
    from portacnn.ops import use_precision

    net, batch, mode = task["net"], task["batch"], task["mode"]
    model = portacnn_model(net, task["device"])
    home, warm_up = model.backend, None
    if mode == "train":
        run = portacnn_step(model, task)
    elif mode == "infer":
        x = home.asarray(images(net, batch)[0])

        def run() -> None:
            with use_precision(task["precision"]):
                model.predict(x)

    else:
        sets = epoch_sets(task)
        few = portacnn_trainer(
            model, [(x[: 10 * batch], t[: 10 * batch]) for x, t in sets], batch, task["precision"]
        )
        run, warm_up = portacnn_trainer(model, sets, batch, task["precision"]).train, few.train

    def check() -> None:
        logits = model.predict(images(net, min(batch, 32))[0])
        if not np.isfinite(home.to_host(logits)).all():
            raise ArithmeticError("its results are not finite")

    parameters = sum(p.size for p in map(home.to_host, model.named_parameters().values()))
    return Subject(
        run, home.synchronize, parameters, str(home), warm_up, check, lambda: device_bytes(home)
    )


def device_bytes(home: Any) -> int | None:
    if home.name == "cupy":
        import cupy

        return cupy.get_default_memory_pool().total_bytes()
    if home.name == "torch" and home.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(home.device)
    return None


# --- time per layer -------------------------------------------------------------------------------


def parts(model: Any) -> list[tuple[str, Any]]:
    """Return the parts of a model in order, by name: layers or fused stages, with ``forward`` and
    ``backward``.
    """
    from portacnn.layers import Sequential

    found = []
    for layer in model.walk():
        below = layer.stages if isinstance(layer, Sequential) else layer.children.values()
        for stage in below:
            if not stage.children:
                named = getattr(stage, "name", None)  # of a fused stage: "conv1 + relu1"
                found.append(
                    (
                        stage.where
                        if named is None
                        else f"{stage.where.partition(' ')[0]}: {named}",
                        stage,
                    )
                )
    return found


def profile(task: dict[str, Any]) -> dict[str, Any]:
    """Return the median ms per training step of each part's forward and backward pass. The step
    time includes the timers.
    """
    model = portacnn_model(task["net"], task["device"])
    spent: dict[tuple[str, str], float] = {}
    step = portacnn_step(model, task)
    named = parts(model)

    def clocked(name: str, what: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **options)
            model.backend.synchronize()
            spent[name, what] = spent.get((name, what), 0.0) + time.perf_counter() - start
            return result

        return call

    for name, part in named:
        for what in ("forward", "backward"):
            setattr(part, what, clocked(name, what, getattr(part, what)))
    steps: list[dict[tuple[str, str], float]] = []

    def once() -> float:
        spent.clear()
        start = time.perf_counter()
        step()
        model.backend.synchronize()
        took = time.perf_counter() - start
        steps.append(dict(spent))
        return took

    repeat(once, WARM_UP_STEPS, WARM_UP_SECONDS)
    steps.clear()
    times = repeat(once, MIN_STEPS, task["seconds"])

    def ms(name: str, what: str) -> float:
        return 1e3 * statistics.median(step.get((name, what), 0.0) for step in steps)

    layers = [
        {"layer": n, "forward_ms": ms(n, "forward"), "backward_ms": ms(n, "backward")}
        for n, _ in named
    ]
    rest = 1e3 * statistics.median(
        t - sum(step.values()) for t, step in zip(times, steps, strict=True)
    )
    step_ms = 1e3 * statistics.median(times)
    figures = {"layers": layers, "rest_ms": rest, "step_ms": step_ms, "steps": len(times)}
    return {**figures, "where": str(model.backend), **about(task)}


# --- memory, threads, versions, the machine -------------------------------------------------------


def memory() -> tuple[int, int] | None:
    """Return the current and the peak memory of this process in bytes (on macOS the peak twice), or
    None if unknown.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        told = {key: value for key, _, value in (line.partition(":") for line in lines)}
        return tuple(1024 * int(told[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return most, most


def reset_peak() -> None:
    """Reset the peak memory, if Linux allows it: imports temporarily need more memory than
    they keep.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def about(task: dict[str, Any]) -> dict[str, Any]:
    """Return the versions and thread counts of this process."""
    return {"versions": versions(), "threads": threads(task["contender"])}


def versions() -> dict[str, str]:
    """Return the versions of the loaded libraries."""
    loaded = {"python": sys.version.split()[0]}
    for name in (
        "portacnn",
        "numpy",
        "torch",
        "cupy",
        "array_api_strict",
        "numba",
        "chainer",
        "dezero",
    ):
        if name in sys.modules and hasattr(sys.modules[name], "__version__"):
            loaded[name] = str(sys.modules[name].__version__)
    return loaded


def threads(contender: str) -> dict[str, int]:
    """Return the number of threads of each pool in this process."""
    count = {}
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        pass
    else:
        count = {pool["internal_api"]: pool["num_threads"] for pool in threadpool_info()}
    if "torch" in sys.modules:
        count["torch"] = sys.modules["torch"].get_num_threads()
    if contender == "portacnn":
        from portacnn.backends.threads import thread_count

        count["portacnn"] = thread_count()
    return count


def machine() -> dict[str, Any]:
    """Describe the machine, and measure a large product and a large copy with NumPy, the best of
    several.

    A copy counts the bytes read and the bytes written.
    """
    rng = np.random.default_rng(0)
    a, b = (rng.random((2048, 2048), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    source = rng.random(1 << 24, dtype=np.float32)  # 64 MiB
    target = np.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        def once() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        once()
        return min(repeat(once, 3, WARM_UP_SECONDS))

    gemm, copy = best(lambda: np.matmul(a, b, out=out)), best(lambda: np.copyto(target, source))
    reached = {
        "gemm_gflops": 2 * 2048**3 / gemm / 1e9,
        "copy_gb_per_s": 2 * source.nbytes / copy / 1e9,
    }
    return {"cpu": cpu_name(), "cores": cores(), "system": platform.platform(), **reached}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> float:
    """Return the number of cores this process may use; a container's quota may be a fraction."""
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return allowed if quota == "max" else min(allowed, int(quota) / int(period))
    except (OSError, ValueError):
        return allowed


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
