"""EleutherAI's lm_eval with a model named camopd_jax."""

import os
import sys
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from absl import flags
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from camopd_jax.config.schema import Compute, Sampling
from camopd_jax.errors import UserError
from camopd_jax.inference import engine
from camopd_jax.models import hf
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_distributed
from camopd_jax.runtime.mesh import make_mesh

MAX_LENGTH = 4096  # tokens, prompt and answer, where the model allows more


@register_model("camopd_jax")
class CamopdLM(TemplateLM):
    """A Hugging Face folder under lm_eval."""

    def __init__(
        self,
        path: str,
        batch_size: int | str = 16,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "auto",
        data: int = -1,
        fsdp: int = 1,
        tensor: int = 1,
        seed: int = 0,
        **_: Any,
    ):
        """
        Args:
          path: Hugging Face folder or hub name.
          batch_size: rows of a batch; data x fsdp has to divide it.
          max_length: of prompt and answer in tokens; longer ones lose their front. Default: the model's, at most 4,096.
          max_gen_toks: of an answer, where the task does not say; at most half of max_length.
          dtype: of parameters and matrix products: auto, float32 or bfloat16.
          data, fsdp, tensor: devices along each axis of the mesh.
          seed: of sampled answers.
        """
        super().__init__()
        folder = engine.find(path, "--model_args path")
        positions = int(hf.read_config(folder).get("max_position_embeddings", MAX_LENGTH))
        self.max_length = int(max_length) if max_length else min(MAX_LENGTH, positions)
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        compute = Compute(teacher=dtype, matmul=dtype)
        self.loaded = engine.load(
            folder, make_mesh(int(data), int(fsdp), int(tensor)), compute, dtype=engine.teacher_dtype(compute),
            context=self.max_length,
        )  # fmt: skip
        self.tokenizer = self.loaded.tokenizer

    # ------------------------------------------------------------------------------------ tokens

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.folder)

    @property
    def eot_token_id(self) -> int:
        return self.loaded.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; unless told, with the tokenizer's special tokens where the text does not begin with them."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{self.loaded.folder}: its tokenizer has no chat template; leave --apply_chat_template out"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -------------------------------------------------------------------------------- likelihoods

    def _loglikelihood_tokens(self, requests: list, **_: Any) -> list[tuple[float, bool]]:
        """Of each (texts, context ids, continuation ids): its log-likelihood, and whether greedy decoding says it."""
        found = self._score([(context, continuation) for _, context, continuation in requests])
        results = [(float(row[:, 0].sum()), bool(np.all(row[:, 0] >= row[:, 1]))) for row in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `max_length` where they are longer."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            for pair in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1):
                windows.append(make_disjoint_window(pair))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, row in zip(owners, self._score(windows), strict=True):
            sums[i] += float(row[:, 0].sum())
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """float32[n, 2] for the n tokens of each continuation; a pair that is too long loses its front."""
        room = [max(1, self.max_length - len(continuation)) for _, continuation in pairs]
        contexts = [context[-n:] for (context, _), n in zip(pairs, room, strict=True)]
        continuations = [continuation for _, continuation in pairs]
        return engine.score_responses(self.loaded, contexts, continuations, batch_size=self.batch_size, with_top=True)

    # ------------------------------------------------------------------------------------ answers

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Answers, cut at the first of the task's stop strings."""
        groups: dict[tuple[int, Sampling], list[int]] = defaultdict(list)
        stops = []
        for i, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops.append(handle_stop_sequences(settings["until"], self.tokenizer.decode([self.eot_token_id])))
            sampling = Sampling(
                temperature=settings["temperature"] if settings["do_sample"] else 0.0,
                top_k=int(settings.get("top_k") or 0),
                top_p=float(settings.get("top_p") or 1.0),
                min_p=float(settings.get("min_p") or 0.0),
            )
            groups[min(settings["max_gen_toks"], self.max_length // 2), sampling].append(i)
        texts = [""] * len(requests)
        for (max_new, sampling), numbers in groups.items():
            prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - max_new) :] for i in numbers]
            answers = engine.answer(
                self.loaded, prompts, max_new=max_new, batch_size=self.batch_size, sampling=sampling, seed=self.seed,
                rows=numbers,
            )  # fmt: skip
            for i, answer in zip(numbers, answers, strict=True):
                texts[i] = _until(answer.text, stops[i])
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts


def _until(text: str, stops: list[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def start() -> None:
    """Takes the flags of several processes from the command line, joins them and leaves the rest to lm_eval.

    The processes work as one: of those, lm_eval lets the one whose LOCAL_RANK is 0 report.
    """
    own = flags.FlagValues()
    own.set_gnu_getopt()
    cli.define_processes(own)
    try:
        sys.argv = own(sys.argv, known_only=True)
    except flags.Error as error:
        raise UserError(f"{error}; give numbers") from error
    engine.start(cli.processes(own))
    if is_distributed():
        os.environ["LOCAL_RANK"] = str(jax.process_index())
