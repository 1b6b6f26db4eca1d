"""numba's part: it is imported when it is needed, what it compiles is kept on disk, and its settings stay as they were."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")


def run(program: str, **variables: str) -> str:
    """What the program prints, in a process of its own with these variables of portacnn's and numba's alone."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PORTACNN_", "NUMBA_"))}
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


# --- when it is imported --------------------------------------------------------------------------------------------

TRAIN = """
import sys
import numpy as np
import portacnn
images = np.random.default_rng(0).random((20, 1, 28, 28), dtype=np.float32)
model, labels = portacnn.SimpleConvNet(seed=0, device="numpy"), np.arange(20) % 10
trainer = portacnn.Trainer(model, images, labels, images, labels, epochs=1, mini_batch_size=10, verbose=False)
trainer.train()
model.predict(images[:1])
print([name for name in ("numba", "llvmlite") if name in sys.modules])
"""


def test_importing_portacnn_does_not_import_it():
    program = "import sys, portacnn; portacnn.resolve('numpy'); portacnn.available_backends()"
    assert run(f"{program}; print([n for n in ('numba', 'llvmlite') if n in sys.modules])").strip() == "[]"


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
    assert run(WITHOUT + "import portacnn; print([*portacnn.resolve('numpy').kernels])").strip() == "['native']"


# --- where its machine code is kept ---------------------------------------------------------------------------------

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

assert numba.config.CACHE_DIR == before, numba.config.CACHE_DIR
assert fourfold(3) == 12
print("found", sum(fourfold.stats.cache_hits.values()), "compiled", sum(fourfold.stats.cache_misses.values()))
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    """A program that imports a small module with compiled functions: numba keeps only those that stand in a file."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "small.py").write_text(MODULE)
    return f"import sys; sys.dont_write_bytecode = True; sys.path.insert(0, {str(folder)!r}); import small"


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@needs_numba
def test_it_is_kept_for_the_next_process(module: str, tmp_path: Path):
    kept = tmp_path / "cache"
    assert run(module, PORTACNN_CACHE=str(kept)).strip() == "found 0 compiled 1"
    before = files(kept)
    assert before
    assert all(name.startswith("numba/") for name in before)
    assert run(module, PORTACNN_CACHE=str(kept)).strip() == "found 1 compiled 0"
    assert files(kept) == before
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["small.py"]


@needs_numba
def test_numbas_own_variable_is_heeded(module: str, tmp_path: Path):
    kept, other = tmp_path / "cache", tmp_path / "other"
    variables = {"PORTACNN_CACHE": str(kept), "NUMBA_CACHE_DIR": str(other)}
    for printed in ("found 0 compiled 1", "found 1 compiled 0"):
        assert run(module, **variables).strip() == printed
    assert files(other)
    assert not kept.exists()


@needs_numba
def test_a_folder_that_cannot_be_written_to_is_a_warning(module: str, tmp_path: Path):
    """One for all kernels; nothing is put anywhere else, such as beside the sources."""
    (tmp_path / "file").write_text("")
    for _ in range(2):
        printed = run(module, PORTACNN_CACHE=str(tmp_path / "file" / "cache"))
        assert printed.startswith("found 0")
        assert printed.count("compiled anew in every process") == 1
    assert [path.name for path in (tmp_path / "source").iterdir()] == ["small.py"]
    assert not (tmp_path / "file").is_dir()


@needs_numba
def test_a_change_to_any_of_the_sources_is_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """numba compares only the file that a function stands in, not those whose functions went into it."""
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


KERNELS = """
import numpy as np
from portacnn import ops
from portacnn.backends.numba import conv as jit_conv
x = np.ones((2, 1, 6, 6), "float32")
y, cache = ops.conv2d(x, np.ones((3, 1, 3, 3), "float32"))
ops.conv2d_backward(y, cache)
stats = [function.stats for function in (jit_conv._forward, jit_conv._weights)]
print("found", sum(sum(s.cache_hits.values()) for s in stats), "compiled", sum(sum(s.cache_misses.values()) for s in stats))
"""


@pytest.mark.slow
@needs_numba
def test_the_kernels_are_not_compiled_again(tmp_path: Path):
    kept = tmp_path / "cache"
    assert run(KERNELS, PORTACNN_CACHE=str(kept)).strip() == "found 0 compiled 2"
    before = files(kept)
    assert run(KERNELS, PORTACNN_CACHE=str(kept)).strip() == "found 2 compiled 0"
    assert files(kept) == before
