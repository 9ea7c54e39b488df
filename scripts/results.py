"""Keep what runs found in results/, and make the tables of pages of it: `python scripts/results.py NAME RUN...`."""

from memlm.app.results import start

if __name__ == "__main__":
    start()
