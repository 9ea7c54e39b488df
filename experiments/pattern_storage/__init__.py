"""Pattern storage: can what was stored be found again, among other things that were stored?"""

from experiments.pattern_storage.experiment import PatternStorage, run
from experiments.pattern_storage.figures import plot

__all__ = ["PatternStorage", "plot", "run"]
