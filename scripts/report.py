"""Runs as one web page: `python scripts/report.py RUN...`, with directories of runs, evaluations or sweeps."""

from memlm.app.report import start

if __name__ == "__main__":
    start()
