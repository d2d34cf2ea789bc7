"""EleutherAI's lm_eval with a model type named camopd_jax, which runs this package's inference.

    python -m camopd_jax.lm_eval --model camopd_jax --model_args path=HF_DIR --tasks hellaswag,piqa
    python -m camopd_jax.lm_eval --model camopd_jax --model_args path=runs/mine/export --batch_size 32 \\
        --tasks ifeval --apply_chat_template

It accepts all of lm_eval's flags, and those for several processes. In Python, `import camopd_jax.lm_eval` registers the
model. Needs `pip install 'camopd_jax[eval]'`. A stop string does not end generation: the answer is generated up to EOS
or its cap and cut at the stop string afterwards.
"""

from camopd_jax.runtime import cli


def main() -> None:
    from lm_eval.__main__ import cli_evaluate  # an extra, whose absence `cli.report_errors` reports

    from camopd_jax.evals.harness import join_processes

    join_processes()
    cli_evaluate()


if __name__ == "__main__":
    cli.report_errors(main)
else:
    from camopd_jax.evals.harness import CamopdLM as CamopdLM
