"""The benchmark's networks as ``torch.nn.Module``: twins of portacnn's, with the same parameters in
the same order.

Notation: C channels, H/W input.
"""

from itertools import pairwise
from typing import Any

from bench_nets import CLASSES, PLAIN, Conv, Pool


def torch_net(net: str) -> Any:
    """Return the network as a ``torch.nn.Module``."""
    from torch import nn

    if net in _NETS:
        return _NETS[net]()
    layers: list[Any] = []
    for layer in PLAIN[net]:
        if isinstance(layer, Conv):
            layers += [
                nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.padding),
                nn.ReLU(),
            ]
        elif isinstance(layer, Pool):
            layers.append(nn.MaxPool2d(2))
        else:
            # a second Flatten returns its input
            layers += [nn.Flatten(), nn.Linear(*layer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _resnet20() -> Any:
    """He et al., 2015, section 4.2. A block that changes the shape takes every second pixel and
    pads channels with zeros (option A).
    """
    from torch import nn

    def conv(inputs: int, outputs: int, stride: int) -> Any:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *(conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()),
                *(conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)),
            )
            self.relu = nn.ReLU()
            self.stride, self.more = stride, outputs - inputs

        def forward(self, x: Any) -> Any:
            short = x
            if self.stride != 1 or self.more:
                pads = (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
                short = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], pads)
            return self.relu(self.body(x) + short)

    widths = [16] * 3 + [32] * 3 + [64] * 3
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1]
    blocks = [Block(a, b, s) for a, b, s in zip([16, *widths[:-1]], widths, strides, strict=True)]
    first = (conv(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _alexnet() -> Any:
    """Krizhevsky et al., 2012, with the paper's two groups and its response norm."""
    from torch import nn

    def norm() -> Any:
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    return nn.Sequential(
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4096, 1000)),
    )


def resnet(bottleneck: bool, depths: tuple[int, ...], classes: int) -> Any:
    """He et al., 2015, table 1, with torchvision's names: ResNet18 of basic blocks, ResNet50 of
    bottlenecks."""
    from torch import nn

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Any:
        return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            if bottleneck:
                narrow = outputs // 4
                convs = [conv(inputs, narrow, 1), conv(narrow, narrow, 3, stride)]
                convs.append(conv(narrow, outputs, 1))
            else:
                convs = [conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)]
            for number, each in enumerate(convs, 1):
                setattr(self, f"conv{number}", each)
                setattr(self, f"bn{number}", nn.BatchNorm2d(each.out_channels))
            self.count, self.downsample = len(convs), None
            if inputs != outputs or stride != 1:
                project = conv(inputs, outputs, 1, stride)
                self.downsample = nn.Sequential(project, nn.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            short, y = x if self.downsample is None else self.downsample(x), x
            for number in range(1, self.count + 1):
                y = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(y))
                y = y.relu() if number < self.count else y
            return (y + short).relu()

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
            widths = [64, *(width * (4 if bottleneck else 1) for width in (64, 128, 256, 512))]
            for number, (inputs, outputs) in enumerate(pairwise(widths), 1):
                blocks = [Block(inputs, outputs, 1 if number == 1 else 2)]
                blocks += [Block(outputs, outputs, 1) for _ in range(depths[number - 1] - 1)]
                setattr(self, f"layer{number}", nn.Sequential(*blocks))
            self.fc = nn.Linear(widths[-1], classes)

        def forward(self, x: Any) -> Any:
            x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return ResNet()


def _vgg11() -> Any:
    """Simonyan and Zisserman, 2014, configuration A, with torchvision's mean pool."""
    from torch import nn

    layers: list[Any] = []
    inputs = 3
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for outputs in stage:
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten()),
        *(nn.Linear(25088, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4096, 1000)),
    )


def _mobilenetv2() -> Any:
    """Sandler et al., 2018, table 2, with torchvision's rounding."""
    from torch import nn

    def unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[Any]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]

    class Inverted(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
            super().__init__()
            wide = inputs * expansion
            parts = [] if expansion == 1 else unit(inputs, wide, 1)
            parts += [*unit(wide, wide, 3, stride, wide), *unit(wide, outputs, 1)[:2]]
            self.conv = nn.Sequential(*parts)
            self.shortcut = stride == 1 and inputs == outputs

        def forward(self, x: Any) -> Any:
            return x + self.conv(x) if self.shortcut else self.conv(x)

    blocks, inputs = [], 32
    for expansion, outputs, count, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for index in range(count):
            blocks.append(Inverted(inputs, outputs, stride if index == 0 else 1, expansion))
            inputs = outputs
    return nn.Sequential(
        *(*unit(3, 32, 3, 2), *blocks, *unit(320, 1280, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000)),
    )


def _unet() -> Any:
    """Ronneberger et al., 2015, padded and with batch norm (github.com/milesial/Pytorch-UNet)."""
    import torch
    from torch import nn

    def double(inputs: int, outputs: int) -> Any:
        parts: list[Any] = []
        for before in (inputs, outputs):
            conv = nn.Conv2d(before, outputs, 3, padding=1, bias=False)
            parts += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*parts)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [64, 128, 256, 512, 1024]
            self.inc = double(3, 64)
            self.down = nn.ModuleList(double(a, b) for a, b in pairwise(widths))
            self.up = nn.ModuleList()
            for wide, narrow in pairwise(reversed(widths)):
                self.up.append(nn.ConvTranspose2d(wide, narrow, 2, 2))
                self.up.append(double(wide, narrow))
            self.outc = nn.Conv2d(64, CLASSES["unet"], 1)

        def forward(self, x: Any) -> Any:
            maps = [self.inc(x)]
            for level in self.down:
                maps.append(level(nn.functional.max_pool2d(maps[-1], 2)))
            x = maps.pop()
            for number in range(0, len(self.up), 2):
                x = self.up[number + 1](torch.cat([maps.pop(), self.up[number](x)], 1))
            return self.outc(x)

    return UNet()


_NETS = {
    "resnet20": _resnet20,
    "alexnet": _alexnet,
    "vgg11": _vgg11,
    "resnet18": lambda: resnet(False, (2, 2, 2, 2), CLASSES["resnet18"]),
    "resnet50": lambda: resnet(True, (3, 4, 6, 3), CLASSES["resnet50"]),
    "mobilenetv2": _mobilenetv2,
    "unet": _unet,
}
