"""What the check before a run refuses; sound models pass it in every run of the other tests."""

from types import SimpleNamespace

import numpy as np
import pytest

from camopd_jax.errors import UserError
from camopd_jax.inference import model_check

CONFIG = SimpleNamespace(vocab_size=14, output_vocab_size=13)
LOADED = SimpleNamespace(mesh=None, model=SimpleNamespace(dtype="float32", config=CONFIG))
SEQUENCES = [[1, 2, 3], [4], [13], [5, 6], [7, 8, 13, 9, 10], [11, 12]]  # 13 has no logit


def log_probs(of_batch):
    """In the place of `score_responses`: -0.1 for every token, and what `of_batch(prompts)` adds."""

    def score(loaded, prompts, responses, **_):
        assert len(prompts) == 4 and all(map(len, prompts)) and all(map(len, responses))
        assert all(i < 13 for ids in (*prompts, *responses) for i in ids)
        return [np.full(len(response), -0.1, np.float32) + of_batch(prompts) for response in responses]

    return score


@pytest.mark.parametrize("of_batch, says", [
    (lambda prompts: 0, None),
    (lambda prompts: np.nan, "config.general_model = here: log-probabilities of this model are not finite in float32"),
    (lambda prompts: 0.1 - np.log(13), "gives every token the same probability"),
    (lambda prompts: 0.01 * sum(map(sum, prompts)), "other sequences are in its batch"),
])  # fmt: skip
def test_log_probs_are_finite_and_those_of_a_sequence_alone(monkeypatch, of_batch, says):
    monkeypatch.setattr(model_check, "score_responses", log_probs(of_batch))
    if says is None:
        model_check.check_log_probs(LOADED, "config.general_model = here", SEQUENCES)
    else:
        with pytest.raises(UserError, match=says):
            model_check.check_log_probs(LOADED, "config.general_model = here", SEQUENCES)
