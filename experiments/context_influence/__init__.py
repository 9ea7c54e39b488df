"""Context influence: how much memory changes the prediction of each token, and whether for the better."""

from experiments.context_influence.experiment import ContextInfluence, run
from experiments.context_influence.figures import plot

__all__ = ["ContextInfluence", "plot", "run"]
