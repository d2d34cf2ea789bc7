"""Times the same on-policy distillation work in TRL, the library most users would pick instead.

One full optimiser step = sample `--new-tokens` from the student for every prompt, score the
student's own text under one teacher, and apply one AdamW update of the full-vocabulary reverse KL
(TRL's DistillationTrainer, beta=1).  Models have random weights of `--shape` unless `--model` names a Hugging Face
folder, so that nothing is downloaded.

    pip install torch==2.13.0 trl==1.16.0 transformers datasets accelerate
    python trl_distill.py --batch 16 --prompt-len 64 --new-tokens 64 --steps 3 --dtype float32

Prints one JSON line: seconds per step (median, after one warm-up step), completion tokens per
second, and peak memory in GiB: resident, and on a GPU the GPU's.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
sys.path.insert(0, str(Path(__file__).parents[2]))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--model", help="Hugging Face folder; default: random weights of --shape")
    ap.add_argument("--shape", default="smollm2-135m", help="a name of camopd_jax/models/shapes.py")
    ap.add_argument("--tokenizer", help="Hugging Face folder with a tokenizer; default: --model")
    ap.add_argument("--teacher", help="Hugging Face folder of the teacher; default: --model")
    ap.add_argument("--prompts", help="JSONL of {messages}, one batch after the other; answers then end by themselves")
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--micro-batch", type=int, help="default: the whole batch")
    ap.add_argument("--checkpointing", action="store_true", help="activations are computed again for the gradient")
    ap.add_argument("--prompt-len", type=int, default=64)
    ap.add_argument("--new-tokens", type=int, default=64)
    ap.add_argument("--steps", type=int, default=3)
    ap.add_argument("--learning-rate", type=float, default=1e-6)
    ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = ap.parse_args()

    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from camopd_jax.models.shapes import SHAPES

    torch.set_num_threads(os.cpu_count())
    dtype = getattr(torch, args.dtype)
    if args.model:
        student = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        teacher = AutoModelForCausalLM.from_pretrained(args.teacher or args.model, dtype=dtype)
    else:
        fields = SHAPES[args.shape] | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        shape = AutoConfig.for_model(**fields)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            student, teacher = (AutoModelForCausalLM.from_config(shape, dtype=dtype) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)

    if args.prompts:
        with open(args.prompts) as file:
            prompts = [json.loads(line)["messages"] for line in file]
    else:  # of exactly prompt-len tokens: one plain word repeated
        word = tokenizer.encode(" the", add_special_tokens=False)[-1]
        prompts = [tokenizer.decode([word] * args.prompt_len)] * (args.batch * (args.steps + 2))
    rows = Dataset.from_dict({"prompt": prompts})

    # What was done, counted where it is done: tokens that generate() returned, teacher forwards, weights moved.
    done = {"sampled": 0, "teacher_calls": 0}
    generate = student.generate

    def counted_generate(*positional, **named):
        out = generate(*positional, **named)
        said = out[:, (positional[0] if positional else named["input_ids"]).shape[1] :]
        ends = torch.isin(said, torch.tensor(trainer.eos_token_ids)) & bool(args.prompts)
        done["sampled"] += int((ends.cumsum(1) - ends.int() == 0).sum())  # a closing token is part of its answer
        return out

    def counted_forward(*_):
        done["teacher_calls"] += 1

    student.generate = counted_generate
    teacher.model.register_forward_hook(counted_forward)
    before = student.model.layers[0].mlp.up_proj.weight.detach().clone()

    stamps = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        config = DistillationConfig(
            output_dir=out,
            per_device_train_batch_size=args.micro_batch or args.batch,
            gradient_accumulation_steps=args.batch // (args.micro_batch or args.batch),
            max_steps=args.steps + 1,
            max_completion_length=args.new_tokens,
            temperature=1.0,
            beta=1.0,
            generation_kwargs={} if args.prompts else {"min_new_tokens": args.new_tokens},
            shuffle_dataset=False,
            learning_rate=args.learning_rate,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            gradient_checkpointing=args.checkpointing,
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = DistillationTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [b - a for a, b in zip(stamps, stamps[1:])]
    step = (statistics.mean if args.prompts else statistics.median)(seconds)
    moved = (student.model.layers[0].mlp.up_proj.weight.detach().to(before.device) - before).abs().max().item()
    print(
        json.dumps(
            {
                "system": "trl",
                "dtype": args.dtype,
                "batch": args.batch,
                "prompt_len": args.prompt_len,
                "new_tokens": args.new_tokens,
                "seconds_per_step": round(step, 3),
                "completion_tokens_per_second": round(args.batch * args.new_tokens / step, 1),
                "tokens_sampled_per_step": done["sampled"] / (args.steps + 1),
                "teacher_calls": done["teacher_calls"],
                "largest_move": moved,
                **(
                    {"peak_gpu_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
                    if torch.cuda.is_available()
                    else {}
                ),
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
