"""Continue a text with a trained model: `python scripts/generate.py checkpoint=RUN prompt="Once upon a time"`."""

from memlm.app.generate import start

if __name__ == "__main__":
    start()
