"""Put runs side by side: `python scripts/compare.py RUN...`, with directories of runs, evaluations or sweeps."""

from memlm.app.compare import start

if __name__ == "__main__":
    start()
