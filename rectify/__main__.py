"""`python -m rectify`, the console command; for launchers that start modules, as `accelerate launch -m` does."""

import sys

from rectify.cli import main

if __name__ == "__main__":
    sys.exit(main())
