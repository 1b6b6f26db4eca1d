"""Small networks of portacnn.scratch, and digits for them."""

from pathlib import Path

import portacnn
from portacnn import scratch

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "portacnn" / "data" / "mnist_sample"


def digits(count, first=0):
    """(images (N, 1, 28, 28), labels) from the bundled sample."""
    (x, t), _ = portacnn.load_mnist_sample()
    return x[first : first + count], t[first : first + count]


SMALL = {
    "input_dim": (1, 10, 10),
    "conv_param": {"filter_num": 3, "filter_size": 3, "pad": 0, "stride": 1},
    "hidden_size": 4,
    "output_size": 5,
}


def quick_net(device):
    conv = {"filter_num": 4, "filter_size": 5, "pad": 0, "stride": 2}
    return scratch.SimpleConvNet(
        conv_param=conv, hidden_size=20, weight_init_std="he", device=device, seed=0
    )
