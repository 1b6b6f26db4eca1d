"""ONNX emitters and converters of the layers: one module for each module of ``portacnn.layers``.

An *emitter* writes a layer (``builder.emitter``); a *converter* reads an operator
(``importer.operator``). The emitter and converter of a layer are next to each other.

Writing: all sizes except the batch are known at export, so everything is written explicitly:
paddings are numbers, and ``ceil_mode`` becomes padding. If onnxruntime does not support what the
standard allows, the emitter writes other operators, and its docstring says so.

Reading: operators that mix the samples of a batch, and weights computed from the input, are not
supported, because a network processes any number of independent samples. See onnx.ai/onnx/operators
for the definition of each operator in each opset.
"""

from portacnn.onnx.layers import activation as activation
from portacnn.onnx.layers import constants as constants
from portacnn.onnx.layers import container as container
from portacnn.onnx.layers import conv as conv
from portacnn.onnx.layers import dropout as dropout
from portacnn.onnx.layers import join as join
from portacnn.onnx.layers import linear as linear
from portacnn.onnx.layers import microsoft as microsoft
from portacnn.onnx.layers import norm as norm
from portacnn.onnx.layers import pool as pool
from portacnn.onnx.layers import quantize as quantize
from portacnn.onnx.layers import resize as resize
from portacnn.onnx.layers import shape as shape
