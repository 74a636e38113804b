"""A small detector that leaves a share of the texts to a larger one: accuracy, macro F1 and calibration.

python eval/cascade.py --small detector:my-small --large detector:my-large --test_files wiki.jsonl tweets.csv \\
    --fixed_split --text_column text tweet --label_column label class --label_values "" 0=1,1=1,2=0 --output_dir found

The table goes to standard output; `cascade.json`, `cascade.md` and a picture of each file go to the output folder.
"""

import sys

from rectify.evaluation.cascade_command import main

if __name__ == "__main__":
    sys.exit(main())
