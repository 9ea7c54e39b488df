"""Measure speed: `python scripts/benchmark.py train [key=value ...]`, or another name of `configs/benchmark/`."""

from memlm.app.benchmark import start

if __name__ == "__main__":
    start()
