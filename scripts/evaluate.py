"""Measure what the memory of a trained model remembers: `python scripts/evaluate.py checkpoint=RUN`."""

from memlm.app.evaluate import start

if __name__ == "__main__":
    start()
