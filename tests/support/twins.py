"""PyTorch's versions of containers and models, written with torch.nn alone: the oracles of their
tests.

Structure and keys of ResNet and VGG are torchvision's. Import this within tests
that need torch.
"""

from collections import OrderedDict

import torch
from torch import nn

# The connections of LeNet-5's C3, as printed in table I of LeCun et al., 1998: rows are maps of S2,
# columns those of C3.
TABLE_I = """
X . . . X X X . . X X X X . X X
X X . . . X X X . . X X X X . X
X X X . . . X X X . . X . X X X
. X X X . . X X X X . . X . X X
. . X X X . . X X X X . X X . X
. . . X X X . . X X X X . X X X
"""


class Residual(nn.Module):
    """The modules of ``body`` are its own, by their names."""

    def __init__(self, body, shortcut=None, activation=None, name="downsample"):
        super().__init__()
        self.order = []
        for key, module in body.items():
            self.add_module(key, module)
            self.order.append(module)
        self.add_module(name, shortcut)
        self.shortcut, self.last = [shortcut], [activation]  # in lists: no keys of their own

    def forward(self, x):
        y = x
        for module in self.order:
            y = module(y)
        y = y + (x if self.shortcut[0] is None else self.shortcut[0](x))
        return y if self.last[0] is None else self.last[0](y)


class Branches(nn.Sequential):
    def forward(self, x):
        return torch.cat([module(x) for module in self], dim=1)


class Added(nn.Sequential):
    def forward(self, x):
        return sum(module(x) for module in self)


# --- torchvision's ResNet -------------------------------------------------------------------------


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inplanes, planes, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride, downsample):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU()
        self.downsample = downsample

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, block, layers, num_classes, in_channels):
        super().__init__()
        self.inplanes = 64
        self.conv1 = nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self.make_layer(block, 64, layers[0], 1)
        self.layer2 = self.make_layer(block, 128, layers[1], 2)
        self.layer3 = self.make_layer(block, 256, layers[2], 2)
        self.layer4 = self.make_layer(block, 512, layers[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

    def make_layer(self, block, planes, blocks, stride):
        downsample, out = None, planes * block.expansion
        if stride != 1 or self.inplanes != out:
            downsample = nn.Sequential(
                nn.Conv2d(self.inplanes, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )
        parts = [block(self.inplanes, planes, stride, downsample)]
        self.inplanes = out
        parts += [block(out, planes, 1, None) for _ in range(1, blocks)]
        return nn.Sequential(*parts)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class SubsampleAndPad(nn.Module):
    """Option A of He et al., 2015."""

    def forward(self, x):
        half = x.shape[1] // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


class ResNet20(nn.Module):
    def __init__(self, num_classes, in_channels, option):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for number, width in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range(3):
                first = number > 1 and index == 0
                projection = [nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width)]
                shortcut = (
                    (SubsampleAndPad() if option == "A" else nn.Sequential(*projection))
                    if first
                    else None
                )
                blocks.append(BasicBlock(inputs, width, 2 if first else 1, shortcut))
                inputs = width
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


# --- torchvision's VGG ----------------------------------------------------------------------------

VGG_CONFIGURATIONS = {
    "A": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "D": [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"],
}


class VGG(nn.Module):
    def __init__(
        self, configuration, num_classes, in_channels, batch_norm, hidden=4096, dropout=0.5
    ):
        super().__init__()
        layers = []
        for v in VGG_CONFIGURATIONS[configuration]:
            if v == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            layers.append(nn.Conv2d(in_channels, v, 3, padding=1))
            layers += [nn.BatchNorm2d(v), nn.ReLU()] if batch_norm else [nn.ReLU()]
            in_channels = v
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


# --- the others -----------------------------------------------------------------------------------


class Squash(nn.Module):
    def forward(self, x):
        return 1.7159 * torch.tanh(2 / 3 * x)


class Subsampling(nn.Module):
    """The paper's: the sum of four, times a coefficient, plus a bias. Ours has the mean, so the
    weight is four times that."""

    def __init__(self, maps):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(maps, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(maps))

    def forward(self, x):
        four = x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]
        return four * (self.weight / 4).reshape(-1, 1, 1) + self.bias.reshape(-1, 1, 1)


class C3(nn.Module):
    """Sixteen convolutions, one for each output map, over the maps that the printed table names."""

    def __init__(self):
        super().__init__()
        rows = [line.split() for line in TABLE_I.strip().splitlines()]
        self.seen = [[i for i in range(6) if rows[i][o] == "X"] for o in range(16)]
        self.weight = nn.Parameter(torch.zeros(sum(map(len, self.seen)), 5, 5))
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        maps, start = [], 0
        for seen, bias in zip(self.seen, self.bias, strict=True):
            kernel = self.weight[start : start + len(seen)][None]
            maps.append(nn.functional.conv2d(x[:, seen], kernel, bias[None]))
            start += len(seen)
        return torch.cat(maps, 1)


def lenet5(num_classes, in_channels, variant, padding):
    if variant == "classic":
        parts = OrderedDict(
            c1=nn.Conv2d(in_channels, 6, 5, padding=padding), a1=Squash(), s2=Subsampling(6),
            a2=Squash(),
            c3=C3(), a3=Squash(), s4=Subsampling(16), a4=Squash(), c5=nn.Conv2d(16, 120, 5),
            a5=Squash(),
            flat=nn.Flatten(), f6=nn.Linear(120, 84), a6=Squash(), output=nn.Linear(84,
            num_classes),
        )  # fmt: skip
    else:
        parts = OrderedDict(
            conv1=nn.Conv2d(in_channels, 6, 5, padding=padding), a1=nn.ReLU(), p1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5), a2=nn.ReLU(), p2=nn.MaxPool2d(2), flat=nn.Flatten(),
            fc1=nn.Linear(400, 120), a3=nn.ReLU(), fc2=nn.Linear(120, 84), a4=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )  # fmt: skip
    return nn.Sequential(parts)


def deep_conv_net(num_classes, in_channels, features=1024, hidden=50, dropout=0.5):
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 16, 3, padding=1), a1=nn.ReLU(),
            conv2=nn.Conv2d(16, 16, 3, padding=1), a2=nn.ReLU(), p1=nn.MaxPool2d(2),
            conv3=nn.Conv2d(16, 32, 3, padding=1), a3=nn.ReLU(),
            conv4=nn.Conv2d(32, 32, 3, padding=2), a4=nn.ReLU(), p2=nn.MaxPool2d(2),
            conv5=nn.Conv2d(32, 64, 3, padding=1), a5=nn.ReLU(),
            conv6=nn.Conv2d(64, 64, 3, padding=1), a6=nn.ReLU(), p3=nn.MaxPool2d(2),
            flat=nn.Flatten(), fc1=nn.Linear(features, hidden), a7=nn.ReLU(),
            d1=nn.Dropout(dropout),
            fc2=nn.Linear(hidden, num_classes), d2=nn.Dropout(dropout),
        )
    )  # fmt: skip


class PaperLRN(nn.Module):
    """b = a / (2 + 1e-4 * sum over 5 channels of a^2) ^ 0.75, section 3.3 of the AlexNet paper."""

    def forward(self, a):
        squares = nn.functional.pad(a**2, (0, 0, 0, 0, 2, 2))
        total = sum(squares[:, i : i + a.shape[1]] for i in range(5))
        return a / (2 + 1e-4 * total) ** 0.75


def alexnet(num_classes, in_channels, features=9216, hidden=4096, dropout=0.5):
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, 96, 11, 4, 2), a1=nn.ReLU(), n1=PaperLRN(),
            p1=nn.MaxPool2d(3, 2),
            conv2=nn.Conv2d(96, 256, 5, 1, 2, groups=2), a2=nn.ReLU(), n2=PaperLRN(),
            p2=nn.MaxPool2d(3, 2),
            conv3=nn.Conv2d(256, 384, 3, 1, 1), a3=nn.ReLU(),
            conv4=nn.Conv2d(384, 384, 3, 1, 1, groups=2), a4=nn.ReLU(),
            conv5=nn.Conv2d(384, 256, 3, 1, 1, groups=2), a5=nn.ReLU(), p5=nn.MaxPool2d(3, 2),
            flat=nn.Flatten(),
            fc6=nn.Linear(features, hidden), a6=nn.ReLU(), d6=nn.Dropout(dropout),
            fc7=nn.Linear(hidden, hidden), a7=nn.ReLU(), d7=nn.Dropout(dropout),
            fc8=nn.Linear(hidden, num_classes),
        )
    )  # fmt: skip


# --- torchvision's MobileNetV2 and EfficientNet-B0 ------------------------------------------------


def conv_norm(inputs, outputs, kernel, activation, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*parts, activation()) if activation else nn.Sequential(*parts)


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        wide, self.added = inputs * expansion, stride == 1 and inputs == outputs
        parts = [] if expansion == 1 else [conv_norm(inputs, wide, 1, nn.ReLU6)]
        parts.append(conv_norm(wide, wide, 3, nn.ReLU6, stride, wide))
        parts += [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.conv(x) if self.added else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self, num_classes, in_channels, widths=(32, 16, 24, 32, 64, 96, 160, 320, 1280)):
        super().__init__()
        first, *middle, last = widths
        features, inputs = [conv_norm(in_channels, first, 3, nn.ReLU6, 2)], first
        settings = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
        for outputs, (expansion, count, stride) in zip(middle, settings, strict=True):
            for i in range(count):
                step = stride if i == 0 else 1
                features.append(InvertedResidual(inputs, outputs, step, expansion))
                inputs = outputs
        features.append(conv_norm(inputs, last, 1, nn.ReLU6))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(last, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels, squeezed, activation=nn.ReLU):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = activation()

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class MBConv(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        wide, self.added = inputs * expansion, stride == 1 and inputs == outputs
        parts = [] if expansion == 1 else [conv_norm(inputs, wide, 1, nn.SiLU)]
        parts.append(conv_norm(wide, wide, kernel, nn.SiLU, stride, wide))
        parts.append(SqueezeExcitation(wide, max(1, inputs // 4), nn.SiLU))
        parts.append(conv_norm(wide, outputs, 1, None))
        self.block = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.block(x) if self.added else self.block(x)


class EfficientNetB0(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        features, inputs = [conv_norm(in_channels, 32, 3, nn.SiLU, 2)], 32
        for expansion, kernel, stride, outputs, count in (
            (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1),
        ):  # fmt: skip
            blocks = []
            for i in range(count):
                step = stride if i == 0 else 1
                blocks.append(MBConv(inputs, outputs, kernel, step, expansion))
                inputs = outputs
            features.append(nn.Sequential(*blocks))
        features.append(conv_norm(inputs, 1280, 1, nn.SiLU))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.0), nn.Linear(1280, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


# --- github.com/milesial/Pytorch-UNet -------------------------------------------------------------


class DoubleConv(nn.Module):
    def __init__(self, inputs, outputs, middle=None):
        super().__init__()
        middle = middle or outputs
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(inputs, outputs))

    def forward(self, x):
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, inputs, outputs, bilinear):
        super().__init__()
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(inputs, outputs, inputs // 2)
        else:
            self.up = nn.ConvTranspose2d(inputs, inputs // 2, 2, 2)
            self.conv = DoubleConv(inputs, outputs)

    def forward(self, x, beside):
        return self.conv(torch.cat([beside, self.up(x)], 1))


class OutConv(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.conv(x)


class UNet(nn.Module):
    """Of depth 4, as published there, with ``w`` for its 64."""

    def __init__(self, in_channels, num_classes, w=64, bilinear=False):
        super().__init__()
        factor = 2 if bilinear else 1
        self.inc = DoubleConv(in_channels, w)
        self.down1, self.down2 = Down(w, 2 * w), Down(2 * w, 4 * w)
        self.down3, self.down4 = Down(4 * w, 8 * w), Down(8 * w, 16 * w // factor)
        self.up1 = Up(16 * w, 8 * w // factor, bilinear)
        self.up2 = Up(8 * w, 4 * w // factor, bilinear)
        self.up3 = Up(4 * w, 2 * w // factor, bilinear)
        self.up4 = Up(2 * w, w, bilinear)
        self.outc = OutConv(w, num_classes)

    def forward(self, x):
        ways = [self.inc(x)]
        for down in (self.down1, self.down2, self.down3, self.down4):
            ways.append(down(ways[-1]))
        x = ways.pop()
        for up in (self.up1, self.up2, self.up3, self.up4):
            x = up(x, ways.pop())
        return self.outc(x)
