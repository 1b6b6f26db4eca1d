"""Pictures, by matplotlib (the extra ``plot``). Each function returns a matplotlib ``Figure``."""

from portacnn.plot.augmented import augmented

__all__ = ["augmented"]
