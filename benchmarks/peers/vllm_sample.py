"""Times sampling in vLLM, with random weights of one of this project's shapes: what TRL's users can sample with.

    pip install vllm
    python benchmarks/peers/vllm_sample.py --shape qwen3-1.7b --batch 64

Every prompt and every answer has exactly the given length, as in benchmarks/step.py. Prints one JSON line: seconds of a
batch (median, after a warm-up) and tokens per second. Not run yet: no machine here has vLLM.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-1.7b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    from vllm import LLM, SamplingParams

    from camopd_jax.models.shapes import SHAPES

    shape = SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as folder:
        config = shape | {"architectures": [ARCHITECTURES[shape["model_type"]]], "torch_dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        length = args.prompt_len + args.new_tokens
        llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=length, max_num_seqs=args.batch,
                  gpu_memory_utilization=0.7)  # fmt: skip
        how = SamplingParams(temperature=1.0, max_tokens=args.new_tokens, ignore_eos=True, detokenize=False)
        draw = random.Random(0)
        prompts = [
            {"prompt_token_ids": [draw.randrange(shape["vocab_size"]) for _ in range(args.prompt_len)]}
            for _ in range(args.batch)
        ]
        seconds = []
        for _ in range(1 + args.rounds):
            started = time.perf_counter()
            answers = llm.generate(prompts, how, use_tqdm=False)
            seconds.append(time.perf_counter() - started)
            assert all(len(answer.outputs[0].token_ids) == args.new_tokens for answer in answers)
    middle = statistics.median(seconds[1:])
    tokens = args.batch * args.new_tokens
    print(json.dumps({"sampling_seconds": round(middle, 3), "tokens_per_second": round(tokens / middle)}), flush=True)


if __name__ == "__main__":
    main()
