"""Write a trained model as safetensors and JSON: `python scripts/export.py checkpoint=RUN output=DIR`."""

from memlm.app.export import start

if __name__ == "__main__":
    start()
