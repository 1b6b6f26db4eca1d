"""Pictures of a training run, of a network and of its errors, by matplotlib (the extra ``plot``).

Each function returns a matplotlib ``Figure``; ``figure.savefig("curves.pdf")`` writes it, a
notebook shows it. Nothing touches pyplot or its current figure. Colours are Okabe and Ito's and
the map cividis, which the colour-blind can tell apart; lines differ in style and marker too.
"""

from portacnn.plot.attribution import grad_cam, receptive_field, saliency
from portacnn.plot.augmented import augmented
from portacnn.plot.classes import confusion_matrix, worst_errors
from portacnn.plot.curves import curves
from portacnn.plot.embedding import embedding
from portacnn.plot.neighbors import neighbors
from portacnn.plot.network import feature_maps, filters
from portacnn.plot.overlays import boxes, segmentation

__all__ = [
    "augmented",
    "boxes",
    "confusion_matrix",
    "curves",
    "embedding",
    "feature_maps",
    "filters",
    "grad_cam",
    "neighbors",
    "receptive_field",
    "saliency",
    "segmentation",
    "worst_errors",
]
