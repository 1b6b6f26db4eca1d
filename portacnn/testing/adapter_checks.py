"""Checks of an adapter: what ``Backend`` promises, and what portacnn needs of the library's arrays.

Each check is a function of the backend; its docstring's first line says what it asks for.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from inspect import Signature, signature
from threading import Thread
from typing import Any

import numpy as np

from portacnn import ops
from portacnn.ops.dispatch import OPS
from portacnn.runtime import (
    Backend,
    backend_info,
    backend_names,
    backend_of,
    describe,
    dtype_name,
    resolve,
)
from portacnn.seeds import words
from portacnn.testing.arrays import (
    LAYOUTS,
    check_kind,
    check_place,
    dtypes_of,
    laid_out,
    needs_float64,
    read_only,
)
from portacnn.testing.figures import figures_of
from portacnn.testing.report import Check, Fault, NotApplicable
from portacnn.testing.transfers import check_seen

KINDS = ("int64", "int32", "uint8", "bool")
HOST = np.arange(24).reshape(2, 3, 4)


def expect(holds: Any, told: str) -> None:
    """Raise Fault if something does not hold."""
    if not holds:
        raise Fault(told)


def same(got: Any, expected: Any, what: str) -> None:
    """Raise Fault unless two NumPy arrays are equal to the bit, in dtype and shape too."""
    expect(
        got.dtype == expected.dtype and got.shape == expected.shape,
        f"{what}: expected {expected.dtype} {expected.shape}, got {got.dtype} {got.shape}",
    )
    expect(np.array_equal(got, expected), f"{what}: expected {expected}, got {got}")


# --- the registry ---------------------------------------------------------------------------------


def is_resolved(home: Backend) -> None:
    """resolve finds it by its name and its device; a copy is the backend itself."""
    known = ("batch_first", "batch_last")
    expect(home.layout in known, f"layout is {home.layout!r}, expected one of {known}")
    found = resolve(f"{home.name}:{home.place(home.device)}")
    expect(found == home, f"resolve({home.name}:{home.place(home.device)}) is {found}, not {home}")
    make, arguments = home.__reduce__()
    expect(make(*arguments) == home, "what is pickled is another backend")
    expect(deepcopy(home) is home, "deepcopy makes another backend")


def is_listed(home: Backend) -> None:
    """available_backends lists it with its version and its devices."""
    expect(home.name in backend_names(), f"no entry point in portacnn.backends is {home.name}")
    info, place = backend_info(home.name), home.place(home.device)
    expect(info.name == home.name, f"probe() has the name {info.name}, expected {home.name}")
    expect(info.reason is None, f"probe() says that it is not usable: {info.reason}")
    expect(info.version, "probe() has no version")
    expect(place in info.devices, f"probe() does not list the device {place}: {info}")


def finds_arrays(home: Backend) -> None:
    """backend_of finds the backend by an array's type, and messages name its device."""
    array = home.asarray(np.zeros((2, 3), np.float32))
    expect(backend_of(array).name == home.name, f"its arrays belong to {backend_of(array).name}")
    told = f"2x3, {home.name} float32 on {home.place(home.device)}"
    expect(describe(array) == told, f"expected {told!r}, got {describe(array)!r}")
    expect(home.receive(array) is array, "receive() of an own array is not the array itself")


# --- transfers ------------------------------------------------------------------------------------


def asarray_copies(home: Backend) -> None:
    """asarray copies NumPy arrays of any dtype and layout to the device."""
    for kind in (*dtypes_of(home), *KINDS):
        host = HOST.astype(kind)
        array = home.asarray(host)
        expect(array.device == home.device, f"asarray puts {kind} on {array.device}")
        host[...] = 1
        same(home.to_host(array), HOST.astype(kind), f"asarray({kind}), whose source changed later")
    for what, host in {
        "a transposed array": HOST.astype("float32").T,
        "a reversed array": HOST.astype("float32")[:, ::-1],
        "a read-only array": read_only(HOST.astype("float32")),
        "an array without axes": np.asarray(2.5, dtype="float32"),
        "an empty array": np.zeros((0, 3), "float32"),
    }.items():
        same(home.to_host(home.asarray(host)), host.astype("float32"), what)
    for kind in dtypes_of(home):
        array = home.asarray(HOST, kind)
        expect(dtype_name(array) == kind, f"asarray(host, {kind!r}) is {dtype_name(array)}")
        expect(array.dtype == home.dtype(kind), f"dtype({kind!r}) is not the dtype of its arrays")


def has_float64(home: Backend) -> None:
    """float64 arrays, in which gradients are checked."""
    needs_float64(home)


def to_host_copies(home: Backend) -> None:
    """to_host returns a NumPy array of its own, which may be written to."""
    array = home.asarray(HOST.astype("float32"))
    host = home.to_host(array)
    expect(type(host) is np.ndarray, f"to_host returns {type(host).__name__}")
    expect(host.flags.writeable, "what to_host returns is read-only")
    host[...] = 9
    same(home.to_host(array), HOST.astype("float32"), "an array whose copy was written to")
    view = home.xp.permute_dims(array, (2, 0, 1))
    same(
        home.to_host(view), HOST.astype("float32").transpose(2, 0, 1), "to_host of a permuted array"
    )


def shares(home: Backend) -> None:
    """share gives the values of a NumPy array."""
    for host in (HOST.astype("float32"), read_only(HOST.astype("int64").T)):
        array = home.share(host)
        expect(array.device == home.device, f"share puts it on {array.device}")
        same(home.to_host(array), host, "share")


def contiguous(home: Backend) -> None:
    """contiguous keeps values, shape and dtype."""
    for layout in LAYOUTS:
        host = HOST.astype("float32")
        array = home.contiguous(laid_out(home, host, layout))
        same(home.to_host(array), host, f"contiguous of {layout}")
    one = np.asarray(3.0, np.float32)
    same(home.to_host(home.contiguous(home.asarray(one))), one, "contiguous of no axes")


def takes_contexts(home: Backend) -> None:
    """active, elsewhere and synchronize work, also nested."""
    with home.active(), home.active():
        around = home.elsewhere(home.device)
        if around is not None:
            with around:
                home.synchronize()
        home.synchronize()


def transfers_are_seen(home: Backend) -> None:
    """Whether hidden transfers can be seen here: the array class is written in Python."""
    check_seen(home)


# --- arrays ---------------------------------------------------------------------------------------


def written_in_place(home: Backend) -> None:
    """Arrays can be written to: slices, masks by where, in-place operators."""
    xp = home.xp
    host, array = HOST.astype("float32"), home.asarray(HOST.astype("float32"))
    same_array = array
    host[:, 1:, ::2], array[:, 1:, ::2] = 7.0, 7.0
    host[0, ...], array[0, ...] = host[1], array[1, ...]
    host += 1.0
    array += 1.0
    host[1] *= 2.0
    part = array[1, ...]
    part *= 2.0
    if not home.views_alias:
        array[1, ...] = part
    host[...] = np.where(host > 9, host, -host)
    array[...] = xp.where(array > 9, array, -array)
    expect(same_array is array, "an in-place operator makes another array")
    same(home.to_host(array), host, "an array that was written to")


def views(home: Backend) -> None:
    """If views_alias is set, a slice is a view of the array's memory."""
    if not home.views_alias:
        raise NotApplicable("views_alias is not set")
    array = home.asarray(np.zeros(12, np.float32))
    part = home.xp.reshape(array[4:10], (2, 3))
    part[...] = 1.0
    expected = np.zeros(12, np.float32)
    expected[4:10] = 1.0
    same(home.to_host(array), expected, "an array whose slice was written to")


def keeps_dtypes(home: Backend) -> None:
    """float32 stays float32: with Python's numbers, in sums, means and functions."""
    xp = home.xp
    for kind in dtypes_of(home):
        x = home.asarray(HOST, kind)
        for what, got in {
            "x * 2.0": x * 2.0,
            "1 - x": 1 - x,
            "x / 3": x / 3,
            "sum": xp.sum(x),
            "mean": xp.mean(x, axis=0),
            "exp": xp.exp(-x),
            "where(x > 1, x, 0.0)": xp.where(x > 1, x, 0.0),
            "maximum(x, 0.5)": xp.maximum(x, home.asarray(np.asarray(0.5), kind)),
            "zeros": xp.zeros((2,), dtype=x.dtype, device=x.device),
        }.items():
            check_kind(home, got, x, kind, what)


def stays_on_device(home: Backend) -> None:
    """Creation functions take device=, and results stay there."""
    xp, like = home.xp, home.asarray(np.zeros(1, np.float32))
    for name, got in {
        "zeros": xp.zeros((2,), dtype=xp.float32, device=home.device),
        "empty": xp.empty((2,), dtype=xp.float32, device=home.device),
        "full": xp.full((2,), 1.5, dtype=xp.float32, device=home.device),
        "arange": xp.arange(3, dtype=xp.int64, device=home.device),
        "asarray": xp.asarray([1.0, 2.0], dtype=xp.float32, device=home.device),
        "concat": xp.concat([like, like]),
        "astype": xp.astype(like, xp.int32),
    }.items():
        check_place(home, got, like, name)


def kernels_fit(home: Backend) -> None:
    """Each kernel overrides an op, with the signature of the portable one."""
    if not home.kernels:
        raise NotApplicable("it has no kernels")
    for word, table in home.kernels.items():
        for name, kernel in table.items():
            expect(name in OPS, f"kernels[{word!r}] has {name!r}, which is no op")
            op = OPS[name]
            pairs: list[tuple[str, Any, Callable[..., Any] | None]] = [
                ("forward", kernel.forward, op.forward),
                ("backward", kernel.backward, op.portable_backward),
            ]
            for which, own, portable in pairs:
                expect((own is None) == (portable is None), f"{name}: {which} is missing, or extra")
                if own is not None and portable is not None:
                    expected, got = told(portable), told(own)
                    expect(got == expected, f"{name}, {which}: expected {expected}, got {got}")
            if kernel.prepare is not None:
                expected = told(op.forward, without="keep")
                expect(told(kernel.prepare) == expected, f"{name}, prepare: expected {expected}")


def told(function: Callable[..., Any], without: str = "") -> str:
    """Return the parameters of a function, without their annotations."""
    given = signature(function).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in given if p.name != without]
    return str(Signature(plain))


def in_threads(home: Backend) -> None:
    """Two threads may compute at once."""
    host = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype("float32")
    x, weight = home.asarray(host), home.asarray(host[:2, :, :3, :3])
    expected = home.to_host(ops.conv2d(x, weight, keep=False)[0])
    found: list[Any] = []

    def work() -> None:
        try:
            for _ in range(5):
                found.append(home.to_host(ops.conv2d(x, weight, keep=False)[0]))
        except Exception as error:
            found.append(error)

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        expect(not isinstance(result, Exception), f"in a thread: {result}")
        same(result, expected, "a convolution in a thread")


# --- randomness -----------------------------------------------------------------------------------


def same_masks(home: Backend) -> None:
    """Dropout masks are the same to the bit as those of the definition, for any layout."""
    for figure in figures_of("drop"):
        given = figure.arguments()
        expected = figure.results[0] != 0
        for kind in dtypes_of(home):
            for layout in LAYOUTS:
                step, first = (
                    home.asarray(value) if isinstance(value, np.ndarray) else value
                    for value in (given["step"], given["first"])
                )
                x = laid_out(home, given["x"].astype(kind), layout)
                y, _ = OPS["drop"](
                    x, given["p"], given["length"], given["key"], step, first, keep=False
                )
                got = home.to_host(y) != 0
                expect(np.array_equal(got, expected), f"another mask for {kind}, {layout}")


def split_masks(home: Backend) -> None:
    """The parts of a batch get the masks of the whole batch."""
    x = home.asarray(np.ones((6, 2, 5, 3), np.float32))
    whole = home.to_host(ops.dropout(x, 0.4, seed=3, path="a", step=2)[0])
    for first in (1, 4):
        part = ops.dropout(x[first:, ...], 0.4, seed=3, path="a", step=2, first=first)[0]
        same(home.to_host(part), whole[first:], f"the part from sample {first}")
    expect(words(3, "dropout", "a") != words(3, "dropout", "b"), "two paths share a mask")


def same_weights(home: Backend) -> None:
    """The initial weights of a seed are the same to the bit as NumPy's."""
    from portacnn.models import SimpleConvNet

    for kind in dtypes_of(home):
        made = [SimpleConvNet(device=d, dtype=kind, seed=4) for d in (home, resolve("numpy"))]
        states = [model.state_dict() for model in made]
        for path, expected in states[1].items():
            same(states[0][path], expected, path)


GROUPS: dict[str, tuple[Callable[[Backend], None], ...]] = {
    "adapter": (
        *(
            is_resolved,
            is_listed,
            finds_arrays,
            has_float64,
            asarray_copies,
            to_host_copies,
            shares,
        ),
        *(contiguous, takes_contexts, transfers_are_seen, written_in_place, views, keeps_dtypes),
        *(stays_on_device, kernels_fit, in_threads),
    ),
    "randomness": (same_masks, split_masks, same_weights),
}


def adapter_checks(home: Backend, name: str) -> list[Check]:
    """Return the checks of the adapter and of randomness; ``name`` is the backend's."""
    return [
        Check(called, lambda check=check: check(home), f'check_backend("{name}", only="{called}")')  # type: ignore[misc]
        for group, checks in GROUPS.items()
        for check in checks
        for called in [f"{group}: {re.sub('_', ' ', check.__name__)}"]
    ]
