"""The cost of rectification beside the 124 M GPT-2 shape: `python eval/overhead.py --output overhead.json`."""

import argparse
import json
from dataclasses import asdict

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
    parser.add_argument("--skip_memory", action="store_true")
    parser.add_argument("--output", help="write everything as JSON")
    arguments = parser.parse_args()
    shape = Shape(
        q_layers=arguments.q_layers, rule=arguments.rule, device=arguments.device, threads=arguments.threads
    )
    bench = Bench(shape)
    results = {"environment": environment(shape), "time": [], "memory": []}
    print("batch  new tokens  base ms/token  rectified ms/token  ratio (lowest–highest)")
    for batch in arguments.batches:
        for length in arguments.lengths:
            row = bench.ratio(batch, length, arguments.repetitions)
            results["time"].append(asdict(row))
            print(
                f"{batch:5} {length:11} {row.base_ms:14.2f} {row.rectified_ms:19.2f}  "
                f"{row.ratio:.3f} ({row.lowest:.3f}–{row.highest:.3f})",
                flush=True,
            )
    if not arguments.skip_memory:
        for batch in arguments.batches:
            memory = peak_memory(shape, batch, max(arguments.lengths))
            results["memory"].append(memory)
            print(
                f"memory, batch {batch}, {memory['new_tokens']} new tokens: {memory['extra_mib']:.0f} MiB more at the "
                f"peak, beside {memory['q_weights_mib']:.0f} MiB of Q weights"
            )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
