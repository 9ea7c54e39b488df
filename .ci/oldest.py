"""Print the oldest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path


def oldest(pyproject: str) -> dict[str, str]:
    """Return the lower bound of every dependency and extra, by the name of its package."""
    project = tomllib.loads(pyproject)["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = (re.match(r"([\w.-]+)(?:\[[\w,]*\])?[>=]=([\d.]+)", line) for group in groups for line in group)
    return {bound[1]: bound[2] for bound in found if bound}


if __name__ == "__main__":
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    print("\n".join(f"{name}=={version}" for name, version in oldest(text).items()))
