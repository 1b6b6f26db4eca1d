"""The rules of the house, read off the source: who imports whom, what no file may contain, what an
import pulls in."""

import ast
import graphlib
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from pathlib import Path

import pytest

import portacnn.layers
import portacnn.ops

ROOT = Path(__file__).resolve().parents[1]
HOUSE = ROOT / "portacnn"
BACKENDS = ROOT / "backends"
FILES = sorted(HOUSE.rglob("*.py"))


def of_each(files: Iterable[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """The rule is checked in each of the files, by one test that names all that break it."""
    files = list(files)

    def decorated(rule: Callable[[Path], None]) -> Callable[[], None]:
        @wraps(rule)
        def test() -> None:
            assert files
            broken = []
            for path in files:
                try:
                    rule(path)
                except AssertionError as error:
                    broken.append(f"{path.relative_to(ROOT)}: {error}")
            assert not broken, "\n".join(broken)

        del test.__wrapped__  # pytest would ask it for its arguments
        return test

    return decorated


each_file = of_each(FILES)

ARRAY_LIBRARIES = {
    "numpy",
    "cupy",
    "torch",
    "array_api_strict",
    "array_api_compat",
    "array_api_extra",
    "jax",
    "numba",
}
HOST_SIDE = {
    "detection/centers.py",
    "distributed/nccl.py",  # an engine that is CuPy's
    "init.py",
    "seeds.py",
    "files.py",
    "metrics/boxes.py",
    "metrics/ranking.py",
}  # and everything in HOST_FOLDERS: what works on the host before there is a device
HOST_FOLDERS = ("data", "onnx", "plot", "report", "sklearn", "testing")

# Who may import whom: a module those of its own row and of the rows below. A new one is entered
# here.
ROWS = [
    {"portacnn"},  # the package's own names, such as portacnn.load: put together from everything
    {"__main__"},
    {"cli"},
    {"commands"},
    {"report"},
    {"plot", "sklearn", "testing"},
    {"training", "callbacks", "onnx"},
    {"models", "scratch"},
    {"augment"},
    {"layers", "optim", "schedules", "data", "losses", "metrics", "gradient_check"},
    {"search"},
    {"files", "run_folder"},
    {"detection"},
    {"ops"},
    {"seeds", "init"},
    {"flat", "selection", "distributed"},
    {"runtime"},
    {"device_runtime", "arguments", "console", "errors", "cache", "file_kinds", "text", "version"},
    {"lazy"},
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}


def imports(tree: ast.AST, package: str = "portacnn") -> Iterator[str]:
    """Every module, as a dotted name, that the code under ``tree`` imports; ``from a import b``
    gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            named = (
                node.args
                and isinstance(node.args[0], ast.Constant)
                and isinstance(node.args[0].value, str)
            )
            if called in ("import_module", "__import__") and named:
                yield node.args[0].value


def package_of(path: Path) -> str:
    return ".".join(["portacnn", *path.relative_to(HOUSE).parent.parts])


@cache
def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def when_imported(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements that run when the module is imported: all but the bodies of functions, and
    what only type checkers read."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting.extend(node.orelse)
            continue
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))


def own_row(name: str) -> str:
    """The entry of ROWS that a dotted name belongs to: portacnn.ops.conv -> ops; portacnn.load ->
    portacnn."""
    _, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return (
        first
        if first in ROW or (HOUSE / first).is_dir() or (HOUSE / f"{first}.py").is_file()
        else "portacnn"
    )


def test_there_is_a_house():
    names = {path.relative_to(HOUSE).as_posix() for path in FILES}
    assert {"runtime.py", "ops/conv.py", "layers/base.py", "training/trainer.py"} <= names


def on_host(path: Path) -> bool:
    place = path.relative_to(HOUSE)
    return place.as_posix() in HOST_SIDE or place.parts[0] in HOST_FOLDERS


@of_each(path for path in FILES if not on_host(path))
def test_no_array_library(path: Path):
    place = path.relative_to(HOUSE)
    found = {name for name in imports(read(path)) if name.partition(".")[0] in ARRAY_LIBRARIES}
    assert not found, (
        f"{place} imports {', '.join(sorted(found))}: go through "
        "portacnn.runtime.backend_of(array).xp"
    )


@each_file
def test_no_backend_when_imported(path: Path):
    for node in when_imported(read(path)):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign):
            found = [
                name
                for name in imports(node, package_of(path))
                if name.startswith(("portacnn.backends", "backends"))
            ]
            assert not found, (
                f"line {node.lineno}: {found}; backends are loaded when first asked "
                "for, by runtime.py"
            )


@each_file
def test_imports_point_down(path: Path):
    place = path.relative_to(HOUSE)
    own = place.parts[0].removesuffix(".py").replace("__init__", "portacnn")
    assert own in ROW, f"{place}: enter {own!r} in ROWS, where DESIGN's order puts it"
    for name in imports(read(path), package_of(path)):
        if name.partition(".")[0] != "portacnn" or name.startswith("portacnn.backends"):
            continue
        other = own_row(name)
        assert other in ROW, f"{place} imports {name}: enter {other!r} in ROWS"
        assert ROW[other] >= ROW[own], f"{place} imports {name}, which is above it"


def test_only_tests_and_checks_import_the_examples():
    for path in [*FILES, *BACKENDS.rglob("*.py")]:
        if not path.is_relative_to(HOUSE / "testing"):
            found = imports(read(path), "portacnn")
            assert not [n for n in found if n.startswith("portacnn.testing")], path
    for path in (HOUSE / "testing").rglob("*.py"):
        array_libraries = {n.partition(".")[0] for n in imports(read(path))} & ARRAY_LIBRARIES
        assert array_libraries <= {"numpy"}


@each_file
def test_nothing_that_runs_data(path: Path):
    """No pickle and its like, no eval or exec."""
    tree = read(path)
    found = {name.partition(".")[0] for name in imports(tree)} & {
        "pickle",
        "cPickle",
        "dill",
        "shelve",
        "marshal",
    }
    assert not found, found
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert not [node.func.id for node in calls if node.func.id in ("eval", "exec", "compile")]
    pickled = [
        k.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for k in node.keywords
        if k.arg == "allow_pickle"
    ]
    assert all(isinstance(value, ast.Constant) and value.value is False for value in pickled)


@of_each(
    path
    for path in FILES
    if path.relative_to(HOUSE).parts[0] in ("ops", "layers") and path.name != "dispatch.py"
)
def test_layers_and_ops_do_not_ask_for_a_library(path: Path):
    """No ``if backend.name == ...`` there: that choice lives in the dispatch."""
    place = path.relative_to(HOUSE)
    names = {"numpy", "cupy", "torch", "array_api_strict"}
    for node in ast.walk(read(path)):
        if isinstance(node, ast.Compare):
            for side in ast.walk(node):
                assert not (isinstance(side, ast.Constant) and side.value in names), (
                    f"{place}, line {node.lineno}"
                )


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_importing_portacnn_is_light_and_a_checkout_finds_its_backends():
    """In one process, as each start takes half a second."""
    slow = [
        "cupy",
        "torch",
        "array_api_strict",
        "jax",
        "tqdm",
        "safetensors",
        "matplotlib",
        "scipy",
        "onnx",
    ]
    done = run(
        "-c",
        "import sys, portacnn\n"
        "print(sorted(name for name in sys.modules if name[:5] in ('porta', 'numpy')))\n"
        "portacnn.Trainer, portacnn.SimpleConvNet\n"
        "parts = ('onnx', 'plot', 'scratch', 'sklearn', 'report', 'commands', 'detection')\n"
        f"slow = [*{slow}, 'ssl', 'http', *(f'portacnn.{{part}}' for part in parts)]\n"
        "print([name for name in slow if name in sys.modules])\n"
        "print([name for name in sys.modules if 'backends' in name])\n"
        "import portacnn.backends.numpy.adapter as b; print(b.connect(None))",
    )
    first, *rest = done.stdout.splitlines()
    assert first == "['portacnn', 'portacnn.lazy', 'portacnn.version']", done.stderr
    assert rest == ["[]", "[]", "numpy on cpu"], done.stdout + done.stderr


def test_the_folder_backends_is_no_package_of_that_name():
    done = run("-c", "import backends")
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "import portacnn.backends" in done.stderr
    done = run("-c", "import backends.numpy.adapter")
    assert done.returncode == 1
    assert "import portacnn.backends" in done.stderr


def test_what_is_public_has_a_docstring():
    for module in (portacnn.ops, portacnn.layers):
        for name in module.__all__:
            thing = getattr(module, name)
            own = thing.__dict__.get("__doc__") if isinstance(thing, type) else thing.__doc__
            assert own, f"{module.__name__}.{name}"
            assert own.strip(), f"{module.__name__}.{name}"


def lazy_packages() -> Iterator[tuple[str, ast.If]]:
    """Packages that import their names at first use, with their two lists of them."""
    for path in FILES:
        for node in read(path).body:
            if isinstance(node, ast.If) and "lazily(" in ast.unparse(node.orelse):
                yield package_of(path), node


def test_names_that_are_imported_at_first_use_are_those_that_type_checkers_see():
    found = dict(lazy_packages())
    assert {"portacnn", "portacnn.models", "portacnn.training"} <= found.keys()
    for package, node in found.items():
        table = next(
            each for each in ast.walk(ast.Module(node.orelse, [])) if isinstance(each, ast.Dict)
        )
        lazy = {
            f"{ast.literal_eval(module)}.{name.value}"
            for module, names in zip(table.keys, table.values, strict=True)
            for name in ast.walk(names)
            if isinstance(name, ast.Constant)
        }
        seen = {
            name
            for each in node.body
            for name in imports(each)
            if package != "portacnn" or name.count(".") > 1
        }
        assert lazy == seen, package
        module = importlib.import_module(package)
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module)
        with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
            module.nothing  # noqa: B018


def test_all_is_whole():
    """And sorted: ruff's RUF022 sees to that, with names all in capitals first."""
    for module in (portacnn, portacnn.ops, portacnn.layers):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)


def test_the_wheel_has_every_package():
    """setuptools takes the packages from a list, which is easily forgotten."""
    with (HOUSE.parent / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    there = {package_of(path) for path in HOUSE.rglob("__init__.py")}
    assert sorted(listed) == sorted({*there, *map(backend_package, BACKENDS.rglob("__init__.py"))})


# --- backends -------------------------------------------------------------------------------------

# what a backend may import
FOUNDATION = {"runtime", "device_runtime", "ops", "errors", "arguments", "cache"}
BORROWS = {"numba": {"numpy"}}  # a backend folder that may import another's
SHARED = {path.stem for path in BACKENDS.glob("*.py")} - {"__init__", "strict"}  # threads, steps


def backend_package(path: Path) -> str:
    return ".".join(["portacnn.backends", *path.relative_to(BACKENDS).parent.parts])


@of_each(sorted(BACKENDS.rglob("*.py")))
def test_a_backend_imports_the_foundation_and_its_own_folder(path: Path):
    own = path.relative_to(BACKENDS).parts[0]
    allowed = {own, *BORROWS.get(own, ()), *SHARED}
    for name in imports(read(path), backend_package(path)):
        top, _, rest = name.partition(".")
        if top != "portacnn":
            continue
        first, _, inner = rest.partition(".")
        if first == "backends":
            assert inner.partition(".")[0] in allowed, (
                f"imports {name}: a backend's folder imports no other's"
            )
        else:
            assert first in FOUNDATION, (
                f"imports {name}: backends import {', '.join(sorted(FOUNDATION))} alone"
            )


def test_no_modules_import_each_other_in_a_circle():
    names = {
        ".".join([package_of(path), path.stem]).removesuffix(".__init__"): path for path in FILES
    }
    names |= {
        ".".join([backend_package(path), path.stem]).removesuffix(".__init__"): path
        for path in BACKENDS.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for module, path in names.items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        found = {
            name
            for node in when_imported(read(path))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in imports(node, package)
        }
        graph[module] = {
            other for name in found for other in (name, name.rpartition(".")[0]) if other in names
        }
        # ``from package import module`` reads the package, which a package's own modules may do
        # once it has begun.
        graph[module] -= {module, *(module[:i] for i, c in enumerate(module) if c == ".")}
    assert len(graph) > 80
    with_circle = graphlib.TopologicalSorter(graph)
    with_circle.prepare()  # raises CycleError, which names the circle


def underscored(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The names with one leading underscore that a module makes (functions, classes, variables,
    attributes), and reads."""
    made, used = set[str](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            (used if isinstance(node.ctx, ast.Load) else made).add(name)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.arg):
            made.add(node.arg)
    public = {"_replace", "_asdict", "_fields", "_make"}  # a NamedTuple's
    return tuple(
        {n for n in names - public if n.startswith("_") and not n.startswith("__")}
        for names in (made, used)
    )


def owner_of(path: Path) -> str:
    """The package that a file belongs to, or the backend; a module beside the packages is one of
    its own."""
    kind, own, *_ = path.relative_to(ROOT).parts
    return f"backends/{own}" if kind == "backends" else own.removesuffix(".py")


def test_no_package_reaches_into_another():
    """A name with an underscore is known within its package alone."""
    made: dict[str, set[str]] = {}
    used: dict[str, dict[str, str]] = {}
    for path in [*FILES, *sorted(BACKENDS.rglob("*.py"))]:
        own, read_here = underscored(read(path))
        made.setdefault(owner_of(path), set()).update(own)
        used.setdefault(owner_of(path), {}).update(
            dict.fromkeys(read_here, path.relative_to(ROOT).as_posix())
        )
    assert {"layers", "models", "training", "onnx", "ops", "backends/cupy", "optim"} <= made.keys()
    reached = [
        f"{place} uses {name} of {other}"
        for owner, names in used.items()
        for name, place in names.items()
        if name not in made[owner]
        for other in made
        if name in made[other]
    ]
    assert reached == []
