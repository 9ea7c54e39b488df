"""Worth: what memory is worth on text as it is, where in a document, and for which words."""

from experiments.worth.experiment import run
from experiments.worth.figures import plot
from experiments.worth.settings import Worth

__all__ = ["Worth", "plot", "run"]
