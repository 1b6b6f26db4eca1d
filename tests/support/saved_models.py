"""Models to save, and the headers of their files."""

import json
import struct

from portacnn.layers import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)
from portacnn.models import Model


def own():
    return Model(
        stem=Sequential(Conv2d(1, 3, (3, 2), padding=((1, 0), (0, 1)), bias=False), act=Sigmoid()),
        pool=MaxPool2d(2, ceil_mode=True),
        mean=AvgPool2d((2, 1), stride=1),
        relu=ReLU(),
        flatten=Flatten(),
        fc=Linear(None, 4, weight_init="xavier", bias_init=0.5),
    )


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]
