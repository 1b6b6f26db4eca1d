"""Steps of PyTorch replayed from a CUDA graph (``Trainer(compile_step=True)`` on torch:cuda); a
section of ``gpu_check.py``.
"""

import time
from typing import Any

from gpu.tools import NotHereError, Section, add_root
from gpu.training import random_images, trainer, words_of

add_root()

from portacnn import Model, SimpleConvNet  # noqa: E402
from portacnn.models import DeepConvNet, ResNet20  # noqa: E402
from portacnn.runtime import Backend, resolve  # noqa: E402


def _home(section: Section) -> Backend:
    """Return PyTorch on the section's device, with the same algorithms at each call."""
    try:
        import torch
    except ImportError as error:
        raise NotHereError("PyTorch is not installed") from error
    if not torch.cuda.is_available():
        raise NotHereError(f"PyTorch {torch.__version__} finds no CUDA device")
    torch.backends.cudnn.deterministic = True
    place = section.device.partition(":")[2].removeprefix("cuda:") or "0"
    return resolve(f"torch:cuda:{place if place.isdecimal() else 0}")


def torch_capture(section: Section) -> None:
    """Train with and without ``compile_step``; losses, weights and statistics must be equal bit by
    bit. Time the steps of both.
    """
    home = _home(section)
    epochs, per_epoch, size = (2, 3, 4) if section.quick else (10, 10, 96)
    count = per_epoch * size - size // 2  # the last batch of an epoch is shorter
    small, color = random_images((1, 28, 28), count), random_images((3, 32, 32), count)
    cases: list[tuple[str, type[Model], Any]] = [
        ("simple", SimpleConvNet, small),
        ("deep, dropout", DeepConvNet, small),
        ("resnet20", ResNet20, color),
    ]
    for what, net, sets in cases[:1] if section.quick else cases:
        if not section.room(4.0, what):
            continue
        with section.caught(what):
            runs, times = [], []
            for compiled in (False, True):
                model: Any = net(device=home, seed=0)  # type: ignore[call-arg]
                options = {"optimizer": "adam", "epochs": epochs, "batch_size": size, "seed": 4}
                done = trainer(model, sets, compile_step=compiled, **options)
                with words_of() as (words, _):
                    done.train()
                runs.append(done)
                times.append(_step_ms(done, size))
            eager, replayed = runs
            graphs = replayed.updater.compiled.graphs
            section.expect(1 <= graphs <= 2, f"{what}: {graphs} graphs for two batch shapes")
            section.expect(not words, f"{what}: {'; '.join(words[:3])}")
            same = eager.train_loss_list == replayed.train_loss_list
            section.expect(same, f"{what}: other losses than without a graph")
            before, after = (run.model.state_dict() for run in runs)
            other = [path for path in before if before[path].tobytes() != after[path].tobytes()]
            section.expect(not other, f"{what}: other bits in {', '.join(other[:5])}")
            section.row(
                net=what,
                steps=len(eager.train_loss_list),
                graphs=graphs,
                same_bits=same and not other,
                eager_ms=times[0],
                graph_ms=times[1],
            )


def _step_ms(done: Any, size: int) -> float:
    """Return the milliseconds of a step, of 20 in a row."""
    home = done.backend
    batch = home.xp.arange(size, dtype=home.xp.int64, device=home.device)
    best = float("inf")
    for _ in range(3):
        home.synchronize()
        begun = time.perf_counter()
        for _ in range(20):
            done.run_batch(batch)
        home.synchronize()
        best = min(best, (time.perf_counter() - begun) / 20 * 1e3)
    return best
