"""61 small networks in PyTorch, each with what one kind of architecture writes into an ONNX file.

``NETWORKS`` has for each name a function that makes the network, and the shapes of its samples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Shape = tuple[int, ...]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Shape, ...]]] = {}
IMAGE = (3, 16, 16)


def _network(*shapes: Shape) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def enter(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[make.__name__] = make, shapes or (IMAGE,)
        return make

    return enter


def made(name: str) -> nn.Module:
    """Return a network in float64, for inference. All of its state is random: exporters merge
    initializers that are equal."""
    torch.manual_seed(0)
    net = NETWORKS[name][0]().double().eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return net


class Fn(nn.Module):
    """Layers by name, and the function that runs them."""

    def __init__(self, run: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *x: torch.Tensor) -> Any:
        return self.run(self, *x)


def conv_bn(c: int, o: int, k: int = 3, act: Any = nn.ReLU, **options: Any) -> nn.Sequential:
    options.setdefault("padding", k // 2)
    layers = [nn.Conv2d(c, o, k, bias=False, **options), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act()] if act else []))


def head(features: int, classes: int = 5) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, classes)]


def residual(body: nn.Module, short: nn.Module | None = None, act: Any = F.relu) -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        y = self.body(x) + (x if short is None else self.short(x))
        return y if act is None else act(y)

    return Fn(run, body=body, **({} if short is None else {"short": short}))


# --- classifiers ----------------------------------------------------------------------------------


@_network()
def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 5)
    )


@_network((1, 28, 28))
def lenet() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 5), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


@_network()
def alexnet() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 5, 2, 2), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(3, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 5))


@_network()
def vgg() -> nn.Module:
    layers = [conv_bn(3, 8), conv_bn(8, 8), nn.MaxPool2d(2), conv_bn(8, 12), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))


@_network()
def resnet() -> nn.Module:
    first = residual(nn.Sequential(conv_bn(8, 8), conv_bn(8, 8, act=None)))
    second = residual(
        nn.Sequential(conv_bn(8, 12, stride=2), conv_bn(12, 12, act=None)),
        conv_bn(8, 12, 1, None, stride=2),
    )
    return nn.Sequential(conv_bn(3, 8), nn.MaxPool2d(3, 2, 1), first, second, *head(12))


@_network()
def bottleneck() -> nn.Module:
    body = [conv_bn(8, 4, 1), conv_bn(4, 4, groups=2), conv_bn(4, 8, 1, None)]
    return nn.Sequential(conv_bn(3, 8), residual(nn.Sequential(*body)), *head(8))


@_network()
def preactivation() -> nn.Module:
    body = [nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    block = residual(nn.Sequential(*body), act=None)
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, nn.BatchNorm2d(8), nn.ReLU(), *head(8))


@_network()
def densenet() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = torch.cat([x, self.a(x)], 1)
        return torch.cat([x, self.b(x)], 1)

    dense = Fn(run, a=conv_bn(6, 4), b=conv_bn(10, 4))
    return nn.Sequential(conv_bn(3, 6), dense, conv_bn(14, 7, 1), nn.AvgPool2d(2), *head(7))


@_network()
def inception() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        return torch.cat([self.a(x), self.b(x), self.c(F.max_pool2d(x, 3, 1, 1))], 1)

    block = Fn(run, a=conv_bn(6, 4, 1), b=conv_bn(6, 4, 5), c=conv_bn(6, 4, 1))
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(conv_bn(3, 6), pool, block, *head(12))


@_network()
def squeezenet() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)

    fire = Fn(
        run, squeeze=nn.Conv2d(6, 3, 1), one=nn.Conv2d(3, 4, 1), three=nn.Conv2d(3, 4, 3, padding=1)
    )
    end = [nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), fire, *end)


@_network()
def mobilenet_v1() -> nn.Module:
    return nn.Sequential(
        conv_bn(3, 8, stride=2), conv_bn(8, 8, groups=8), conv_bn(8, 12, 1), *head(12)
    )


@_network()
def mobilenet_v2() -> nn.Module:
    body = [conv_bn(6, 18, 1, nn.ReLU6), conv_bn(18, 18, act=nn.ReLU6, groups=18)]
    block = residual(nn.Sequential(*body, conv_bn(18, 6, 1, None)), act=None)
    return nn.Sequential(conv_bn(3, 6, act=nn.ReLU6), block, *head(6))


def squeeze_excite(c: int, act: Any = F.relu, gate: Any = torch.sigmoid) -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        return x * gate(self.up(act(self.down(F.adaptive_avg_pool2d(x, 1)))))

    return Fn(run, down=nn.Conv2d(c, 4, 1), up=nn.Conv2d(4, c, 1))


@_network()
def mobilenet_v3() -> nn.Module:
    body = [conv_bn(6, 12, 1, nn.Hardswish), squeeze_excite(12, gate=F.hardsigmoid)]
    return nn.Sequential(conv_bn(3, 6, act=nn.Hardswish), *body, *head(12))


@_network()
def efficientnet() -> nn.Module:
    body = [conv_bn(6, 12, 1, nn.SiLU), conv_bn(12, 12, act=nn.SiLU, groups=12)]
    body += [squeeze_excite(12, F.silu), conv_bn(12, 6, 1, None)]
    return nn.Sequential(
        conv_bn(3, 6, act=nn.SiLU), residual(nn.Sequential(*body), act=None), *head(6)
    )


@_network()
def shufflenet() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        a, b = x.chunk(2, dim=1)
        x = torch.cat([a, self.body(b)], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    return nn.Sequential(conv_bn(3, 8), Fn(run, body=conv_bn(4, 4)), *head(8))


@_network()
def ghostnet() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = self.first(x)
        return torch.cat([x, self.cheap(x)], 1)[:, :7]

    return nn.Sequential(Fn(run, first=conv_bn(3, 4), cheap=conv_bn(4, 4, groups=4)), *head(7))


@_network()
def res2net() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        a, b, c = torch.split(x, [3, 3, 2], 1)
        b = self.b(b)
        return torch.cat([a, b, self.c(torch.cat([b[:, :1], c], 1))], 1) + x

    return nn.Sequential(conv_bn(3, 8), Fn(run, b=conv_bn(3, 3), c=conv_bn(3, 2)), *head(8))


@_network()
def repvgg() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        return F.relu(self.three(x) + self.one(x) + self.same(x))

    block = Fn(
        run, three=conv_bn(6, 6, act=None), one=conv_bn(6, 6, 1, None), same=nn.BatchNorm2d(6)
    )
    return nn.Sequential(conv_bn(3, 6), block, *head(6))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


@_network()
def convnext() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(c, c, 5, padding=2, groups=c)
            self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 12), nn.Linear(12, c)
            self.gamma = nn.Parameter(torch.rand(c))

        def forward(self, x: Any) -> Any:
            y = self.norm(self.conv(x).permute(0, 2, 3, 1))
            y = self.gamma * self.down(F.gelu(self.up(y)))
            return x + y.permute(0, 3, 1, 2)

    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), LayerNorm2d(6), Block(6), *head(6))


@_network()
def poolformer() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        y = self.norm(x)
        x = x + F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y
        return x + self.down(F.gelu(self.up(x), approximate="tanh"))

    block = Fn(run, norm=nn.GroupNorm(1, 6), up=nn.Conv2d(6, 12, 1), down=nn.Conv2d(12, 6, 1))
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), block, *head(6))


@_network()
def mixer() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.fc(self.norm2(x + self.channels(x)).mean(1))

    tokens = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16))
    channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    norms = {"norm": nn.LayerNorm(6), "norm2": nn.LayerNorm(6)}
    layers = {"patches": nn.Conv2d(3, 6, 4, 4), "tokens": tokens, "channels": channels}
    return Fn(run, **layers, **norms, fc=nn.Linear(6, 5))


# --- attention ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """As in timm: one matrix for q, k and v, and heads split by reshape and permute."""

    def __init__(self, c: int, heads: int, fused: bool = False) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, c = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * (c // self.heads) ** -0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, length, c))


class ViT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 5)
        self.cls, self.pos = (nn.Parameter(torch.randn(1, n, 8)) for n in (1, 17))
        self.norm, self.attention = nn.LayerNorm(8), Attention(8, 2, fused)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        x = x + self.attention(self.norm(x))
        return self.fc(x[:, 0])


@_network()
def vit() -> nn.Module:
    return ViT(False)


@_network()
def vit_fused() -> nn.Module:
    return ViT(True)


@_network()
def encoder() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        return self.fc(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return Fn(run, patches=nn.Conv2d(3, 8, 4, 4), encoder=encoder, fc=nn.Linear(8, 5))


@_network()
def sequence_first() -> nn.Module:
    """As in DETR: the batch is the second axis."""

    def run(self: Any, x: Any) -> Any:
        x = self.patches(x).flatten(2).permute(2, 0, 1)
        y, _ = self.attention(x, x, x)
        return self.fc(self.norm(x + y).permute(1, 0, 2).mean(1))

    attention = nn.MultiheadAttention(8, 2)
    layers = {"attention": attention, "norm": nn.LayerNorm(8), "fc": nn.Linear(8, 5)}
    return Fn(run, patches=nn.Conv2d(3, 8, 4, 4), **layers)


@_network()
def swin() -> nn.Module:
    """Windows are folded into the batch, and rolled."""

    def run(self: Any, x: Any) -> Any:
        x = self.patches(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.attention(y).view(-1, 4, 4, c)
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        x = x + torch.roll(y, (1, 1), (1, 2))
        return self.fc(x.permute(0, 3, 1, 2).mean((2, 3)))

    layers = {"norm": nn.LayerNorm(8), "attention": Attention(8, 2), "fc": nn.Linear(8, 5)}
    return Fn(run, patches=nn.Conv2d(3, 8, 2, 2), **layers)


@_network()
def nonlocal_block() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        n, c, h, w = x.shape
        a, b = self.a(x).view(n, 3, -1), self.b(x).view(n, 3, -1)
        weights = torch.softmax(torch.bmm(a.transpose(1, 2), b), -1)
        y = torch.matmul(weights, self.v(x).view(n, c, -1).transpose(1, 2))
        return x + y.transpose(1, 2).contiguous().view(n, c, h, w)

    block = Fn(run, a=nn.Conv2d(6, 3, 1), b=nn.Conv2d(6, 3, 1), v=nn.Conv2d(6, 6, 1))
    return nn.Sequential(conv_bn(3, 6, stride=2), block, *head(6))


@_network()
def cbam() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        mean, most = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * torch.sigmoid(self.channels(mean) + self.channels(most))
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return x * torch.sigmoid(self.space(maps))

    channels = nn.Sequential(nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1))
    block = Fn(run, channels=channels, space=nn.Conv2d(2, 1, 3, padding=1))
    return nn.Sequential(conv_bn(3, 6), block, *head(6))


@_network()
def eca() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        y = F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(-1, -2)
        y = self.conv(y).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)

    return nn.Sequential(
        conv_bn(3, 6), Fn(run, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False)), *head(6)
    )


@_network()
def coordinates() -> nn.Module:
    """Coordinate attention: pooling along each axis."""

    def run(self: Any, x: Any) -> Any:
        _, _, h, w = x.shape
        rows = x.mean(3, keepdim=True)
        columns = x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        y = F.hardswish(self.down(torch.cat([rows, columns], 2)))
        rows, columns = torch.split(y, [h, w], 2)
        return x * self.a(rows).sigmoid() * self.b(columns.permute(0, 1, 3, 2)).sigmoid()

    block = Fn(run, down=conv_bn(6, 3, 1, None), a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(3, 6, 1))
    return nn.Sequential(conv_bn(3, 6), block, *head(6))


# --- maps of another size -------------------------------------------------------------------------


def unet_of(up: nn.Module, c: int) -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        a = self.down(x)
        return self.out(torch.cat([a, self.up(self.mid(F.max_pool2d(a, 2)))], 1))

    return Fn(
        run, down=conv_bn(3, 6), mid=conv_bn(6, 8), up=up, out=nn.Conv2d(6 + c, 2, 3, padding=1)
    )


@_network()
def unet() -> nn.Module:
    return unet_of(nn.ConvTranspose2d(8, 6, 2, 2), 6)


@_network()
def unet_bilinear() -> nn.Module:
    return unet_of(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), 8)


@_network()
def unet_nearest() -> nn.Module:
    return unet_of(nn.Upsample(scale_factor=2), 8)


@_network()
def deeplab() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        y = self.stem(x)
        pooled = F.interpolate(
            self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False
        )
        y = self.out(torch.cat([self.near(y), self.far(y), pooled], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 4, 1), nn.ReLU())
    far = conv_bn(6, 4, padding=2, dilation=2)
    layers = {"near": conv_bn(6, 4, 1), "far": far, "pool": pool, "out": nn.Conv2d(12, 3, 1)}
    return Fn(run, stem=conv_bn(3, 6, stride=2), **layers)


@_network()
def pixel_shuffle() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)]
    return nn.Sequential(*layers, nn.PixelShuffle(2))


@_network()
def pixel_unshuffle() -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.ReLU(), *head(4))


@_network()
def autoencoder() -> nn.Module:
    down = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 8)]
    up = [nn.Linear(8, 96), nn.Unflatten(1, (6, 4, 4)), nn.ConvTranspose2d(6, 3, 4, 4)]
    return nn.Sequential(*down, *up, nn.Sigmoid())


@_network((8,))
def generator() -> nn.Module:
    def run(self: Any, z: Any) -> Any:
        return torch.tanh(self.up(self.norm(self.first(z[:, :, None, None])).relu()))

    up = nn.ConvTranspose2d(6, 3, 4, 2, 1, output_padding=1, bias=False)
    return Fn(run, first=nn.ConvTranspose2d(8, 6, 4), norm=nn.BatchNorm2d(6), up=up)


@_network()
def style() -> nn.Module:
    norm = nn.InstanceNorm2d(6, affine=True)
    layers = [nn.ReflectionPad2d(2), nn.Conv2d(3, 6, 5), norm, nn.ReLU(), nn.ReplicationPad2d(1)]
    return nn.Sequential(*layers, nn.Conv2d(6, 3, 3), nn.InstanceNorm2d(3), nn.ZeroPad2d((1, -2)))


# --- norms, activations, arithmetic ---------------------------------------------------------------


@_network()
def group_norm() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    return nn.Sequential(*layers, nn.GroupNorm(8, 8, affine=False), nn.Softsign(), *head(8))


@_network()
def layer_norm() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3, 2), nn.LayerNorm([4, 7, 7]), nn.Mish(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(196, 5), nn.LogSoftmax(1))


@_network()
def activations() -> nn.Module:
    kinds = [nn.LeakyReLU(0.2), nn.ELU(), nn.SELU(), nn.CELU(0.5), nn.PReLU(4), nn.Softplus()]
    layers = [layer for kind in kinds for layer in (nn.Conv2d(4, 4, 3, padding=1), kind)]
    return nn.Sequential(nn.Conv2d(3, 4, 1), *layers, nn.Hardtanh(), *head(4))


@_network()
def shrinking() -> nn.Module:
    kinds = [nn.Softplus(2.0, 5.0), nn.Softshrink(0.1), nn.Hardshrink(0.1), nn.Tanhshrink()]
    kinds += [nn.LogSigmoid(), nn.Threshold(-0.5, -2.0)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *kinds, *head(4))


@_network()
def gated() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.GLU(1), nn.Conv2d(4, 4, 3), nn.ReLU()]
    return nn.Sequential(*layers, *head(4), nn.Softmax(1))


@_network()
def maxout() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = self.conv(x)
        n, _, h, w = x.shape
        return self.fc(torch.max(x.view(n, 4, 2, h, w), 2)[0].flatten(1))

    return Fn(run, conv=nn.Conv2d(3, 8, 3, 2), fc=nn.Linear(196, 5))


@_network()
def normalized() -> nn.Module:
    """Mean and standard deviation of images within the network, and a cosine classifier."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("image_mean", torch.rand(1, 3, 1, 1))
            self.register_buffer("image_std", 1 + torch.rand(1, 3, 1, 1))
            self.conv, self.weight = nn.Conv2d(3, 6, 3), nn.Parameter(torch.randn(5, 6))
            self.scale = nn.Parameter(torch.tensor(8.0))

        def forward(self, x: Any) -> Any:
            x = F.relu(self.conv((x - self.image_mean) / self.image_std)).mean((2, 3))
            return self.scale * F.linear(F.normalize(x), F.normalize(self.weight))

    return Net()


@_network()
def standardized() -> nn.Module:
    """Weight standardization: the weight is computed."""

    class Conv(nn.Conv2d):
        def forward(self, x: Any) -> Any:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    return nn.Sequential(Conv(3, 6, 3), nn.ReLU(), Conv(6, 6, 3), nn.GroupNorm(2, 6), *head(6))


@_network()
def clamped() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = self.conv(x)
        x = torch.where(x > 0.2, x, 0.1 * x) + torch.sign(x).abs() * x.clamp(min=-0.5)
        return self.fc((x.pow(2).sum((2, 3)) + 1e-3).sqrt().clamp(0.1, 3.0).rsqrt())

    return Fn(run, conv=nn.Conv2d(3, 6, 3), fc=nn.Linear(6, 5))


@_network()
def flipped() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        return (self.net(x) + self.net(x.flip(3))) / 2

    return Fn(run, net=nn.Sequential(conv_bn(3, 6), *head(6)))


@_network()
def focus() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        parts = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.net(torch.cat(parts, 1))

    return Fn(run, net=nn.Sequential(conv_bn(12, 6, act=nn.SiLU), *head(6)))


@_network()
def adaptive() -> nn.Module:
    pools = [nn.AdaptiveAvgPool2d((4, 2)), nn.AdaptiveMaxPool2d((2, 1))]
    return nn.Sequential(nn.Conv2d(3, 6, 1), *pools, nn.Flatten(), nn.Linear(12, 5))


@_network()
def by_size() -> nn.Module:
    """Sizes are computed from shapes in the usual ways."""

    def run(self: Any, x: Any) -> Any:
        x = F.avg_pool2d(self.conv(x), kernel_size=int(x.size(2)) // 4)
        x = x.view(x.size(0), -1)
        y = self.fc(x)
        return y.reshape(y.shape[0], 2, y.shape[1] // 2).mean(dim=-1)

    return Fn(run, conv=nn.Conv2d(3, 4, 3, padding=1), fc=nn.Linear(64, 6))


# --- other than images ----------------------------------------------------------------------------


@_network((2, 64))
def speech() -> nn.Module:
    layers = [nn.Conv1d(2, 6, 5, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5))


@_network((2, 32))
def causal() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        y = F.relu(self.a(x)[:, :, :-4])
        return self.out(F.relu(self.b(F.pad(y, (8, 0))) + self.short(x))[:, :, -1])

    layers = {"a": nn.Conv1d(2, 6, 3, padding=4, dilation=2), "b": nn.Conv1d(6, 6, 3, dilation=4)}
    return Fn(run, **layers, short=nn.Conv1d(2, 6, 1), out=nn.Linear(6, 5))


@_network((1, 8, 8, 8))
def volume() -> nn.Module:
    layers = [nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5))


# --- several outputs or inputs --------------------------------------------------------------------


@_network()
def pyramid() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        a = self.a(x)
        b = self.b(a)
        top = self.top(b)
        return self.out(self.side(a) + F.interpolate(top, scale_factor=2.0)), top

    sides = {"side": nn.Conv2d(6, 4, 1), "top": nn.Conv2d(8, 4, 1)}
    out = nn.Conv2d(4, 4, 3, padding=1)
    return Fn(run, a=conv_bn(3, 6), b=conv_bn(6, 8, stride=2), **sides, out=out)


@_network()
def detector() -> nn.Module:
    """As SSD: boxes and scores of all cells of two maps."""

    def run(self: Any, x: Any) -> Any:
        a = self.a(x)
        boxes, scores = [], []
        for y, box, score in ((a, self.box1, self.score1), (self.b(a), self.box2, self.score2)):
            boxes.append(box(y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
            scores.append(score(y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3))
        return torch.cat(boxes, 1), torch.cat(scores, 1).softmax(-1)

    def convs(c: int) -> list[nn.Module]:
        return [nn.Conv2d(c, 8, 3, padding=1), nn.Conv2d(c, 6, 3, padding=1)]

    (box1, score1), (box2, score2) = convs(6), convs(8)
    layers = {"a": conv_bn(3, 6, stride=4), "b": conv_bn(6, 8, stride=2)}
    return Fn(run, **layers, box1=box1, box2=box2, score1=score1, score2=score2)


@_network()
def yolo() -> nn.Module:
    """Boxes from cells by a grid that is a constant."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out = conv_bn(3, 6, stride=4, act=nn.SiLU), nn.Conv2d(6, 14, 1)
            y, x = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
            self.register_buffer("grid", torch.stack((x, y), 2).view(1, 1, 4, 4, 2))
            self.register_buffer("anchors", torch.rand(1, 2, 1, 1, 2) + 1)

        def forward(self, x: Any) -> Any:
            x = self.out(self.stem(x))
            n, _, h, w = x.shape
            x = x.view(n, 2, 7, h, w).permute(0, 1, 3, 4, 2).contiguous().sigmoid()
            xy = (x[..., 0:2] * 2 - 0.5 + self.grid) * 4
            wh = (x[..., 2:4] * 2) ** 2 * self.anchors
            return torch.cat((xy, wh, x[..., 4:]), -1).view(n, -1, 7)

    return Head()


@_network()
def variational() -> nn.Module:
    def run(self: Any, x: Any) -> Any:
        x = self.body(x)
        mean, log_var = self.mean(x), self.log_var(x)
        return self.up(mean).view(-1, 3, 4, 4), mean, log_var

    body = nn.Sequential(conv_bn(3, 6, stride=4), nn.Flatten())
    ends = {"mean": nn.Linear(96, 4), "log_var": nn.Linear(96, 4), "up": nn.Linear(4, 48)}
    return Fn(run, body=body, **ends)


@_network(IMAGE, (4,))
def with_metadata() -> nn.Module:
    def run(self: Any, x: Any, more: Any) -> Any:
        return self.fc(torch.cat([self.body(x), F.relu(self.more(more))], 1))

    body = nn.Sequential(conv_bn(3, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Fn(run, body=body, more=nn.Linear(4, 6), fc=nn.Linear(12, 5))


@_network(IMAGE, IMAGE)
def siamese() -> nn.Module:
    def run(self: Any, a: Any, b: Any) -> Any:
        a, b = self.body(a), self.body(b)
        return F.cosine_similarity(a, b), (a - b).abs()

    return Fn(run, body=nn.Sequential(conv_bn(3, 6), *head(6, 4)))
