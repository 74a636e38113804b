"""Continue prompts with a language model, as it is or rectified: `python generate.py --rectify`."""

import sys

from rectify.generation.command import main

if __name__ == "__main__":
    sys.exit(main())
