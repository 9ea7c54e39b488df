"""Continual learning: what is left of a task when others were learned after it, with and without replay?"""

from experiments.continual.experiment import run
from experiments.continual.figures import plot
from experiments.continual.settings import Continual

__all__ = ["Continual", "plot", "run"]
