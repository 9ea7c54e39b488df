"""Store sentences in a memory, look at them, change one, forget one, keep the rest in a file.

No training is needed for these operations. Whether the right record is found comes with training: give a run.

python examples/store_and_forget.py [RUN]
"""

import sys
import tempfile
from pathlib import Path

import torch

import memlm


def main(run: str | None = None, *settings: str) -> list[str]:
    """Returns the texts that are held in the end.

    Args:
        run: A run or export; None for a model that nobody trained.
        *settings: Hydra overrides of the model that nobody trained.
    """
    torch.manual_seed(0)
    model = memlm.load(run) if run else memlm.build("memory=ltm", *settings)
    ann, bob = (model.store_experience(text)[0] for text in ("Ann lives in Fean.", "Bob was born in Pickwell."))
    for record in model.query_memory("Where does Ann live?", top_k=3):
        print(f"found {record.id}: {record.text!r}, weight {record.weight:.2f}")
    model.edit_memory(ann, "Ann lives in Oslo.")
    model.forget([bob])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "facts.memory"
        model.save_memory(file)
        model.forget([ann])
        model.load_memory(file)
    held = [record.text for record in model.list_memory(10)]
    print("held in the end:", held)
    return held


if __name__ == "__main__":
    main(*sys.argv[1:2])
