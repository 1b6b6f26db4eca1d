"""Trees of JSON for the tests of files: drawn ones, and one with a node replaced."""

from hypothesis import strategies as st

scalars = st.none() | st.booleans() | st.integers(-3, 40) | st.floats(-2, 2) | st.text(max_size=6)
plain_json = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=4,
)


def replaced(tree, index, new):
    """``tree`` with its ``index``-th node replaced, and the count of nodes."""
    counter = iter(range(10**6))

    def walk(node):
        if next(counter) == index:
            return new
        if isinstance(node, dict):
            return {key: walk(value) for key, value in node.items()}
        return [walk(value) for value in node] if isinstance(node, list) else node

    return walk(tree), next(counter)
