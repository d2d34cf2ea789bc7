"""EleutherAI's lm_eval on this package's models: its own command with a model named camopd_jax.

    python -m camopd_jax.lm_eval --model camopd_jax --model_args path=HF_DIR --tasks hellaswag,piqa
    python -m camopd_jax.lm_eval --model camopd_jax --model_args path=runs/mine/export --batch_size 32 \\
        --tasks ifeval --apply_chat_template

It is lm_eval's own command line, with every flag of it and those of several processes. From Python,
`import camopd_jax.lm_eval` registers the model. Needs `pip install 'camopd_jax[eval]'`. A stop string cuts an answer
after it was generated up to its cap.
"""

from camopd_jax.evals.harness import CamopdLM as CamopdLM
from camopd_jax.evals.harness import join_processes
from camopd_jax.runtime import cli

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli.report_errors(join_processes)
    cli.report_errors(cli_evaluate)
