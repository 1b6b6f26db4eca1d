"""Training steps on JAX: portacnn's, compiled, beside the same networks written by hand in plain
JAX. To be compared with the section "steps", which has CuPy's captured steps."""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import bench_peers
import bench_portacnn

from gpu.times import _cases, _peer_step
from gpu.tools import NotHereError, Section

BLOCKS = 7
SECONDS = 0.03  # of one block


def jax_steps(section: Section) -> None:
    """Time the steps of each net at each batch size, both ways in turn."""
    # the section shares the GPU's memory with whoever else uses it
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        import jax
    except ImportError as error:
        raise NotHereError("JAX is not installed") from error
    if not any(device.platform == "gpu" for device in jax.local_devices()):
        raise NotHereError(f"JAX {jax.__version__} finds no CUDA device")
    section.figures |= {"jax": jax.__version__}
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for net, batch in _cases(section):
        if net not in bench_peers.OFFERS["jax"]:
            continue
        what = f"{net} at batch {batch}"
        if not section.room(15.0, what):
            continue
        with section.caught(what):
            model = bench_portacnn.portacnn_model(net, "jax:cuda:0")
            runs = {
                "plain": _peer_step("jax", net, batch, "cuda:0"),
                "portacnn": bench_portacnn.portacnn_step(model, {"net": net, "batch": batch}),
            }
            found = _in_turn(runs, model.home.synchronize)
            found["ratio"] = found["portacnn_ms"] / found["plain_ms"]
            rows[net, batch] = {"net": net, "batch": batch, **found}
            section.rows = list(rows.values())
            section.save()


def _in_turn(runs: dict[str, Callable[[], Any]], wait: Callable[[], None]) -> dict[str, float]:
    """Return the median milliseconds of each, by the host's clock, over blocks of calls."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(3):
            run()
        wait()
    for _ in range(BLOCKS):
        for name, run in runs.items():
            count, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < SECONDS or count < 5:
                run()
                count += 1
            wait()
            times[name].append((time.perf_counter() - begun) / count * 1e3)
    return {f"{name}_ms": statistics.median(each) for name, each in times.items()}
