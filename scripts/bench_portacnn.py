"""portacnn as a contender of ``bench.py``: its models, what is timed, and the time per layer."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import bench_nets
import numpy as np
from bench_machine import about
from bench_nets import epoch_sets, images
from bench_timing import MIN_STEPS, WARM_UP_SECONDS, WARM_UP_STEPS, Subject, repeat


def portacnn_model(net: str, device: str | None, size: int | None = None) -> Any:
    """Return portacnn's version of the net, for images of its own size or ``size``."""
    from portacnn import Model, SimpleConvNet, layers, models

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
        "lenet": lambda: models.LeNet5(variant="modern", device=device, seed=0),
        "alexnet": lambda: models.AlexNet(device=device, seed=0),
    }
    if net in offered:
        return offered[net]()
    scaled: dict[str, Callable[..., Any]] = {
        "resnet20": models.ResNet20,
        "vgg11": models.VGG11,
        "resnet18": models.ResNet18,
        "resnet50": models.ResNet50,
        "mobilenetv2": models.MobileNetV2,
        "unet": models.UNet,
    }
    return scaled[net](input_size=size or bench_nets.SHAPES[net][1], device=device, seed=0)


def portacnn_trainer(
    model: Any,
    sets: list[tuple[Any, Any]],
    batch: int,
    precision: str = "float32",
    compile_step: bool | None = None,
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
    model: Any, task: dict[str, Any], compile_step: bool | None = None
) -> Callable[[], None]:
    """Run what ``Trainer`` does for a batch: gather, forward, loss, backward, update."""
    x, t = images(task["net"], task["batch"], size=task.get("size"))
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
    size = task["size"]
    if task["contender"] == "portacnn-onnx":
        import portacnn.onnx

        model = portacnn.onnx.load(task["onnx"], device=task["device"])
    else:
        model = portacnn_model(net, task["device"], size)
    home, warm_up = model.backend, None
    if mode == "train":
        run = portacnn_step(model, task)
    elif mode in ("infer", "serve"):
        x = home.asarray(images(net, batch, size=size)[0])

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
        logits = model.predict(images(net, min(batch, 32), size=size)[0])
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
    model = portacnn_model(task["net"], task["device"], task["size"])
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
