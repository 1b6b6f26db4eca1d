"""Notebooks: the one in docs/ runs as it is stored, and a training is interrupted and continued in
a kernel."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from support.matrix import needs

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"
NUMBER = re.compile(r"\d+\.\d+")
pytestmark = [
    pytest.mark.slow,
    needs("nbclient", "ipykernel"),
    pytest.mark.filterwarnings("default"),
]


def stored() -> list[dict]:
    return [c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def text_of(cell: dict) -> str:
    return "".join(
        "".join(output.get("text", "") or output.get("data", {}).get("text/plain", ""))
        for output in cell["outputs"]
    )


def pictures(cell: dict) -> set[str]:
    return {kind for output in cell["outputs"] for kind in output.get("data", {})}


def test_the_notebook_runs_and_its_outputs_are_those_stored(tmp_path, monkeypatch):
    import nbclient
    import nbformat

    assert NOTEBOOK.stat().st_size < 200_000
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=120, resources=resources, coalesce_streams=True
    )
    client.execute()
    ran = [cell for cell in notebook.cells if cell["cell_type"] == "code"]
    for before, now in zip(stored(), ran, strict=True):
        assert pictures(now) == pictures(before)
        if "epoch" not in text_of(now):  # seconds differ
            assert NUMBER.sub("#", text_of(now)) == NUMBER.sub("#", text_of(before))
    right = next(text_of(cell) for cell in ran if "right:" in text_of(cell))
    assert float(NUMBER.search(right)[0]) > 0.95
    bar = next(text_of(cell) for cell in ran if "480/480" in text_of(cell))
    assert bar.count("480/480") == 1  # one bar, after the lines
    assert max(map(len, bar.splitlines())) <= 80
    assert (tmp_path / "digits.safetensors").is_file()


PREPARE = """
import numpy as np, os, portacnn
x = np.random.default_rng(0).normal(size=(4000, 1, 28, 28)).astype("float32")
t = np.arange(4000) % 10
def made(*callbacks):
    model = portacnn.SimpleConvNet(weight_init="he", device="cpu", seed=0)
    options = dict(epochs=2, batch_size=20, seed=1, verbose=False, callbacks=callbacks)
    return portacnn.Trainer(model, x, t, **options)

class Begun(portacnn.callbacks.Callback):
    every_step = True
    def on_step_end(self, trainer, loss):
        if trainer.steps_done == 5:
            print("begun", flush=True)

trainer, whole = made(Begun()), made()
print(os.getpid())
"""
CONTINUE = """
stopped = trainer.steps_done
trainer.train()
whole.train()
same = all((a == whole.model.state_dict()[n]).all() for n, a in trainer.model.state_dict().items())
print(0 < stopped < 400, same, trainer.train_loss_list == whole.train_loss_list)
"""


def test_interrupting_the_kernel_keeps_the_training_whole(monkeypatch):
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PORTACNN_KERNELS", "native")
    manager, client = start_new_kernel(kernel_name="python3")
    printed: list[str] = []

    def output(message):
        printed.append(message["content"].get("text", ""))
        if "begun" in printed[-1]:
            os.kill(kernel, signal.SIGINT)  # as Jupyter's button does

    def run(code):
        printed.clear()
        # With stop_on_error, a kernel refuses the cells that come right after an error.
        reply = client.execute_interactive(
            code, timeout=120, output_hook=output, stop_on_error=False
        )["content"]
        return reply["status"], reply.get("ename"), "".join(printed).split()

    try:
        *_, printed_pid = run(PREPARE)
        kernel = int(printed_pid[0])
        assert run("trainer.train()")[:2] == ("error", "KeyboardInterrupt")
        assert run(CONTINUE) == ("ok", None, ["True"] * 3)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
