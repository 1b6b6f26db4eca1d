"""numba's part: it is imported when it is needed, what it compiles is kept on disk, and its
settings stay as they were."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from support.matrix import needs

ROOT = Path(__file__).resolve().parents[3]


def run(program: str, **variables: str) -> str:
    """What the program prints, in a process of its own with these variables of portacnn's and
    numba's alone."""
    own = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PORTACNN_", "NUMBA_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# --- when it is imported --------------------------------------------------------------------------

TRAIN = """
import sys
import numpy as np
import portacnn
images = np.random.default_rng(0).random((20, 1, 28, 28), dtype=np.float32)
model, labels = portacnn.SimpleConvNet(seed=0, device="numpy"), np.arange(20) % 10
trainer = portacnn.Trainer(model, images, labels, images, labels, epochs=1, mini_batch_size=10,
    verbose=False)
trainer.train()
model.predict(images[:1])
print([name for name in ("numba", "llvmlite") if name in sys.modules])
"""


def test_importing_portacnn_does_not_import_it():
    program = "import sys, portacnn; portacnn.resolve('numpy'); portacnn.available_backends()"
    assert (
        run(f"{program}; print([n for n in ('numba', 'llvmlite') if n in sys.modules])").strip()
        == "[]"
    )


@pytest.mark.parametrize("choice", ["native", "reference"])
def test_training_without_it_does_not_import_it(choice: str):
    assert run(TRAIN, PORTACNN_KERNELS=choice).strip() == "[]"


WITHOUT = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
"""


def test_where_it_is_not_installed_numpys_own_kernels_run():
    assert run(WITHOUT + TRAIN).strip() == "[]"
    assert (
        run(WITHOUT + "import portacnn; print([*portacnn.resolve('numpy').kernels])").strip()
        == "['native']"
    )


# --- where its machine code is kept ---------------------------------------------------------------

MODULE = """
import numba
before = numba.config.CACHE_DIR
from portacnn.backends.numba.compile import compiled

@compiled
def twice(x):
    return x + x

@compiled
def fourfold(x):
    return twice(twice(x))

def main():
    assert numba.config.CACHE_DIR == before, numba.config.CACHE_DIR
    assert fourfold(3) == 12
    print("found", sum(fourfold.stats.cache_hits.values()), "compiled",
        sum(fourfold.stats.cache_misses.values()))
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    """A program that imports a small module with compiled functions: numba keeps only those that
    stand in a file."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "small.py").write_text(MODULE)
    return (
        f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(folder)!r}); import "
        "small; small.main()"
    )


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@needs("numba")
def test_compiled_kernels_are_kept_for_the_next_process(module: str, tmp_path: Path):
    kept = tmp_path / "cache"
    assert run(module, PORTACNN_CACHE=str(kept)).strip() == "found 0 compiled 1"
    before = files(kept)
    assert before
    assert all(name.startswith("numba/") for name in before)
    assert run(module, PORTACNN_CACHE=str(kept)).strip() == "found 1 compiled 0"
    assert files(kept) == before
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["small.py"]


@needs("numba")
def test_numbas_own_variable_is_heeded(module: str, tmp_path: Path):
    kept, other = tmp_path / "cache", tmp_path / "other"
    variables = {"PORTACNN_CACHE": str(kept), "NUMBA_CACHE_DIR": str(other)}
    for printed in ("found 0 compiled 1", "found 1 compiled 0"):
        assert run(module, **variables).strip() == printed
    assert files(other)
    assert not kept.exists()


@needs("numba")
def test_a_folder_that_cannot_be_written_to_is_a_warning(module: str, tmp_path: Path):
    """One for all kernels; nothing is put anywhere else, such as beside the sources."""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        printed = run(module, PORTACNN_CACHE=str(tmp_path / "file" / "cache"))
        assert printed.startswith("found 0")
        assert printed.count("every process compiles them again") == 1
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["small.py"]
    assert not (tmp_path / "file").is_dir()


@needs("numba")
def test_a_change_to_any_of_the_sources_is_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """numba compares only the file that a function stands in, not those whose functions went into
    it."""
    from portacnn.backends.numba import compile as jit

    monkeypatch.setenv("PORTACNN_CACHE", str(tmp_path / "cache"))
    for name in ("compile.py", "tiles.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "compile.py"))
    folders = []
    for text in ("1", "2", "1"):
        (tmp_path / "tiles.py").write_text(text)
        jit._folder.cache_clear()
        folders.append(jit._folder())
    jit._folder.cache_clear()
    assert folders[0] == folders[2] != folders[1]


# --- what is wrong with its files -----------------------------------------------------------------


@pytest.fixture
def compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], tuple[int, int]]]:
    """A function that compiles a kernel as a new process would, in a cache of this test's own, and
    tells how often it was found and compiled.
    """
    from portacnn.backends.numba import compile as jit

    monkeypatch.setenv("PORTACNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(jit, "_warned", False)
    jit._folder.cache_clear()
    (tmp_path / "thrice.py").write_text("def thrice(x):\n    return 3 * x\n")
    spec = spec_from_file_location("thrice", tmp_path / "thrice.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "thrice", module)
    spec.loader.exec_module(module)

    def compiling() -> tuple[int, int]:
        kernel = jit.compiled(module.thrice)
        assert kernel(14) == 42
        return sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values())

    yield compiling
    jit._folder.cache_clear()


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: bytes(range(256)) * 9,
    "zeros": lambda content: bytes(len(content)),
    "one bit": _flip,
}


@needs("numba")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_file_is_a_warning_and_written_anew(
    compiling: Any, tmp_path: Path, caplog: Any, kind: str, damage: str
):
    assert compiling() == (0, 1)
    (path,) = (tmp_path / "cache").rglob(f"*.{kind}")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert compiling() == (0, 1)
    assert [f"{path} is damaged" in message for message in caplog.messages] == [True]
    assert compiling() == (1, 0)


@needs("numba")
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_file_that_cannot_be_read(compiling: Any, tmp_path: Path, caplog: Any, kind: str):
    """Nor written: it is a folder, for every user alike."""
    compiling()
    (path,) = (tmp_path / "cache").rglob(f"*.{kind}")
    path.unlink()
    path.mkdir()
    assert [compiling(), compiling()] == [(0, 1)] * 2
    assert len(caplog.messages) == 1


@needs("numba")
def test_a_full_disk(compiling: Any, tmp_path: Path, caplog: Any):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file may have a byte
    try:
        found = [compiling(), compiling()]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == [(0, 1)] * 2
    assert len(caplog.messages) == 1
    assert not list((tmp_path / "cache").rglob("*.tmp*"))
    assert [compiling(), compiling()] == [(0, 1), (1, 0)]


@needs("numba")
def test_a_folder_that_is_only_to_be_read_is_read(
    compiling: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    """As in a container's image."""
    from portacnn.backends.numba import compile as jit

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("read-only")

    compiling()
    monkeypatch.setattr(jit, "TemporaryFile", refuse)
    jit._folder.cache_clear()
    assert compiling() == (1, 0)
    assert len(caplog.messages) == 1


@needs("numba")
def test_another_kernels_machine_code_is_not_run(compiling: Any, tmp_path: Path):
    """Two processes that save at once may each write the other's file."""
    from portacnn.backends.numba import compile as jit

    compiling()
    kernel = jit.compiled(sys.modules["thrice"].thrice)
    assert kernel(0.5) == 1.5
    one, two = sorted((tmp_path / "cache").rglob("*.nbc"))
    one.write_bytes(two.read_bytes())
    assert compiling() == (0, 1)


@needs("numba")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_compiles(compiling: Any):
    from numba.core.compiler_lock import global_compiler_lock

    held = threading.Event()

    def hold() -> None:
        with global_compiler_lock:
            held.set()
            time.sleep(0.1)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        status = 1
        try:
            status = 0 if compiling() == (0, 1) else 2
        finally:
            os._exit(status)
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
    assert compiling() == (1, 0)


@needs("numba")
def test_the_compiler_runs_where_no_signal_handler_can_interrupt_it(
    compiling: Any, monkeypatch: pytest.MonkeyPatch
):
    from portacnn.backends.numba import compile as jit

    seen = []
    monkeypatch.setattr(jit._Cache, "load_overload", lambda *_: seen.append(threading.get_ident()))
    assert compiling() == (0, 1)
    assert len(seen) == 1
    assert seen[0] != threading.main_thread().ident


KERNELS = """
import numpy as np
from portacnn import ops
from portacnn.backends.numba import panels
x = np.ones((2, 1, 6, 6), "float32")
y, cache = ops.conv2d(x, np.ones((3, 1, 3, 3), "float32"))
ops.conv2d_backward(y, cache)
stats = [function.stats for function in (panels.forward_pieces, panels.weight_pieces)]
print("found", sum(sum(s.cache_hits.values()) for s in stats), "compiled",
    sum(sum(s.cache_misses.values()) for s in stats))
"""


@pytest.mark.slow
@needs("numba")
def test_the_kernels_are_not_compiled_again(tmp_path: Path):
    kept = tmp_path / "cache"
    assert run(KERNELS, PORTACNN_CACHE=str(kept)).strip() == "found 0 compiled 2"
    before = files(kept)
    assert run(KERNELS, PORTACNN_CACHE=str(kept)).strip() == "found 2 compiled 0"
    assert files(kept) == before
