"""The table of examples for hypothesis: it chooses sizes and options, and makes a failing example
smaller."""

from hypothesis import strategies as st

from portacnn.testing.examples import EXAMPLES, Arguments, Random
from portacnn.testing.random import Scale

seeds = st.integers(0, 99)


class Drawn(Random):
    def __init__(self, draw: st.DrawFn, scale: Scale) -> None:
        super().__init__(draw(seeds), scale)
        self._draw = draw

    def whole(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


@st.composite
def arguments_of(draw: st.DrawFn, name: str, scale: Scale = "medium") -> Arguments:
    """The arguments of an example, by name: arrays in float64."""
    return EXAMPLES[name].draw(Drawn(draw, scale))
