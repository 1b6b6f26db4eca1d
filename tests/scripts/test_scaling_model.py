"""scripts/scaling_model.py against figures computed by hand, and bench_ranks.py on two ranks."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
model = import_module("scaling_model")
LINK = model.Link(alpha=1e-3, beta=1e6)


def test_the_time_of_a_sum():
    """1 ms of latency, 1 MB/s."""
    # 2 * 3 messages of a quarter of the bytes: 6 * (1 + 250 ms)
    assert model.ring(LINK, 4, 1e6) == pytest.approx(1.506)
    # 3 levels, up and down: 6 ms, and all bytes twice: 2 s
    assert model.tree(LINK, 8, 1e6) == pytest.approx(2.006)
    assert model.tree(LINK, 5, 0) == pytest.approx(0.006)
    assert model.ring(LINK, 1, 1e6) == model.tree(LINK, 1, 1e6) == 0
    # 1,024 devices and 1 kB: 2,046 messages in a ring, 10 levels of a tree
    assert model.fastest(LINK, 1024, 1e3) == pytest.approx(0.020 + 0.002)
    assert model.fastest(LINK, 4, 1e6) == model.ring(LINK, 4, 1e6)


def test_the_time_of_a_sum_over_nodes():
    """Two nodes of four: a ring in each, and the sum of a quarter between the two."""
    slow = model.Link(alpha=1e-2, beta=1e5)
    cluster = model.Cluster(inside=LINK, between=slow, size=4)
    between = 2 * (0.01 + 125_000 / 1e5)  # two messages of half of the 250 kB
    assert model.in_nodes(cluster, 8, 1e6) == pytest.approx(1.506 + between)
    assert model.in_nodes(cluster, 4, 1e6) == pytest.approx(1.506)
    assert model.in_nodes(cluster, 2, 1e6) == pytest.approx(2 * (0.001 + 0.5))


def test_buckets_and_what_is_exposed():
    """Four layers of the same work. The last has a bucket of its own, the middle two share one."""
    layers = [model.Layer(n, 10) for n in (100, 600, 500, 2000)]
    parts = model.buckets(layers, least=4000)
    assert parts == [(8000, 0.25), (4400, 0.75), (400, 1.0)]
    assert model.buckets(layers, least=4000, width=2)[0] == (4000, 0.25)
    # Backward pass of 4 s, 1 kB/s: the first sum runs from 1 to 9 s, then 4.4 s and 0.4 s.
    assert model.exposed(parts, 4.0, lambda m: m / 1000) == pytest.approx(9.8)
    # 10 kB/s: 1 to 1.8 s, 3 to 3.44 s, 4 to 4.04 s
    assert model.exposed(parts, 4.0, lambda m: m / 10_000) == pytest.approx(0.04)
    # A step of 6 s on one device, of which 4 s are the backward pass. All layers have one bucket.
    assert model.efficiency(layers, 6.0, lambda m: m / 12_800) == pytest.approx(6 / 7)


def test_the_networks_are_those_that_are_trained():
    simple = model.layers_of("simple")
    assert sum(layer.parameters for layer in simple) == 30 * 26 + 4320 * 100 + 100 + 1010
    assert sum(layer.multiply_adds for layer in simple) == 30 * 25 * 24 * 24 + 432_000 + 1000
    lines = model.table()
    assert len(lines) == 2 + 3 * len(model.CASES)
    assert lines[2].startswith("| simple, 100 | 0.12 | 1.7 | ring | ")


@needs("mpi4py")
@pytest.mark.slow
def test_the_benchmark_on_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from support.mpi import environment, mpiexec

    bench = import_module("bench")
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(Path(str(mpiexec())).parent), prepend=":")
    out = tmp_path / "bench.json"
    options = ["--nets", "lenet", "--batches", "11", "--rounds", "1", "--seconds", "0.01"]
    assert bench.main(["--distributed", *options, "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = {(row["ranks"], row["threads"]): row for row in report["rows"]}
    two = rows[2, 1]
    assert 0 < two["exposed_ms"] < two["step_ms"]
    assert rows[1, 1]["exposed_ms"] < 0.1 * rows[1, 1]["step_ms"]
    assert rows[1, 1]["efficiency"] == 1
    gradients = 4 * (6 * 26 + 16 * 151 + 400 * 120 + 120 + 120 * 84 + 84 + 850)
    assert two["rounds"][0]["bytes"] == pytest.approx(gradients + 4)  # and the loss
    assert report["sums"]["2"][-1][0] == 1 << 26
