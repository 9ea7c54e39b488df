"""Write a trained model as safetensors and JSON: `python scripts/export.py checkpoint=RUN output=DIR`."""

from __future__ import annotations

from omegaconf import DictConfig

from memlm.app.cli import cli
from memlm.compose import to_dict


@cli("export")
def main(cfg: DictConfig) -> None:
    """Write the files and name them."""
    from memlm.checkpoint import export, load

    files = export(load(cfg.checkpoint, trust=to_dict(cfg.trust)), cfg.output)
    print("Written:", *(f"  {path}" for path in files), sep="\n")
    print(f"\nIn Python: memlm.load({str(cfg.output)!r})")


def start() -> None:
    """What the command line runs."""
    main()


if __name__ == "__main__":
    start()
