"""Keywords of PyTorch, Keras and scikit-learn: the error names the keyword to use here."""

import copy
import pickle

import pytest

from portacnn import EarlyStopping, Normalize, SimpleConvNet, Trainer, data, load, onnx
from portacnn.callbacks import CSVLogger, TensorBoard, lr_range_test
from portacnn.errors import ArgumentError
from portacnn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    LeakyReLU,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Softmax,
)
from portacnn.losses import CrossEntropy, NTXent, Triplet
from portacnn.metrics import F1, TopK
from portacnn.models import VGG11, DeepConvNet, Model, ResNet20
from portacnn.optim import SGD, Adam, RMSprop
from portacnn.schedules import CosineAnnealingLR, StepLR, warm_up


@pytest.mark.parametrize(
    ("called", "keyword", "answer"),
    [
        (Adam, "learning_rate", "called lr here"),
        (Adam, "betas", "called beta1 and beta2 here"),
        (Adam, "epsilon", "called eps here"),
        (Adam, "amsgrad", "not supported"),
        (RMSprop, "rho", "called alpha here"),
        (SGD, "momentun", "did you mean momentum?"),
        (StepLR, "steps", "called step_size here"),
        (CosineAnnealingLR, "min_lr", "called eta_min here"),
        (EarlyStopping, "restore_best_weights", "called restore_best here"),
        (Normalize, "stdd", "did you mean std?"),
        (SimpleConvNet, "n_classes", "called num_classes or output_size here"),
        (ResNet20, "input_shape", "called in_channels or input_size here"),
        (VGG11, "classes", "called num_classes here"),
        (DeepConvNet, "output_size", "called num_classes here"),
        (DeepConvNet, "rate", "called dropout here"),
        (Linear, "units", "called out_features here"),
        (Linear, "in_channels", "called in_features here"),
        (Conv2d, "filters", "called out_channels here"),
        (Conv2d, "in_features", "called in_channels here"),
        (Conv2d, "strides", "called stride here"),
        (Conv2d, "kernel_initializer", "called weight_init here"),
        (Conv2d, "activation", "such as ReLU()"),
        (Conv2d, "data_format", "(N, C, H, W)"),
        (MaxPool2d, "pool_size", "called kernel_size here"),
        (AvgPool2d, "pad", "called padding here"),
        (BatchNorm2d, "epsilon", "called eps here"),
        (Dropout, "rate", "called p here"),
        (LeakyReLU, "alpha", "called negative_slope here"),
        (Softmax, "axis", "called dim here"),
        (ReLU, "inplace", "leave it out"),
        (Flatten, "start_dim", "it takes no arguments"),
        (data.load_mnist, "data_home", "called root here"),
        (data.load_mnist_sample, "normalise", "did you mean normalize?"),
        (data.load_idx_folder, "onehot", "called one_hot_label here"),
        (onnx.load, "backend", "called device here"),
        (onnx.export, "opset_version", "called opset here"),
        (load, "map_location", "called device here"),
        (Trainer, "criterion", "called loss here"),
        (Trainer, "optim", "called optimizer here"),
        (Trainer, "num_epochs", "called epochs here"),
        (Trainer, "learning_rate", "called lr here"),
        (Trainer, "val_data", "called x_test and t_test here"),
        (Trainer, "validation_data", "called x_test and t_test here"),
        (Trainer, "X", "called x_train here"),
        (Trainer, "class_weights", "called class_weight here"),
        (Trainer, "weights", "called class_weight or sample_weight here"),
        (Trainer, "test_size", "called validation_split here"),
        (Trainer, "early_stop", "called early_stopping here"),
        (Trainer, "transforms", "called augment here"),
        (Trainer, "eps", "optimizer_param"),
        (Trainer, "train_loader", "data.Stream"),
        (Trainer, "logger", "CSVLogger"),
        (Trainer.train, "epochs", "pass it to Trainer"),
        (CrossEntropy, "class_weights", "called weight here"),
        (CrossEntropy, "reduction", "leave it out"),
        (NTXent, "tau", "called temperature here"),
        (Triplet, "mining", "called triplets here"),
        (TopK, "topk", "called k here"),
        (F1, "averaging", "did you mean average?"),
        (CSVLogger, "filename", "called path here"),
        (TensorBoard, "log_dir", "called folder here"),
        (EarlyStopping, "mode", "called better here"),
        (lr_range_test, "end_lr", "called highest here"),
    ],
)
def test_a_foreign_keyword_is_answered(called, keyword, answer):
    with pytest.raises(TypeError) as caught:
        called(**{keyword: 1})
    assert f"does not take {keyword} (" in str(caught.value) or answer.startswith("it takes")
    assert answer in str(caught.value)


def test_the_two_names_of_a_network():
    net = SimpleConvNet(num_classes=3, weight_init="he", seed=0)
    book = SimpleConvNet(output_size=3, weight_init_std="he", seed=0)
    assert net.output_shape == book.output_shape == (3,)
    assert SimpleConvNet((1, 8, 8), seed=0).output_shape == (10,)
    for path, array in net.state_dict().items():
        assert (array == book.state_dict()[path]).all()
    with pytest.raises(ArgumentError, match="num_classes and output_size are names of one"):
        SimpleConvNet(num_classes=3, output_size=3)
    with pytest.raises(ArgumentError, match="weight_init and weight_init_std are names of one"):
        SimpleConvNet(weight_init="he", weight_init_std=0.01)


def test_classes_that_take_any_keyword_still_do():
    assert Sequential(x=ReLU(), lr=ReLU())
    assert Model(units=Linear(2, 2))

    class Mine(Layer):
        def __init__(self, **options):
            self.options = options

    assert Mine(lr=1).options == {"lr": 1}


def test_copies_and_pickles():
    for made in (StepLR(3), warm_up(3), EarlyStopping(2), Normalize(mean=0.5)):
        assert copy.deepcopy(made) == made == pickle.loads(pickle.dumps(made))
