"""The JAX adapter: CPU, GPUs and TPUs. Its arrays hold JAX's immutable ones (see ``arrays``)."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from portacnn.backends.immutable import ImmutableBackend
from portacnn.cache import cache_folder
from portacnn.errors import BackendError
from portacnn.runtime import Array, Backend, BackendInfo, HostArray, backend_of

KINDS = frozenset({"cpu", "cuda", "tpu", "rocm"})
_REMEDY = 'JAX is not installed: pip install "portacnn[jax]" (for a GPU: "jax[cuda13]")'
_PLATFORMS = {"gpu": "cuda"}
_INSTALL = '; JAX for a GPU is another package: pip install "jax[cuda13]"'
REFUSED = {
    "Tracer": "ops and models cannot be called inside jax.jit, jax.grad or jax.vmap; call them "
    "outside, where portacnn compiles what it computes",
}


class JaxBackend(ImmutableBackend):
    """JAX arrays on one device, computed by programs that XLA compiles."""

    compiles = True

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("float32",) if self.device.platform == "cpu" else ("float32", "tf32", "bfloat16")

    def place(self, device: Any) -> str:
        return _word(device)

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        import numpy as np

        native = self.dtype(dtype) if dtype else np.asarray(host).dtype.newbyteorder("=")
        # a copy, because JAX may share a NumPy array's memory
        source = np.array(host, dtype=native, order="C")
        return self.xp.asarray(source, device=self.device)

    def is_own(self, value: Any) -> bool:
        import jax

        return isinstance(value, jax.Array)

    def receive(self, array: Any) -> Array:
        if self.is_own(array):
            backend_of(array)  # refuses tracers
        return super().receive(array)

    def to_host(self, array: Array) -> HostArray:
        import numpy as np

        return np.array(getattr(array, "held", array))

    def synchronize(self) -> None:
        import jax

        for array in jax.live_arrays():
            array.block_until_ready()

    def run(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        from portacnn.backends.jax.compiled import run

        return run(function, *args, **options)

    def is_out_of_memory(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

    def compile_step(
        self, step: Callable[..., Any], example: tuple[Any, ...]
    ) -> Callable[..., Any]:
        from portacnn.backends.jax.compiled import Compiled

        return Compiled(step, self, "a training step")

    def compile_pass(self, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        from portacnn.backends.jax.compiled import Compiled

        return Compiled(function, self, "a forward pass")


def probe() -> BackendInfo:
    try:
        import jax
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "jax"
        return BackendInfo(
            "jax", None, (), _REMEDY if missing else f"JAX is installed but does not load: {error}"
        )
    if not hasattr(jax, "enable_x64"):
        return BackendInfo(
            "jax", jax.__version__, (), f"JAX {jax.__version__} is too old: pip install -U jax"
        )
    try:
        devices = _devices()
    except RuntimeError as error:
        return BackendInfo("jax", jax.__version__, (), f"JAX finds no device: {error}")
    return BackendInfo("jax", jax.__version__, tuple(devices))


def connect(device: str | None) -> Backend:
    info = probe()
    if info.reason:
        raise BackendError(info.reason)
    _keep_programs()
    from portacnn.backends.jax.arrays import JaxArray
    from portacnn.backends.jax.kernels import KERNELS

    devices = _devices()
    word = next(iter(devices)) if device is None else device
    word = word if ":" in word else f"{word}:0"
    word = "cpu" if word == "cpu:0" else word
    if word not in devices:
        missing = KINDS - {name.partition(":")[0] for name in devices}
        fix = _INSTALL if word.partition(":")[0] in missing else ""
        raise BackendError(
            f"expected one of JAX's devices {', '.join(devices)}, got {device!r}{fix}"
        )
    return JaxBackend(
        name="jax",
        xp=JaxArray.xp,
        device=devices[word],
        layout="batch_first",
        kernels={"native": KERNELS},
    )


def _keep_programs() -> None:
    """Let XLA keep the programs that took long to compile in the user's cache folder, unless the
    user has chosen a folder (``JAX_COMPILATION_CACHE_DIR``)."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        with suppress(FileNotFoundError):  # a user without a home folder
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))


def _devices() -> dict[str, Any]:
    """Return the devices by name, the fastest first: "cuda:0", "cpu"."""
    import jax

    found = list(jax.local_devices())
    if all(device.platform != "cpu" for device in found):
        found += jax.local_devices(backend="cpu")[:1]
    return {_word(device): device for device in found}


def _word(device: Any) -> str:
    kind = _PLATFORMS.get(device.platform, device.platform)
    if kind == "cpu" and device.id == 0:
        return "cpu"
    return f"{kind}:{device.id}"
