"""Short runs on two random models of a family, which have the quickstart's tokenizer."""

import torch
import transformers
from quickstart import PAPER_CONFIG, QUICKSTART

FLAGS = [
    PAPER_CONFIG, "--config.branches.recovery.steps=1",
    "--config.rollout.batch_size=16", "--config.optimizer.micro_batch=8", "--config.optimizer.schedule=constant",
    "--config.optimizer.learning_rate=1e-3", "--config.optimizer.eps=1e-5", "--config.compute.remat=none",
    "--config.evaluation.benchmarks=()", "--config.log.report=false",
]  # fmt: skip
# Of the config of a text model
TEXT = dict(
    vocab_size=52,
    hidden_size=24,
    intermediate_size=22,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    initializer_range=0.3,
    max_position_embeddings=256,
    eos_token_id=5,
    pad_token_id=0,
    bos_token_id=None,
)


def save_pair(model, folder, text_model=None):
    """Saves a model and a copy with other weights in its text model; flags that name the two folders."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(QUICKSTART / "generalist")
    for name in ("general", "specialised"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in (text_model or model).parameters():
                parameter.add_(0.03 * torch.randn_like(parameter))
    return [f"--config.{name}_model={folder / name}" for name in ("general", "specialised")]
