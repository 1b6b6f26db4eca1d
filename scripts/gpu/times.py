"""The peak rates of the GPU, the time of training steps, and the efficiency of kernels: sections of
``gpu_check.py``.

Times are medians over blocks of runs after a warm-up, measured by events on the device and by the
host's clock around the block, including the final wait. "ms" is the longer of the two. Things that
are compared alternate block by block. Products are float32 with TF32 off, in portacnn and in
PyTorch.

Notation: N batch, C in-channels, O out-channels, K taps of the kernel.
"""

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from typing import Any, NamedTuple

import numpy as np

from gpu.tools import Clock, Gpu, NotHereError, Section, add_root, clock_blocks, replaced

add_root()

import bench_nets  # noqa: E402
import bench_peers  # noqa: E402
import bench_portacnn  # noqa: E402

from portacnn import ops  # noqa: E402
from portacnn.backends.cupy import geometry  # noqa: E402
from portacnn.backends.cupy import plan as cupy_plan  # noqa: E402
from portacnn.ops import use_kernels  # noqa: E402
from portacnn.ops.layout import batch_first, batch_last  # noqa: E402
from portacnn.ops.windows import Windows  # noqa: E402
from portacnn.runtime import Backend, Kernel, backend_of  # noqa: E402
from portacnn.testing.examples import arrays_of  # noqa: E402

NETS = ("simple", "lenet", "deep", "resnet20")
BATCHES = (100, 512, 32, 4096)
"""By importance, in case the time runs out."""
WARM_BATCH = 4
TIERS = {"portable": ("reference", False), "kernels": ("auto", False), "captured": ("auto", True)}
"""The kernels, and whether steps are replayed."""


# --- the GPU --------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """The measured peak rates of the GPU: bytes read and written per second, float32 operations per
    second.
    """

    bytes: float
    flops: float


def device(section: Section) -> None:
    """Report versions, the GPU, its peak rates, and the cost of a launch."""
    gpu = Gpu(section.device)
    cp, runtime = gpu.cp, gpu.cp.cuda.runtime
    number = gpu.home.device.id
    told = {"python": platform.python_version(), "numpy": np.__version__, "cupy": cp.__version__}
    told |= {
        "cuda_runtime": runtime.runtimeGetVersion(),
        "driver_takes_cuda": runtime.driverGetVersion(),
    }
    properties = runtime.getDeviceProperties(number)
    told["gpu"] = gpu.name
    told |= {
        "multiprocessors": properties.get("multiProcessorCount"),
        "devices": runtime.getDeviceCount(),
    }
    told["compute_capability"] = f"{properties.get('major')}.{properties.get('minor')}"
    told["L2_MB"] = (properties.get("l2CacheSize") or 0) / 2**20
    for word, attribute in (
        ("SM_MHz_at_most", "cudaDevAttrClockRate"),
        ("memory_MHz", "cudaDevAttrMemoryClockRate"),
    ):
        with suppress(Exception):  # CUDA 13 no longer reports all attributes
            told[word] = runtime.deviceGetAttribute(getattr(runtime, attribute), number) / 1000
    free, total = runtime.memGetInfo()
    told |= {"memory_GB": total / 1e9, "free_GB": free / 1e9}
    section.figures |= told
    section.figures["now"] = _smi()
    with section.caught("ceilings"):
        reached = ceilings(gpu, quick=section.quick)
        section.figures |= {
            "copy_GB_per_s": reached.bytes / 1e9,
            "fp32_TFLOP_per_s": reached.flops / 1e12,
        }
        gpu.forget()
    section.figures["under_load"] = _smi()
    with section.caught("launches"):
        section.figures |= launches(gpu, 5 if section.quick else 200)


def _smi() -> str | None:
    """Return driver, clocks, power and temperature from nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    return None


def ceilings(gpu: Gpu, *, quick: bool) -> Ceilings:
    """Measure a copy of 1 GiB, and a cuBLAS product of 4096 x 4096 float32 matrices with TF32 off:
    the best of several.
    """
    cp = gpu.cp
    count, n = (1 << 12, 64) if quick else (1 << 28, 4096)
    rng = np.random.default_rng(0)
    part = cp.asarray(rng.standard_normal(min(count, 1 << 22), dtype=np.float32))
    source, target = cp.tile(part, count // part.size), cp.empty(count, dtype="float32")
    a, b = (cp.asarray(rng.standard_normal((n, n), dtype=np.float32)) for _ in range(2))
    out = cp.empty((n, n), dtype="float32")
    work = {"copy": lambda: cp.copyto(target, source), "gemm": lambda: cp.matmul(a, b, out=out)}
    times = clock_blocks(gpu.clock, work, block=0.001 if quick else 0.05, blocks=3 if quick else 9)
    best = {name: min(time.device) / 1e3 for name, time in times.items()}
    return Ceilings(2 * 4 * count / best["copy"], 2 * n**3 / best["gemm"])


def launches(gpu: Gpu, count: int) -> dict[str, float]:
    """Measure microseconds per launch: of single kernels from Python, of one among many in a graph,
    and of a whole graph.
    """
    cp = gpu.cp
    x = cp.ones(32, dtype="float32")

    def touch() -> None:
        cp.negative(x, out=x)

    def many() -> None:
        for _ in range(count):
            touch()

    found = {"launch_us": 1e3 * _median(gpu.clock, many) / count}
    found["graph_of_one_us"] = 1e3 * Recorded(gpu, touch, 1).ms(gpu.clock)
    found["launch_in_graph_us"] = 1e3 * Recorded(gpu, touch, count).ms(gpu.clock) / count
    return found


def _median(clock: Clock, run: Callable[[], Any]) -> float:
    return clock_blocks(clock, {"": run}, block=0.01, blocks=5)[""].ms


class Recorded:
    """A graph with ``times`` calls of ``run``, its stream and its memory pool. ``run`` is called
    once before the recording.
    """

    def __init__(self, gpu: Gpu, run: Callable[[], Any], times: int) -> None:
        cuda = gpu.cp.cuda
        self.stream, self.pool = cuda.Stream(non_blocking=True), cuda.MemoryPool()
        gpu.home.synchronize()
        with self.stream, cuda.using_allocator(self.pool.malloc):
            for _ in range(min(times, 3)):
                run()
            self.stream.synchronize()
            self.stream.begin_capture()
            try:
                for _ in range(times):
                    run()
            finally:
                self.graph = self.stream.end_capture()

    def ms(self, clock: Clock) -> float:
        """Return the time of one launch of the whole graph."""
        with self.stream:
            return _median(clock, self.graph.launch)


# --- training steps -------------------------------------------------------------------------------


def _cases(section: Section) -> list[tuple[str, int]]:
    if section.quick:
        return [("simple", 4)]
    return [(net, batch) for batch in BATCHES for net in NETS]


def steps(section: Section) -> None:
    """Time a training step of each net at each batch size: with kernels and graph, then with
    portable ops.

    One step of each net runs first, so that all compilation is done before the timing.
    """
    gpu = Gpu(section.device)
    cases = _cases(section)
    rows: dict[tuple[str, int], dict[str, Any]] = {
        case: dict(zip(("net", "batch"), case, strict=True)) for case in cases
    }
    for tiers in (("kernels", "captured"), ("portable",)):
        begun = section.left
        for net in dict.fromkeys(net for net, _ in cases):
            with section.caught(f"{net}, warm-up"):
                _step(gpu, net, WARM_BATCH, TIERS[tiers[0]][0], False, 1)
        section.figures[f"warm_up_s_{tiers[0]}"] = begun - section.left
        for place, case in enumerate(cases):
            if not section.room(1.5, f"{case[0]} at batch {case[1]}, {' and '.join(tiers)}"):
                continue
            share = max(section.left, 0.0) / (
                len(cases) - place + (len(cases) if tiers[0] == "kernels" else 0)
            )
            with section.caught(f"{case[0]} at batch {case[1]}"):
                rows[case] |= _timed(section, gpu, case, tiers, share)
                section.rows = [row for row in rows.values() if len(row) > 2]
                section.save()
            gpu.forget()


def _timed(
    section: Section, gpu: Gpu, case: tuple[str, int], tiers: tuple[str, ...], share: float
) -> dict[str, Any]:
    """Return the milliseconds of a step by tier, and their spread."""
    net, batch = case
    runs: dict[str, Callable[[], None]] = {}
    for tier in tiers:
        with section.caught(f"{net} at batch {batch}, {tier}"):
            runs[tier] = _step(gpu, net, batch, *TIERS[tier])
    times = clock_blocks(
        gpu.clock, runs, block=min(0.04, share / 60), blocks=3 if section.quick else 7
    )
    found: dict[str, Any] = {f"{tier}_ms": time.ms for tier, time in times.items()}
    if "portable" not in times and times:
        found["host_clock_over_events"] = max(
            sorted(time.wall)[len(time.wall) // 2]
            / max(sorted(time.device)[len(time.device) // 2], 1e-9)
            for time in times.values()
        )
        found["spread"] = max(time.spread for time in times.values())
    return found


def _step(
    gpu: Gpu, net: str, batch: int, kernels: str, replayed: bool, warm: int = 3
) -> Callable[[], None]:
    """Return a warmed-up Trainer step (compiled, recorded) with the tier's kernels."""
    model = bench_portacnn.portacnn_model(net, gpu.home)
    step = bench_portacnn.portacnn_step(model, {"net": net, "batch": batch}, replayed)

    def run() -> None:
        with use_kernels(kernels):
            step()

    for _ in range(warm):
        run()
    gpu.home.synchronize()
    return run


def torch_steps(section: Section) -> None:
    """Time the same steps in PyTorch for CUDA, if installed; ``torch.compile`` last, because
    compilation is slow.
    """
    try:
        import torch
    except ImportError as error:
        raise NotHereError("PyTorch is not installed") from error
    if not torch.cuda.is_available():
        raise NotHereError(f"PyTorch {torch.__version__} finds no CUDA device")
    section.figures |= {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    place = section.device.partition(":")[2].removeprefix("cuda:") or "0"
    words = f"cuda:{place if place.isdecimal() else 0}"
    clock = Clock(_torch_event(torch), lambda a, b: a.elapsed_time(b), torch.cuda.synchronize)
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for kind, name in (("eager", "torch"), ("graph", "torch-graph"), ("compiled", "torch-compile")):
        for net, batch in _cases(section):
            what = f"{net} at batch {batch}, {kind}"
            if not section.room(20.0 if kind == "compiled" else 2.0, what):
                continue
            with section.caught(what):
                run = _peer_step(name, net, batch, words)
                time = clock_blocks(clock, {kind: run}, block=0.03, blocks=7)[kind]
                rows.setdefault((net, batch), {"net": net, "batch": batch})[f"{kind}_ms"] = time.ms
                section.rows = list(rows.values())
                section.save()
            torch.cuda.empty_cache()
    allowed = {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }
    section.figures["TF32"] = allowed
    section.expect(not any(allowed.values()), f"PyTorch may use TF32, portacnn does not: {allowed}")


def _torch_event(torch: Any) -> Callable[[], Any]:
    def event() -> Any:
        made = torch.cuda.Event(enable_timing=True)
        made.record()
        return made

    return event


def _peer_step(name: str, net: str, batch: int, place: str) -> Callable[[], None]:
    peer = bench_peers.make(name, net, place)
    x, t = map(peer.put, bench_nets.images(net, batch))
    peer.begin(training=True)
    for _ in range(5):
        peer.step(x, t)
    peer.synchronize()
    return lambda: peer.step(x, t)


# --- kernels against the GPU's ceilings -----------------------------------------------------------


class Call(NamedTuple):
    """A kernel call as made by a net, with copied arrays."""

    kernel: Kernel
    args: tuple
    options: dict[str, Any]


def rates(section: Section) -> None:
    """Report for each kernel as called by the nets: the time at the GPU's peak rates divided by the
    measured time.
    """
    gpu = Gpu(section.device)
    reached = ceilings(gpu, quick=section.quick)
    gpu.forget()
    section.figures |= {
        "copy_GB_per_s": reached.bytes / 1e9,
        "fp32_TFLOP_per_s": reached.flops / 1e12,
    }
    calls: dict[tuple[Any, ...], tuple[str, Call]] = {}
    for net, batch in (
        [("simple", 4)] if section.quick else [(net, batch) for batch in (512, 100) for net in NETS]
    ):
        with section.caught(f"{net} at batch {batch}"):
            for key, call in observed(gpu.home, net, batch).items():
                calls.setdefault(key, (f"{net} {batch}", call))
    for key, (where, call) in calls.items():
        name = key[0]
        if not section.room(0.3, f"{name} {key[1]} ({where})"):
            continue
        with section.caught(f"{name} of {where}"):
            for direction, run, work in _directions(name, call):
                ms, how = _replayed_ms(gpu, run, section.quick)
                floor = max(work["bytes"] / reached.bytes, work["flops"] / reached.flops)
                figures = {
                    "us": 1e3 * ms,
                    "GB_per_s": work["bytes"] / ms / 1e6,
                    "TFLOP_per_s": work["flops"] / ms / 1e9,
                }
                share = {
                    "of_ceiling": 1e3 * floor / ms,
                    "bound_by": _bound(work, reached),
                    "timed": how,
                }
                section.row(
                    kernel=name, pass_=direction, where=where, sizes=key[1], **figures, **share
                )
        gpu.forget()


def _bound(work: dict[str, float], reached: Ceilings) -> str:
    return (
        "memory" if work["bytes"] / reached.bytes >= work["flops"] / reached.flops else "arithmetic"
    )


def observed(home: Backend, net: str, batch: int) -> dict[tuple[Any, ...], Call]:
    """Return the kernel calls of one training step, once per shape: (name, sizes, more) -> call."""
    found: dict[tuple[Any, ...], Call] = {}
    model = bench_portacnn.portacnn_model(net, home)
    step = bench_portacnn.portacnn_step(model, {"net": net, "batch": batch})
    step()  # creates what is created only once
    table: Any = backend_of(home.asarray(np.zeros(1))).kernels[
        "native"
    ]  # the table used by the dispatch
    before = dict(table)

    def watched(name: str, kernel: Kernel) -> Kernel:
        def forward(*args: Any, **options: Any) -> Any:
            sizes = " ".join(
                "x".join(map(str, array.shape)) or "1" for array in arrays_of(list(args))
            )
            key = (
                name,
                sizes[:60],
                sizes,
                repr([a for a in args if not hasattr(a, "shape") and not isinstance(a, list)]),
            )
            if key not in found:
                found[key] = Call(kernel, _copies(args), _copies(options))
            return kernel.forward(*args, **options)

        return kernel._replace(forward=forward)

    try:
        for name, kernel in before.items():
            table[name] = watched(name, kernel)
        step()
    finally:
        table.clear()
        table.update(before)
    return found


def _copies(value: Any) -> Any:
    """Copy the arrays, keeping their memory order: those of a step lie in memory that is reused."""
    if isinstance(value, dict):
        return {name: _copies(item) for name, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_copies(item) for item in value)
    return value.copy(order="K") if hasattr(value, "shape") else value


def _directions(name: str, call: Call) -> list[tuple[str, Callable[[], Any], dict[str, float]]]:
    """Return forward and backward (if any): the function to run, its operations and the least
    bytes.
    """
    inputs = list(arrays_of(list(call.args)))
    result = call.kernel.forward(*call.args, **call.options)
    if result is NotImplemented:
        return []
    flops = _flops(name, call, result)
    if call.kernel.backward is None:
        written = list(arrays_of([result])) or inputs  # an update writes to its arguments
        work = {"flops": flops, "bytes": _bytes(inputs) + _bytes(written)}
        return [("both", lambda: call.kernel.forward(*call.args, **call.options), work)]
    y, saved = result
    found = [
        (
            "forward",
            lambda: call.kernel.forward(*call.args, **call.options),
            {"flops": flops, "bytes": _bytes([*inputs, y])},
        )
    ]
    if saved is not None:
        backward: Any = call.kernel.backward
        dy: Any = 1.0 if y.ndim == 0 else y.copy(order="K")
        gradients = backward(dy, saved)
        read = inputs if flops or "norm" in name else []
        work = {"flops": 2 * flops, "bytes": _bytes([*read, *arrays_of([gradients, dy])])}
        found.append(("backward", lambda: backward(dy, saved), work))
    return found


def _bytes(arrays: list[Any]) -> int:
    return sum(array.nbytes for array in arrays)


def _flops(name: str, call: Call, result: Any) -> float:
    """Return the multiplications and additions of a product; 0 for kernels limited by memory."""
    if name.startswith("linear"):
        x, weight = call.args[:2]
        return 2.0 * x.shape[0] * weight.size
    if name in ("conv", "conv_relu", "conv_transpose"):
        x, weight, _, windows = call.args[:4]
        # weight (O, C/G, *K) per output cell; (C, O/G, *K) per input cell of the transposed one
        return 2.0 * x.shape[0] * prod(windows.out) * weight.size
    return 0.0


def _replayed_ms(gpu: Gpu, run: Callable[[], Any], quick: bool) -> tuple[float, str]:
    """Return the time of one of many runs in a graph, without launch overhead; without a graph if
    it cannot be recorded.
    """
    times = 2 if quick else 20
    try:
        recorded = Recorded(gpu, run, times)
    except Exception as error:
        gpu.home.synchronize()
        return _median(gpu.clock, run), f"eager, as {type(error).__name__}"
    return recorded.ms(gpu.clock) / times, "graph"


# --- tiles ----------------------------------------------------------------------------------------


def yields(section: Section) -> None:
    """Measure each tile on a large convolution that it covers exactly, relative to the best tile,
    for the table in the plan.

    ``gpu/plan.py`` writes the figures into the plan.
    """
    gpu = Gpu(section.device)
    found: dict[str, dict[str, float]] = {}
    for kernel, tiles in list(cupy_plan.YIELDS.items()):
        if not section.room(1.0, kernel):
            continue
        with section.caught(kernel):
            begin, flops = _product(gpu, kernel, section.quick)
            times = 2 if section.quick else 5
            recorded = {}
            for name in tiles:
                with section.caught(f"{kernel} with {name}"), _only(kernel, name):
                    recorded[name] = Recorded(gpu, begin(), times)
            ms = {name: graph.ms(gpu.clock) / times for name, graph in recorded.items()}
            best = min(ms.values())
            found[kernel] = {name: round(best / each, 3) for name, each in ms.items()}
            for name, each in ms.items():
                section.row(
                    kernel=kernel,
                    tile=name,
                    ms=each,
                    TFLOP_per_s=flops / each / 1e9,
                    of_best=best / each,
                )
            section.figures |= {"yields": found, "gpu": gpu.name}
        gpu.forget()


@contextmanager
def _only(kernel: str, name: str) -> Iterator[None]:
    """Make the plan use a single tile for this kernel inside a ``with`` block."""
    geometry.plan_of.cache_clear()
    try:
        with replaced(cupy_plan, "YIELDS", {**cupy_plan.YIELDS, kernel: {name: 1.0}}):
            yield
    finally:
        geometry.plan_of.cache_clear()


def _product(gpu: Gpu, kernel: str, quick: bool) -> tuple[Callable[[], Callable[[], Any]], float]:
    """Prepare the product of a 3x3 convolution with 128 rows and more columns than any GPU
    processes at once.

    Returns:
        A function that returns the run with the current plan, and the operations of a run.
    """
    home, rng = gpu.home, np.random.default_rng(0)
    n, side, many, few = (2, 4, 8, 4) if quick else (128, 32, 128, 64)
    windows = Windows.of((side, side), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))

    def draw(*shape: int) -> Any:
        drawn = home.asarray(rng.standard_normal(shape, dtype=np.float32))
        return batch_first(home.contiguous(batch_last(drawn)))

    x, dy = draw(n, few, side, side), draw(n, many, side, side)
    weight = home.asarray(rng.standard_normal((many, few, 3, 3), dtype=np.float32))
    conv, transposed = (home.kernels["native"][name] for name in ("conv", "conv_transpose"))
    backward: Any = conv.backward
    turned = home.contiguous(home.xp.permute_dims(weight, (1, 0, 2, 3)))

    def begin() -> Callable[[], Any]:
        if kernel == "forward":
            return lambda: conv.forward(x, weight, None, windows, 1, keep=False)
        if kernel == "input":  # a transposed convolution is an input gradient
            return lambda: transposed.forward(x, turned, None, windows, 1, keep=False)
        _, saved = conv.forward(x, weight, None, windows, 1, keep=True)
        return lambda: backward(dy, saved, need_dx=False)

    return begin, 2.0 * n * side**2 * many * few * 9


# --- layouts --------------------------------------------------------------------------------------


def layouts(section: Section) -> None:
    """Time ops on batch-last and batch-first inputs, portable and with kernels."""
    gpu = Gpu(section.device)
    home, rng = gpu.home, np.random.default_rng(0)
    n = 4 if section.quick else 512
    x = home.asarray(
        rng.standard_normal((n, 16, 14 if section.quick else 28, 28), dtype=np.float32)
    )
    last = batch_first(home.contiguous(batch_last(x)))
    weight, bias = (
        home.asarray(rng.standard_normal(s, dtype=np.float32)) for s in ((32, 16, 3, 3), (32,))
    )
    ones = home.asarray(np.ones(16, np.float32))
    work: dict[str, Callable[[Any], Any]] = {
        "conv 16 to 32, 3x3": lambda x: ops.conv2d(x, weight, bias, padding=1),
        "conv and its backward": lambda x: _conv_backward(x, weight, bias),
        "max pool 2x2": lambda x: ops.max_pool2d(x, 2),
        "relu": lambda x: ops.relu(x),
        "batch norm": lambda x: ops.batch_norm(x, None, None, ones, ones, training=True),
    }
    for name, run in work.items():
        for kernels in ("reference", "auto"):
            if not section.room(0.5, f"{name}, {kernels}"):
                continue
            with section.caught(f"{name}, {kernels}"), use_kernels(kernels):
                runs = {"last": lambda run=run: run(last), "first": lambda run=run: run(x)}
                for once in runs.values():
                    once()  # compile before the timing
                times = clock_blocks(gpu.clock, runs, block=0.02, blocks=3 if section.quick else 7)
                ms = {f"batch_{which}_ms": time.ms for which, time in times.items()}
                section.row(
                    op=name,
                    kernels=kernels,
                    **ms,
                    last_over_first=times["last"].ms / times["first"].ms,
                )


def _conv_backward(x: Any, weight: Any, bias: Any) -> Any:
    y, kept = ops.conv2d(x, weight, bias, padding=1)
    return ops.conv2d_backward(y, kept)
