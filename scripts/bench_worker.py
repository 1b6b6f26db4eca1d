"""One measurement in its own process, for ``bench.py``: the task as JSON on the command line, the
result as JSON on stdout.

Imports, measures the memory, builds, warms up, times. For a peer in another interpreter this needs
NumPy and the peer, but not portacnn.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import bench_peers
import numpy as np
from bench_machine import about, machine, memory, reset_peak
from bench_nets import epoch_sets, images
from bench_portacnn import portacnn_subject, profile
from bench_timing import Subject, served, timed, times_in_ms

PORTACNN = ("portacnn", "portacnn-onnx")


def main(task: dict[str, Any]) -> dict[str, Any]:
    """Do the task. If the contender is unavailable, the result has the reason under
    "unavailable".
    """
    if task["what"] == "machine":
        return machine()
    try:
        if task["what"] == "export":
            import bench_torch

            bench_torch.export(task["net"], task["size"], Path(task["onnx"]))
            return {}
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
    own = task["contender"] in PORTACNN
    subject = portacnn_subject(task) if own else peer_subject(task)
    if task["mode"] == "serve":
        one, times = served(subject, task["seconds"])
        scaling = statistics.median(a / b for a, b in zip(one, times, strict=True))
        extra = {"one_thread_ms": 1e3 * statistics.median(one), "scaling": scaling}
    else:
        times, extra = timed(subject, task["seconds"]), {}
    after = memory()
    subject.check()
    device = subject.device_bytes()
    return {
        **times_in_ms(times),
        **extra,
        "peak_mib": (after[1] - before[0]) / 2**20 if before and after else None,
        "device_peak_mib": None if device is None else device / 2**20,
        "parameters": subject.parameters,
        "where": subject.where,
        **about(task),
    }


def load(task: dict[str, Any]) -> None:
    """Import what the contender needs, and initialize its device."""
    if task["contender"] in PORTACNN:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        import portacnn

        home = portacnn.resolve(task["device"])
        if task["precision"] not in home.precisions:
            raise OSError(
                f"{home} does not support {task['precision']}, only {', '.join(home.precisions)}"
            )
        one = home.xp.ones((1,), dtype=home.xp.float32, device=home.device)
        portacnn.ops.relu(one)  # the first op imports the kernels
    elif task["contender"] in bench_peers.TORCH:
        import bench_torch
        import torch

        bench_torch.Torch.load()
        try:
            torch.zeros(1, device=task["device"] or "cpu")
        except (RuntimeError, AssertionError) as error:
            raise OSError(str(error)) from error
    elif task["contender"] != "tutorials":
        __import__(task["contender"])


def peer_subject(task: dict[str, Any]) -> Subject:
    net, batch, mode = task["net"], task["batch"], task["mode"]
    peer = bench_peers.make(task["contender"], net, task["device"], task["onnx"])
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
    host_x, host_t = images(net, batch, size=task["size"])
    x, t = peer.put(host_x), peer.put(host_t)
    peer.begin(training=mode == "train")
    last: list[Any] = [None]  # the last loss or logits

    def run() -> None:
        last[0] = peer.step(x, t) if mode == "train" else peer.predict(x)

    def check() -> None:
        if not np.isfinite(np.asarray(last[0].cpu() if hasattr(last[0], "cpu") else last[0])).all():
            raise ArithmeticError("its results are not finite")

    return Subject(run, peer.synchronize, check=check, **shared)


if __name__ == "__main__":
    print("\n" + json.dumps(main(json.loads(sys.argv[1]))))
