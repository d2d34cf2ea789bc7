"""Times sampling in Tunix, Google's JAX post-training library, on the same work as our rollout.

Random-weight Llama of SmolLM2-135M's shape; every prompt is `--prompt-len` tokens, every answer
exactly `--new-tokens` (no EOS can end it), sampled with top-p 1 at temperature 1.

    pip install jax flax google-tunix transformers
    JAX_PLATFORMS=cpu python tunix_sample.py --tokenizer HF_DIR --batch 16 --prompt-len 64 --new-tokens 64

Prints one JSON line: seconds per call (median of `--repeats`, after one warm-up), completion tokens
per second, and peak resident memory in GiB.
"""

import argparse
import json
import resource
import statistics
import time


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--tokenizer", required=True, help="Hugging Face folder with SmolLM2's tokenizer")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--prompt-len", type=int, default=64)
    ap.add_argument("--new-tokens", type=int, default=64)
    ap.add_argument("--repeats", type=int, default=3)
    ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    ap.add_argument("--greedy", action="store_true", help="take the likeliest token: no sort of the vocabulary")
    args = ap.parse_args()

    import jax
    import jax.numpy as jnp
    from flax import nnx
    from transformers import AutoTokenizer
    from tunix.generate import sampler as sampler_lib
    from tunix.models.llama3 import model as llama

    shape = llama.ModelConfig(
        num_layers=30,
        vocab_size=49152,
        embed_dim=576,
        hidden_dim=1536,
        num_heads=9,
        head_dim=64,
        num_kv_heads=3,
        rope_theta=100_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama.Llama3(shape, rngs=nnx.Rngs(0))
    dtype = jnp.dtype(args.dtype)
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    word = tokenizer.encode(" the", add_special_tokens=False)[0]
    prompt = tokenizer.decode([word] * (args.prompt_len - 1))
    cache = sampler_lib.CacheConfig(
        cache_size=args.prompt_len + args.new_tokens + 8, num_layers=30, num_kv_heads=3, head_dim=64
    )
    sampler = sampler_lib.Sampler(model, tokenizer, cache)

    sampled = []

    def call():
        t = time.perf_counter()
        out = sampler(
            [prompt] * args.batch,
            max_generation_steps=args.new_tokens,
            max_prompt_length=args.prompt_len,
            temperature=1.0,
            top_p=None if args.greedy else 1.0,
            seed=0,
            eos_tokens=[49151],
        )
        sampled.append(sum(len(tokens) for tokens in out.tokens))
        return time.perf_counter() - t

    first = call()
    seconds = statistics.median(call() for _ in range(args.repeats))
    print(
        json.dumps(
            {
                "system": "tunix, greedy" if args.greedy else "tunix",
                "dtype": args.dtype,
                "batch": args.batch,
                "prompt_len": args.prompt_len,
                "new_tokens": args.new_tokens,
                "seconds_first_call": round(first, 2),
                "seconds_per_call": round(seconds, 3),
                "completion_tokens_per_second": round(args.batch * args.new_tokens / seconds, 1),
                "tokens_sampled_per_call": sampled[-1],
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
