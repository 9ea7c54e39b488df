"""Write a trained model as safetensors and JSON: `python scripts/export.py checkpoint=RUN output=DIR`."""

from __future__ import annotations

from omegaconf import DictConfig

from memlm.cli import cli


@cli("export")
def main(cfg: DictConfig) -> None:
    """Write the files and name them."""
    from memlm.checkpoint import export, load

    files = export(load(cfg.checkpoint), cfg.output)
    print("Written:", *(f"  {path}" for path in files), sep="\n")
    print(f"\nIn Python: memlm.load({str(cfg.output)!r})")


if __name__ == "__main__":
    main()
