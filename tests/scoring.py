"""Log-probabilities of tokens under a model of the package, and under one of transformers or PEFT on torch."""

import jax
import numpy as np
import torch


def log_probs(model, params, tokens):
    """The log-probability of each token except the first."""
    logits = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t)))(params, tokens)
    logp = jax.nn.log_softmax(logits, axis=-1)
    return np.take_along_axis(np.asarray(logp)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]


def torch_log_probs(model, tokens):
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor(tokens, dtype=torch.long)).logits.float(), -1).numpy()
    return np.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
