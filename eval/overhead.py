"""The cost of rectification beside the 124 M GPT-2 shape: `python eval/overhead.py --output overhead.json`."""

import argparse
import json
from dataclasses import asdict
from itertools import product

from rectify.evaluation.overhead import Bench, Shape, environment, peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 128, 512])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--q_layers", type=int, default=4)
    parser.add_argument("--rule", default="tilt")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=("time", "memory"), default=["time", "memory"])
    parser.add_argument("--output", help="write everything as JSON")
    arguments = parser.parse_args()
    shape = Shape(q_layers=arguments.q_layers, rule=arguments.rule, device=arguments.device, threads=arguments.threads)
    results = {"environment": environment(shape), "time": [], "memory": []}
    if "time" in arguments.parts:
        bench = Bench(shape)
        print("batch  new tokens  base ms/token  rectified ms/token  ratio (lowest–highest)")
        for batch, length in product(arguments.batches, arguments.lengths):
            row = bench.ratio(batch, length, arguments.repetitions)
            results["time"].append(asdict(row))
            print(
                f"{batch:5} {length:11} {row.base_ms:14.2f} {row.rectified_ms:19.2f}  "
                f"{row.ratio:.3f} ({row.lowest:.3f}–{row.highest:.3f})",
                flush=True,
            )
    if "memory" in arguments.parts:
        print("batch  new tokens  base peak MiB  rectified peak MiB  beside MiB of Q weights")
        for batch, length in product(arguments.batches, arguments.lengths):
            row = peak_memory(shape, batch, length)
            results["memory"].append(row)
            print(
                f"{batch:5} {length:11} {row['base_mib']:14.0f} {row['rectified_mib']:19.0f} "
                f"{row['q_weights_mib']:23.0f}",
                flush=True,
            )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
