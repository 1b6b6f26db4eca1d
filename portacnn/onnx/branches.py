"""``If`` whose condition is known when the file is read: the operations of one branch."""

from portacnn.onnx.importer import Importer
from portacnn.onnx.reading import Operation, operation
from portacnn.onnx.supported import check_supported, needed
from portacnn.onnx.values import Known, Value
from portacnn.text import quoted


def chosen_branch(at: Importer, op: Operation) -> tuple[list[Operation], list[str]]:
    """Return the operations of the branch that runs, with names that are unique in the file, and
    the names of its outputs.

    Raises:
        ModelFormatError: if the condition depends on the network's input, or the branch refers to
            values that do not exist.
    """
    condition = at.given(op, 0)
    if not isinstance(condition, Known):
        raise op.wrong(
            "its condition depends on the network's input; only conditions that are known when the "
            "file is read are supported"
        )
    array = condition.array
    if array.dtype.kind != "b" or array.size != 1 or condition.per_sample is not None:
        raise op.wrong(f"its condition must be one boolean, got {array.dtype}")
    taken, other = ("then_branch", "else_branch")[:: 1 if array.item() else -1]
    graph = op.graph(taken)
    op.ignore(other)
    if graph is None or graph.inputs or graph.sparse or len(graph.outputs) < len(op.outputs):
        raise op.wrong(f"its {taken} is missing, or it has inputs or too few outputs")
    scope, prefix = dict(op.scope), f"{op.label}/"
    for tensor in graph.initializers:
        scope[tensor.name] = prefix + tensor.name
        at.source.initializers[scope[tensor.name]] = tensor
    made, known = [], {scope[tensor.name] for tensor in graph.initializers}
    for node in graph.nodes:
        inner = operation(node)
        inner.scope = dict(scope)
        for name in inner.outputs:
            if name and prefix + name in known:
                raise inner.wrong(f"its output {quoted(name)} already exists")
            if name:
                scope[name] = prefix + name
                known.add(scope[name])
        inner.inputs = [inner.scope.get(name, name) for name in inner.inputs]
        inner.outputs = [scope[name] if name else "" for name in inner.outputs]
        made.append(inner)
    outputs = [scope.get(value.name, value.name) for value in graph.outputs]
    operations, _ = needed(made, outputs)
    there = known | set(at.values) | set(at.sequences) | set(at.source.initializers)
    used = [name for inner in operations for name in inner.inputs if name]
    for name in (*used, *outputs):
        if name not in there:
            raise op.wrong(f"no node computes {quoted(name)}, which its {taken} uses")
    check_supported(operations, [n for n, value in at.values.items() if isinstance(value, Value)])
    return operations, outputs
