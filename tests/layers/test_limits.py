"""Networks that a stranger's file describes: what a layer does slice by slice is counted."""

import time

import pytest

import portacnn
from portacnn import layers as L
from portacnn.errors import ModelFormatError
from portacnn.layers.limits import TAPS, limited
from support.checks import refuses

SLICES = {
    "average": (lambda n: L.AdaptiveAvgPool1d(n), (1, 4)),
    "maximum": (lambda n: L.AdaptiveMaxPool2d((n, 1)), (1, 4, 4)),
    "resize": (lambda n: L.Upsample((n, 1)), (1, 7, 7)),
    "response": (lambda n: L.LocalResponseNorm(n), (TAPS + 1, 1)),
    "take": (lambda n: L.Take([0] * n, 1), (2,)),
}


@pytest.mark.parametrize("what", SLICES)
def test_a_small_file_does_not_ask_for_long_loops(tmp_path, what):
    """It is refused at once, and a program may build the same."""
    make, shape = SLICES[what]
    with limited(10):
        make(1000).plan(shape)
    model = portacnn.Model(make(TAPS + 1)).build(shape, device="numpy")
    model.save(tmp_path / "net")
    begun = time.process_time()
    refuses(
        *(ModelFormatError, "0 (", f"{TAPS} elements together", "load_weights"),
        call=lambda: portacnn.load(tmp_path / "net", device="numpy"),
    )
    assert time.process_time() - begun < 0.5
