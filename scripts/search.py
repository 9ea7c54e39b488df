"""Search for good settings of train.py: `python scripts/search.py training.lr='tag(log, interval(1e-4, 1e-2))'`."""

from memlm.app.search import start

if __name__ == "__main__":
    start()
