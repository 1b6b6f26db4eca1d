"""Networks: ``Model``, and the architectures built on it."""

from typing import TYPE_CHECKING

from portacnn.lazy import lazily

if TYPE_CHECKING:
    from portacnn.models.alexnet import AlexNet
    from portacnn.models.attribution import grad_cam, input_gradient, layer_gradient, saliency
    from portacnn.models.deep_conv_net import DeepConvNet
    from portacnn.models.graph_model import GraphModel
    from portacnn.models.info import ModelInfo
    from portacnn.models.lenet5 import LeNet5
    from portacnn.models.mobilenet import EfficientNetB0, MobileNetV2
    from portacnn.models.model import Model, load
    from portacnn.models.preprocess import Normalize
    from portacnn.models.registry import MODELS, make_model, model_options
    from portacnn.models.resnet import ResNet18, ResNet20, ResNet50
    from portacnn.models.simple_conv_net import SimpleConvNet
    from portacnn.models.unet import UNet
    from portacnn.models.vgg import VGG11, VGG16
else:
    __getattr__, __dir__ = lazily(
        __name__,
        {
            "portacnn.models.alexnet": ("AlexNet",),
            "portacnn.models.attribution": (
                "grad_cam",
                "input_gradient",
                "layer_gradient",
                "saliency",
            ),
            "portacnn.models.deep_conv_net": ("DeepConvNet",),
            "portacnn.models.graph_model": ("GraphModel",),
            "portacnn.models.info": ("ModelInfo",),
            "portacnn.models.lenet5": ("LeNet5",),
            "portacnn.models.mobilenet": ("EfficientNetB0", "MobileNetV2"),
            "portacnn.models.model": ("Model", "load"),
            "portacnn.models.preprocess": ("Normalize",),
            "portacnn.models.registry": ("MODELS", "make_model", "model_options"),
            "portacnn.models.resnet": ("ResNet18", "ResNet20", "ResNet50"),
            "portacnn.models.simple_conv_net": ("SimpleConvNet",),
            "portacnn.models.unet": ("UNet",),
            "portacnn.models.vgg": ("VGG11", "VGG16"),
        },
    )

__all__ = [
    "MODELS",
    "VGG11",
    "VGG16",
    "AlexNet",
    "DeepConvNet",
    "EfficientNetB0",
    "GraphModel",
    "LeNet5",
    "MobileNetV2",
    "Model",
    "ModelInfo",
    "Normalize",
    "ResNet18",
    "ResNet20",
    "ResNet50",
    "SimpleConvNet",
    "UNet",
    "grad_cam",
    "input_gradient",
    "layer_gradient",
    "load",
    "make_model",
    "model_options",
    "saliency",
]
