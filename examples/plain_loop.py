"""Train a model with a memory in a loop of plain PyTorch: documents in order, the state carried from window to window.

python examples/plain_loop.py
"""

import torch
from torch.nn import functional as F

import memlm
from memlm.memory.state import detach

STEPS, ROWS, SEGMENTS = 30, 4, 2


def main(*settings: str, steps: int = STEPS) -> list[float]:
    """Train on one long text, each row at a place of its own.

    Args:
        *settings: Hydra overrides of the model.
        steps: Steps of the optimizer.

    Returns:
        The loss of each step.
    """
    torch.manual_seed(0)
    model = memlm.build("model=lmcode", "memory=ltm", "model.n_layer=2", *settings)
    text = "".join(f"Line {n} says that {n} and {n + 1} make {2 * n + 1}. " for n in range(2000))
    ids = torch.tensor(model.tokenizer.encode(text))
    width = SEGMENTS * model.segment_len
    rows = ids[: len(ids) // ROWS * ROWS].view(ROWS, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    state, losses = None, []
    for step in range(steps):
        start = step * width
        window = rows[:, start : start + width + 1]
        out = model(window[:, :-1], state=state)
        loss = F.cross_entropy(out.logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state = detach(out.state)  # the memory goes on, gradients stop here
        losses.append(loss.item())
        print(f"step {step + 1}: loss {loss.item():.2f}")
    return losses


if __name__ == "__main__":
    main()
