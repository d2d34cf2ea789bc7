"""EleutherAI's lm_eval with a model type named camopd_jax, which runs this package's inference.

    python -m camopd_jax.lm_eval --model camopd_jax --model_args path=HF_DIR --tasks hellaswag,piqa
    python -m camopd_jax.lm_eval --model camopd_jax --model_args path=runs/mine/export --batch_size 32 \\
        --tasks ifeval --apply_chat_template

It accepts all of lm_eval's flags, and those for several processes. In Python, `import camopd_jax.lm_eval` registers the
model. Needs `pip install 'camopd_jax[eval]'`. A stop string does not end generation: the answer is generated up to EOS
or its cap and cut at the stop string afterwards.
"""

from camopd_jax.evals.harness import CamopdLM as CamopdLM
from camopd_jax.evals.harness import join_processes
from camopd_jax.runtime import cli

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli.report_errors(join_processes)
    cli.report_errors(cli_evaluate)
