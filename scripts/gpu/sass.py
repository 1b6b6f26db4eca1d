"""Analyze the machine code of the CUDA product kernels: ``python scripts/gpu/sass.py``; see
``--help``. Needs no GPU.

For the main loop of each variant it counts the products (FFMA, DFMA, or HMMA on tensor cores) and
the instructions that access shared memory, read global memory, or compute indices. The fraction of
products limits the fraction of a GPU's arithmetic that a kernel can reach. Registers, spills and
shared memory are those of the whole kernel.

The counts are static: a branch inside the loop counts as taken.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from nvrtc import CompileError, compiled, disassembled, spills, version

ROOT = Path(__file__).resolve().parents[2]
PRODUCT_FILES = ("conv", "linear")  # backends/cupy/*.py whose kernels are products
USUAL: dict[str, dict[str, str | int]] = {
    "forward": {"FORWARD": 1, "POOL": 0, "BY_TAP": 2, "VEC": 4},
    "input": {"INPUT": 1, "FROM": 0, "STRIDED": 0, "BY_TAP": 2, "VEC": 4},
    "weight": {"WEIGHT": 1, "FROM": 0, "VEC": 4},
}
"""The usual defines besides those of the tile: whole steps of channels, and a batch size that is a
multiple of four."""
_KINDS = {
    "product": re.compile(r"[FD]FMA|HMMA"),
    "shared": re.compile(r"LDS|STS"),
    "global": re.compile(r"LDG|STG|LDC|LD\.|ST\."),
    "other": re.compile("."),
}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Counts(NamedTuple):
    """The instructions of a main loop by kind, and the resources of the kernel."""

    product: int
    shared: int
    global_: int
    other: int
    registers: int
    spilled: int
    bytes_shared: int
    seconds: float
    instructions: int  # of the whole kernel

    @property
    def loop(self) -> int:
        return self.product + self.shared + self.global_ + self.other

    @property
    def share(self) -> float:
        """The fraction of products among the loop's instructions."""
        return self.product / self.loop if self.loop else 0.0


def main_loop(sass: str) -> tuple[list[str], int]:
    """Return the opcodes of the loop with most products (of several, the shortest), and the
    kernel's instruction count.
    """
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.search(line):
            opcodes.append(found[1])
            target = _TARGET.search(found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))

    def rank(loop: tuple[int, int]) -> tuple[int, int]:
        return sum(bool(_KINDS["product"].match(code)) for code in opcodes[slice(*loop)]), loop[
            0
        ] - loop[1]

    return opcodes[slice(*max(loops, key=rank))] if loops else [], len(opcodes)


def count(source: str, options: tuple[str, ...], architecture: str) -> Counts:
    """Compile one variant and count its instructions. Raises CompileError."""
    code, log, seconds = compiled(source, options, architecture)
    loop, instructions = main_loop(disassembled(code))
    kinds = dict.fromkeys(_KINDS, 0)
    for opcode in loop:
        kinds[next(kind for kind, pattern in _KINDS.items() if pattern.match(opcode))] += 1
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)), default=0)
    shared = max(map(int, re.findall(r"(\d+) bytes smem", log)), default=0)
    return Counts(*kinds.values(), registers, sum(spills(log)), shared, seconds, instructions)


def variants(words: list[str]) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Yield (name, source file, defines, dtype) of each variant whose name contains all of these
    words.
    """
    sys.path.insert(0, str(ROOT))
    plan = import_module("portacnn.backends.cupy.plan")
    module = import_module("portacnn.backends.cupy.nvrtc")
    names = {tuple(tile.defines.items()): name for name, tile in plan.TILES.items()}
    for place in PRODUCT_FILES:
        for file, defines in import_module(f"portacnn.backends.cupy.{place}").VARIANTS:
            tile = next(
                (name for own, name in names.items() if set(own) <= set(defines.items())), None
            )
            for dtype in module.dtypes(defines):
                rest = [
                    f"{key}={value}"
                    for key, value in defines.items()
                    if key not in plan.TILES["LARGE"].defines
                ]
                name = " ".join([file.removesuffix(".cu"), *rest, tile or "-", dtype])
                if all(f" {word} " in f" {name} " for word in words):
                    yield name, file, defines, dtype


def yields(architecture: str) -> dict[str, dict[str, float]]:
    """Return the fraction of products by kernel and tile, relative to the best tile."""
    sys.path.insert(0, str(ROOT))
    plan, module = (import_module(f"portacnn.backends.cupy.{name}") for name in ("plan", "nvrtc"))
    table = {}
    for kernel, defines in USUAL.items():
        shares = {
            tile: count(
                module.source("conv.cu"),
                module.options("float32", {**defines, **plan.TILES[tile].defines}),
                architecture,
            ).share
            for tile in plan.YIELDS[kernel]
        }
        table[kernel] = {
            tile: round(share / max(shares.values()), 2) for tile, share in shares.items()
        }
    return table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words",
        nargs="*",
        help="only variants with all of these in their name: conv FORWARD=1 LARGE float32",
    )
    parser.add_argument("--arch", default="sm_90", help="default: %(default)s")
    parser.add_argument(
        "--yields",
        action="store_true",
        help="only YIELDS of backends/cupy/plan.py, from the usual variants",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the counts to FILE")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    try:
        if options.yields:
            print(json.dumps(yields(options.arch), indent=4))
            return 0
        chosen = list(variants(options.words))
        if not chosen:
            parser.error(f"no variant has all of {options.words} in its name")
        module = import_module("portacnn.backends.cupy.nvrtc")
        width = max(len(name) for name, *_ in chosen)
        print(f"NVRTC {version()}, {options.arch}")
        heads = (
            "products",
            "loop",
            "share",
            "shared",
            "global",
            "other",
            "registers",
            "spilled",
            "smem",
            "ms",
        )
        print(" ".join([f"{'variant':{width}}", *(f"{head:>9}" for head in heads)]))
        for name, file, defines, dtype in chosen:
            got = count(module.source(file), module.options(dtype, defines), options.arch)
            share, ms = f"{100 * got.share:.0f}%", round(got.seconds * 1000)
            cells = got.product, got.loop, share, got.shared, got.global_, got.other
            cells = *cells, got.registers, got.spilled, got.bytes_shared, ms
            print(" ".join([f"{name:{width}}", *(f"{cell:>9}" for cell in cells)]), flush=True)
            rows[name] = {**got._asdict(), "loop": got.loop, "share": got.share}
    except CompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(
            json.dumps(
                {"nvrtc": version(), "architecture": options.arch, "variants": rows}, indent=1
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
