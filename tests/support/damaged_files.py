"""Model files of ours, whole and damaged: headers of safetensors, descriptions of networks with
parts exchanged, and bytes."""

import json
import struct
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import portacnn
from portacnn.layers import (
    Arithmetic,
    BatchNorm2d,
    Branches,
    Conv2d,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from portacnn.models import LeNet5, Model
from support.nets import small_net

ODD = (
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    255,
    1 << 16,
    1 << 31,
    1 << 62,
    1 << 70,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "same",
)
MORE_ODD = (
    [],
    {},
    [[]],
    [1],
    [1, 1, 1],
    [1 << 20, 1 << 20],
    "F32",
    "F4",
    "\x1b[2J",
    "x" * 5000,
    {"class": "ReLU", "arguments": {}},
)


def models() -> list[Model]:
    """Networks with most of what a description can have."""
    mixed = Model(
        stem=Sequential(Conv2d(1, 4, 3, padding=1, bias=False), BatchNorm2d(4), ReLU()),
        block=Residual(
            Sequential(conv=Conv2d(4, 4, 3, padding=1)), Conv2d(4, 4, 1), activation=ReLU()
        ),
        forked=Branches(Conv2d(4, 2, 1), MaxPool2d(3, 1, 1)),
        graph=Graph(("a", ReLU(), ["input"]), ("b", Arithmetic("add"), ["a", "input"])),
        drop=Dropout(0.25),
        flat=Flatten(),
        fc=Linear(None, 4),
    ).build((1, 8, 8), seed=0)
    mixed.preprocess = portacnn.Normalize()
    return [small_net(), mixed, LeNet5(seed=0)]


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in JSON: (holder, key)."""
    found, waiting = [], [tree]
    while waiting:
        holder = waiting.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return found


def spoil_tree(tree: Any, random: Random) -> None:
    """Exchange, remove, double or rename parts."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = nodes(tree)
        if not places:
            return
        holder, key = random.choice(places)
        way = random.randrange(6)
        if way == 0:
            del holder[key]
        elif way == 1 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        elif way == 2 and isinstance(holder, dict):
            holder[random.choice(("a", "class", "dtype", "shape", "kernel_size", "x\n"))] = (
                holder.pop(key)
            )
        elif way == 3:
            other, at = random.choice(places)
            holder[key] = json.loads(json.dumps(other[at]))
        elif way == 4 and type(holder[key]) is int:
            holder[key] += random.choice((-1, 1, 7, 1 << 20, 1 << 40))
        elif key == "class" and random.random() < 0.8:
            holder[key] = random.choice(sorted(name for name in Layer.known if "." not in name))
        else:
            holder[key] = deepcopy(random.choice(ODD + MORE_ODD))


def spoilt(content: bytes, random: Random) -> bytes:
    """A file spoilt in its header, its description or its bytes."""
    way = random.randrange(8)
    if way == 0:
        changed = bytearray(content)
        for _ in range(random.randrange(1, 5)):
            changed[
                random.choice(
                    (random.randrange(min(400, len(changed))), random.randrange(len(changed)))
                )
            ] = random.randrange(256)
        return bytes(changed)
    if way == 1:
        return content[: random.randrange(len(content))]
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    described = json.loads(header["__metadata__"]["portacnn"])
    if random.random() < 0.9:  # a checksum that does not hold ends everything
        described.pop("checksum")
    if way < 6:
        spoil_tree(described["model"] if way < 5 else described, random)
    header["__metadata__"]["portacnn"] = json.dumps(described)
    if way >= 6:
        spoil_tree(header, random)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def load(path: Path) -> Model:
    return portacnn.load(path)


def samples() -> tuple[list[bytes], Callable[[Random], bytes]]:
    """Whole files, and a function that returns a damaged one."""
    contents = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models():
            model.save(path := Path(folder) / "whole.safetensors")
            contents.append(path.read_bytes())
    return contents, lambda random: spoilt(random.choice(contents), random)
