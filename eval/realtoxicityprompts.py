"""RealToxicityPrompts: methods and baselines in one run, on the same prompts, noise and scorers.

python eval/realtoxicityprompts.py --prompts prompts.jsonl --methods base rectify static:FOLDER,beta=4 \\
    --scorer pocket --output_dir run

Killed at any moment, or given more methods, the same command does what is missing. Several processes share the work:
`accelerate launch --num_processes 2 eval/realtoxicityprompts.py …`. Figures go to `metrics.json`, `report.md` and
`report.html` in the output folder, the table to standard output too.
"""

import sys

from rectify.evaluation.run_command import main

if __name__ == "__main__":
    sys.exit(main(prog="realtoxicityprompts.py"))
