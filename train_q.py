"""Train a dead-end Q network: `python train_q.py --help`, or `accelerate launch train_q.py …`."""

import sys

from rectify.training.q_command import main

if __name__ == "__main__":
    sys.exit(main())
