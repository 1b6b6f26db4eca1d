"""How each layer is written to ONNX and read from it: one module for each in ``portacnn.layers``.

What writes a layer is an *emitter* (``builder.emitter``), what reads an operator a *converter*
(``importer.operator``). Those of one layer stand together.

Writing: sizes are known when a network is exported, except the batch. So nothing is left to the
runtime's choice: paddings are numbers, and a window beyond the end (``ceil_mode``) is padding. If
onnxruntime is known to refuse what the standard allows, the way around it is always taken, and a
docstring says so.

Reading: an operator that could mix the samples of a batch, or whose weights are computed from the
input, is refused: a network here takes any number of samples, each by itself. See
onnx.ai/onnx/operators for the meaning of each operator, opset by opset.
"""

from portacnn.onnx.layers import activation as activation
from portacnn.onnx.layers import constants as constants
from portacnn.onnx.layers import container as container
from portacnn.onnx.layers import conv as conv
from portacnn.onnx.layers import dropout as dropout
from portacnn.onnx.layers import join as join
from portacnn.onnx.layers import linear as linear
from portacnn.onnx.layers import norm as norm
from portacnn.onnx.layers import pool as pool
from portacnn.onnx.layers import resize as resize
from portacnn.onnx.layers import shape as shape
