"""Write a trained model as safetensors and JSON: `python scripts/export.py checkpoint=RUN output=DIR`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memlm.app.cli import cli


@cli("export")
def main(config: Mapping[str, Any]) -> None:
    """Write the files and name them."""
    from memlm.checkpoint import export, load

    output = config["output"]
    files = export(load(config["checkpoint"], trust=config["trust"]), output)
    print("Written:", *(f"  {path}" for path in files), sep="\n")
    print(f"\nIn Python: memlm.load({str(output)!r})")


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
