"""Models of other libraries that `benchmarks.mixers` puts beside memories.

Shapes: B rows, L tokens of a prompt, N tokens of text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from benchmarks.base import Peer, peer_library
from benchmarks.candidates import Setup
from memlm.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

PeerName = Literal["titans-pytorch", "rmt-pytorch", "memorizing-pytorch"]
_OUT = "it out of peers"
PEERS: dict[str, Peer] = {
    "titans-pytorch": Peer("titans_pytorch", "titans-pytorch needs the library titans-pytorch", _OUT),
    "rmt-pytorch": Peer(
        "recurrent_memory_transformer_pytorch",
        "rmt-pytorch needs the library recurrent-memory-transformer-pytorch",
        _OUT,
    ),
    "memorizing-pytorch": Peer(
        "memorizing_transformers_pytorch",
        "memorizing-pytorch needs the library memorizing-transformers-pytorch, which needs faiss",
        _OUT,
    ),
}


class Parts(NamedTuple):
    """What a peer is made of.

    Attributes:
        model: The model.
        loss: Its loss on text (B, N + 1).
        generate: Goes on with a prompt (1, L) by some tokens; None if the library cannot.
    """

    model: Any
    loss: Callable[[Tensor], Tensor]
    generate: Callable[[Tensor, int], Any] | None


class Theirs:
    """A model of another library, trained by our optimizer.

    Attributes:
        setup: The shape.
        n_parameter: Number of parameters.
        n_byte: NaN: what a peer keeps is not known.
    """

    def __init__(self, parts: Parts, setup: Setup) -> None:
        from memlm.training.module import LanguageModeling
        from memlm.training.settings import Training

        self.parts, self.setup = parts, setup
        settings = {key: value for key, value in setup.config["training"].items() if key != "_target_"}
        module = LanguageModeling(cast(Any, parts.model), Training(**settings), total_steps=10**6)
        self.optimizer = module.configure_optimizers()["optimizer"]
        self.n_parameter = sum(parameter.numel() for parameter in parts.model.parameters())
        self.n_byte = float("nan")

    def step(self, text: Tensor) -> Tensor:
        """One training step on text (B, N + 1). Returns the loss."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(text.device.type, dtype=torch.bfloat16, enabled=self.setup.precision == "bf16"):
            loss = self.parts.loss(text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parts.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()

    def generate(self, prompt: Tensor, n: int) -> bool:
        """Go on with a prompt (1, L) by ``n`` tokens; False if the library cannot."""
        if self.parts.generate is not None:
            self.parts.generate(prompt, n)
        return self.parts.generate is not None

    def check(self, name: str) -> None:
        """Nothing is known of what a peer does inside."""


def _titans(library: Any, setup: Setup, folder: str) -> Parts:
    """Titans, memory as context, in the second layer, with the chunks of its example."""
    model = library.MemoryAsContextTransformer(
        num_tokens=setup.n_vocab, segment_len=setup.segment_len, num_persist_mem_tokens=4, num_longterm_mem_tokens=4,
        neural_memory_layers=(2,), neural_memory_segment_len=4, neural_memory_batch_size=setup.segment_len,
        **_shape(setup),
    ).to(setup.device)  # fmt: skip

    def generate(prompt: Tensor, n: int) -> None:
        model.sample(prompt, prompt.shape[1] + n, show_progress=False, use_cache=True)

    return Parts(model, lambda text: model(text, return_loss=True), generate)


def _rmt(library: Any, setup: Setup, folder: str) -> Parts:
    """The recurrent memory transformer with 8 memory tokens and nothing of its extensions."""
    inner = library.RecurrentMemoryTransformer(
        num_tokens=setup.n_vocab, num_memory_tokens=8, seq_len=setup.segment_len, use_xl_memories=False, **_shape(setup)
    ).to(setup.device)
    model = library.RecurrentMemoryTransformerWrapper(inner)

    def loss(text: Tensor) -> Tensor:
        found = model(text, return_loss=True)
        return found[0] if isinstance(found, tuple) else found

    return Parts(model, loss, lambda prompt, n: model.generate(prompt, length=prompt.shape[1] + n))


def _memorizing(library: Any, setup: Setup, folder: str) -> Parts:
    """The memorizing transformer, whose memory is emptied before each step; it cannot generate by itself."""
    model = library.MemorizingTransformer(
        num_tokens=setup.n_vocab, knn_memories_directory=folder, max_knn_memories=10_000, num_retrieved_memories=32,
        **_shape(setup),
    ).to(setup.device)  # fmt: skip

    def loss(text: Tensor) -> Tensor:
        parts = list(zip(*(part.split(setup.segment_len, dim=1) for part in (text[:, :-1], text[:, 1:])), strict=True))
        with model.knn_memories_context(batch_size=len(text)) as memories:
            return sum(model(ids, knn_memories=memories, labels=labels) for ids, labels in parts) / len(parts)

    return Parts(model, loss, None)


def _shape(setup: Setup) -> dict[str, int]:
    """What peers are told of our model."""
    model = setup.config["model"]
    return {
        "dim": model["d_model"],
        "depth": model["n_layer"],
        "heads": model["n_head"],
        "dim_head": model["d_model"] // model["n_head"],
    }


_BUILD: dict[str, Callable[[Any, Setup, str], Parts]] = {
    "titans-pytorch": _titans,
    "rmt-pytorch": _rmt,
    "memorizing-pytorch": _memorizing,
}


def build(name: str, library: Any, setup: Setup, folder: str) -> Parts:
    """A peer in the shape of our models.

    Args:
        name: One of `PEERS`.
        library: What was imported.
        setup: The shape.
        folder: Where it may keep files.
    """
    return _BUILD[name](library, setup, folder)


def installed(name: str) -> bool:
    """Whether the library of a peer can be imported."""
    try:
        peer_library(PEERS[name])
    except ConfigError:
        return False
    return True
