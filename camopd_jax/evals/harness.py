"""Registers a model named camopd_jax with EleutherAI's lm_eval."""

import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from camopd_jax.config.schema import Compute, Sampling
from camopd_jax.data import sources, templates
from camopd_jax.data.templates import Messages
from camopd_jax.errors import UserError
from camopd_jax.inference import loading
from camopd_jax.inference.answer import answer
from camopd_jax.inference.log_probs import score_responses
from camopd_jax.models import hf
from camopd_jax.models.config_json import text_config
from camopd_jax.models.peft_settings import base_folder
from camopd_jax.runtime import cli
from camopd_jax.runtime.distributed import is_distributed
from camopd_jax.runtime.mesh import check_rows, make_mesh
from camopd_jax.runtime.start import start

MAX_LENGTH = 4096  # tokens, prompt and answer, where the model allows more
DTYPES = ("auto", "float32", "bfloat16")


@register_model("camopd_jax")
class CamopdLM(TemplateLM):
    """Runs lm_eval's requests on a Hugging Face checkpoint."""

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
        """Loads the model. lm_eval passes the fields of --model_args, as numbers or text.

        Args:
          path: Hugging Face folder or hub name.
          batch_size: rows of a batch; data x fsdp must divide it.
          max_length: of prompt and answer in tokens; longer prompts are cut at the start. The last token of a scored
            text is not an input and not counted, as in the models of lm_eval. Default: the maximum of the model, at
            most 4,096.
          max_gen_toks: maximum length of an answer if the task gives none; at most half of max_length.
          dtype: of parameters and matrix products: auto, float32 or bfloat16.
          data, fsdp, tensor: devices along each mesh axis.
          seed: for sampled answers.

        Raises:
          UserError: for a model that cannot be read, and for sizes that do not fit the devices.
        """
        super().__init__()
        if dtype not in DTYPES:
            raise UserError(f"--model_args dtype={dtype}: give {', '.join(DTYPES)}")
        folder = loading.find(path, "--model_args path")
        fields = text_config(hf.read_config(base_folder(folder)))[0]
        positions = int(fields.get("max_position_embeddings", MAX_LENGTH))
        self.max_length = int(max_length) if max_length else min(MAX_LENGTH, positions)
        self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        compute = Compute(teacher=dtype, matmul=dtype)  # type: ignore[arg-type]  # one of DTYPES
        mesh, weights = make_mesh(int(data), int(fsdp), int(tensor)), loading.teacher_dtype(compute)
        check_rows(mesh, "--batch_size", self.batch_size, "--model_args")
        self.loaded = loading.load(folder, mesh, compute, dtype=weights, context=self.max_length)
        self.tokenizer = self.loaded.tokenizer

    # ------------------------------------------------------------------------------------ tokens

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval caches results that depend on the tokenizer."""
        return str(self.loaded.folder)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.loaded.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The token before the first token of a text."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text.

        Args:
          add_special_tokens: None: add special tokens, unless the text starts with the BOS token.
        """
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        read = templates.text_ids if add_special_tokens else templates.tokens
        with sources.naming(f"lm_eval's text {string[:60]!r}"):
            return self.loaded.reader.check(read(self.tokenizer, string))

    def apply_chat_template(self, chat_history: Messages, add_generation_prompt: bool = True) -> str:
        """A conversation rendered by the chat template."""
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

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, and whether it is the greedy one.

        Args:
          requests: (texts, context ids, continuation ids) of each.
        """
        log_probs = self._score([(context, continuation) for _, context, continuation in requests])
        results = [(float(row[:, 0].sum()), bool(np.all(row[:, 0] >= row[:, 1]))) for row in log_probs]
        for request, result in zip(requests, results, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text; a long text is split into windows of `max_length`."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append(make_disjoint_window(window))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, log_probs in zip(owners, self._score(windows), strict=True):
            sums[i] += float(log_probs[:, 0].sum())
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """For each (context, continuation), float32[n, 2]: the log-probabilities of the continuation's n tokens, and of
        the most likely token at each position. Contexts that are too long are cut at the start.
        """
        contexts = [context[-max(1, self.max_length + 1 - len(after)) :] for context, after in pairs]
        continuations = [after for _, after in pairs]
        return score_responses(self.loaded, contexts, continuations, batch_size=self.batch_size, with_top=True)

    # ------------------------------------------------------------------------------------ answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """An answer to each prompt, cut at the first stop string."""
        groups: dict[tuple[int, Sampling], list[int]] = defaultdict(list)  # requests with the same settings
        stops = []
        end_of_text = self.tokenizer.decode([self.eot_token_id])
        for i, request in enumerate(requests):
            settings = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            stops.append(handle_stop_sequences(settings["until"], end_of_text))
            groups[min(settings["max_gen_toks"], self.max_length // 2), _sampling(settings)].append(i)
        texts = [""] * len(requests)
        for (max_new, sampling), numbers in groups.items():
            prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - max_new) :] for i in numbers]
            answers = answer(
                self.loaded,
                prompts,
                max_new=max_new,
                batch_size=self.batch_size,
                sampling=sampling,
                seed=self.seed,
                rows=numbers,
            )
            for i, given in zip(numbers, answers, strict=True):
                texts[i] = _until(given.text, stops[i])
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Converts lm_eval's settings of a request."""
    return Sampling(
        temperature=settings["temperature"] if settings["do_sample"] else 0.0,
        top_k=int(settings.get("top_k") or 0),
        top_p=float(settings.get("top_p") or 1.0),
        min_p=float(settings.get("min_p") or 0.0),
    )


def _until(text: str, stops: list[str]) -> str:
    """The text before the first of the stop strings."""
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


def join_processes() -> None:
    """Reads the flags for several processes, connects the processes, and leaves all other flags to lm_eval.

    lm_eval reports only from the process whose LOCAL_RANK is 0.

    Raises:
      UserError: for flags that are incomplete or not numbers.
    """
    own = flags.FlagValues()
    own.set_gnu_getopt()
    cli.define_processes(own)
    try:
        sys.argv = own(sys.argv, known_only=True)
    except flags.Error as error:
        raise UserError(f"{error}; give numbers") from error
    start(cli.processes(own))
    if is_distributed():
        os.environ["LOCAL_RANK"] = str(jax.process_index())
