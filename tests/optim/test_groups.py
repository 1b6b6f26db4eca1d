"""``groups``: a learning rate and a weight decay by pattern are torch.optim's parameter groups."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.files import load_tensors, save_tensors
from portacnn.optim import SGD, AdaGrad, Adam, AdamW, RMSprop, layerwise
from support.checks import refuses
from support.matrix import Here, needs
from support.nets import bits, normed_net, patches, small_net

GROUPS = {
    "conv1.bias": {"weight_decay": 0.5},
    "conv1": {"lr_factor": 0.25},
    "fc2": {"lr_factor": 10.0, "weight_decay": 0.0},
}
KINDS = [
    (SGD, "SGD", {"momentum": 0.9}),
    (AdaGrad, "Adagrad", {"lr_decay": 0.1}),
    (RMSprop, "RMSprop", {}),
    (Adam, "Adam", {}),
    (AdamW, "AdamW", {}),
]


@needs("torch")
@pytest.mark.parametrize("by_array", [False, True], ids=["number", "array"])
@pytest.mark.parametrize(("kind", "name", "options"), KINDS, ids=[name for _, name, _ in KINDS])
def test_groups_are_torchs(backend: Here, kind: Any, name: str, options: Any, by_array: bool):
    """Also if learning rate and count are arrays on the device, as in a replayed step."""
    import torch

    model = small_net(backend.device, dtype="float64")
    params = model.named_parameters()
    theirs = {p: torch.nn.Parameter(torch.tensor(v)) for p, v in model.state_dict().items()}
    twin = getattr(torch.optim, name)(
        [
            {"params": [theirs["conv1.bias"]], "weight_decay": 0.5},
            {"params": [theirs["conv1.weight"]], "lr": 0.02 * 0.25},
            {"params": [theirs["fc1.weight"]]},
            {"params": [theirs["fc2.weight"]], "lr": 0.02 * 10.0, "weight_decay": 0.0},
            {"params": [theirs["fc1.bias"]], "weight_decay": 0.0},
            {"params": [theirs["fc2.bias"]], "lr": 0.02 * 10.0, "weight_decay": 0.0},
        ],
        lr=0.02,
        weight_decay=0.1,
        **options,
    )
    mine = kind(0.02, weight_decay=0.1, groups=GROUPS, no_decay="fc1.bias", **options)
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        draws = {path: rng.standard_normal(p.shape) for path, p in theirs.items()}
        for path, value in draws.items():
            theirs[path].grad = torch.tensor(value)
        twin.step()
        grads = {path: backend.array(value) for path, value in draws.items()}
        if by_array:
            lr, count = (backend.backend.asarray(np.asarray(v)) for v in (0.02, step))
            mine.update(params, grads, lr=lr, count=count)
            mine.advance()
        else:
            mine.update(params, grads)
    for path, value in model.state_dict().items():
        np.testing.assert_allclose(
            value, theirs[path].detach().numpy(), rtol=1e-12, atol=1e-13, err_msg=path
        )


def test_a_training_continues_with_its_groups(backend: Here, tmp_path: Path):
    pytest.importorskip("safetensors")
    x, t = patches(20)

    def made(**options: Any) -> Trainer:
        groups = {"fc*": {"lr_factor": 3.0}, "conv1": {"lr_factor": 0.5, "weight_decay": 0.0}}
        optimizer = {"lr": 0.01, "weight_decay": 0.1, "groups": groups}
        model = small_net(backend.device)
        standard = {"optimizer_param": optimizer, "batch_size": 10, "verbose": False}
        return Trainer(model, x, t, **{**standard, **options})

    straight, stopped = made(epochs=2), made(epochs=1, checkpoint_dir=tmp_path)
    straight.train(), stopped.train()
    again = Trainer.resume(tmp_path, x, t, epochs=2, device=backend.device)
    again.train()
    assert bits(again.model) == bits(straight.model)
    assert again.optimizer.groups == straight.optimizer.groups


@pytest.mark.parametrize("groups", [3, {"fc1": 2.0}, {"fc1": {"lr": 1.0}}, {"x": {}}])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, groups: Any):
    pytest.importorskip("safetensors")
    x, t = patches(20)
    run = Trainer(small_net("numpy"), x, t, epochs=1, batch_size=10, verbose=False)
    path = run.checkpoint(tmp_path / "one.safetensors")
    tensors, header = load_tensors(path)
    header["optimizer"]["arguments"]["groups"] = groups
    save_tensors(path, tensors, header)
    refuses(ModelFormatError, "groups", call=lambda: Trainer.resume(path, x, t, device="numpy"))


def test_wrong_arguments_are_refused():
    for groups, words in (
        ([("fc1", {})], ("groups", "lr_factor")),
        ({"fc1": {"lr": 0.1}}, ("'fc1'", "'lr'", "lr_factor")),
        ({"fc1": {"lr_factor": -1.0}}, ("lr_factor", "-1.0")),
        ({"fc1": {"weight_decay": "much"}}, ("weight_decay", "'much'")),
        ({3: {}}, ("groups",)),
    ):
        refuses(ArgumentError, *words, call=lambda groups=groups: SGD(0.1, groups=groups))
    model = small_net("numpy")
    optimizer = SGD(0.1, groups={"fc1": {}, "fc9": {}})
    refuses(
        ArgumentError, "groups", "'fc9'", call=lambda: optimizer.check(model.named_parameters())
    )


def test_layerwise_goes_down_from_the_head():
    groups = layerwise(normed_net("numpy"), 0.5)
    assert groups == {
        "conv.*": {"lr_factor": 0.25},
        "bn.*": {"lr_factor": 0.5},
        "fc.*": {"lr_factor": 1.0},
    }
    refuses(ArgumentError, "factor", call=lambda: layerwise(normed_net("numpy"), 0.0))
