"""Continue a text with a trained model: `python scripts/generate.py checkpoint=RUN prompt="Once upon a time"`."""

from typing import Any

from omegaconf import DictConfig

from memlm.cli import cli, to_dict
from memlm.config import ConfigError


@cli("generate")
def main(cfg: DictConfig) -> str:
    """Print the prompt and what the model makes of it; returns both."""
    prompt = "" if cfg.prompt is None else str(cfg.prompt)
    if not prompt:
        raise ConfigError("prompt is empty: give the beginning of a text, such as prompt='Once upon a time'.")
    import torch

    from memlm.checkpoint import load, place

    model: Any = load(cfg.checkpoint, trust=to_dict(cfg.trust))
    place(model, cfg.device)
    ids = model.tokenizer.encode(prompt)
    if not ids:
        raise ConfigError(f"the tokenizer of the model makes nothing of prompt={prompt!r}: give other text.")
    torch.manual_seed(cfg.seed)
    tokens = model.generate(
        torch.tensor([ids], device=next(model.parameters()).device),
        cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
    )
    text = model.tokenizer.decode(tokens[0].tolist())
    print(text)
    return text


if __name__ == "__main__":
    main()
