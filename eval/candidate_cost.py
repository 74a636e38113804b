"""The cost of reading candidate next tokens by a detector, over a single-token step of its backbone.

python eval/candidate_cost.py
python eval/candidate_cost.py --backbone gpt2 --repetitions 2

Texts are continuations by the language model, candidates are chosen by its own policy. Another backbone has random
weights, and reads the same ids. Every way of reading and the plain step take turns at each token, so that the ratios
are of times taken side by side; their median stands with an interval that holds it with 95 % probability.
"""

import sys
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from rectify.command_line import Parser, execute
from rectify.detectors import ToxicityClassifier
from rectify.errors import InvalidArgumentError
from rectify.evaluation.candidate_cost import Way, candidate_costs, walk
from rectify.evaluation.overhead import cpu_name
from rectify.generation.prompts import EXAMPLES
from rectify.hub import available_device, load_language_model
from rectify.sampling import Sampling


def make_parser() -> Parser:
    parser = Parser(prog="candidate_cost.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="pocket", help="language model (default: %(default)s)")
    parser.add_argument("--detector", default="pocket-reward", help="whose backbone reads (default: %(default)s)")
    parser.add_argument("--backbone", choices=("gpt2",), help="the 124 M GPT-2 shape in place of the detector's")
    parser.add_argument("--batch", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--top_p", type=float, help="default: none")
    parser.add_argument("--candidates", type=float, default=0.01, help="default: %(default)s")
    parser.add_argument("--k", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    return parser


def run(arguments) -> None:
    for name, least in (("batch", 1), ("new_tokens", 2), ("k", 1), ("repetitions", 1)):
        if getattr(arguments, name) < least:
            raise InvalidArgumentError(f"{name} is {getattr(arguments, name)}: give {least} or more")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = available_device(arguments.device)
    model, tokenizer = load_language_model(arguments.model, device=device)
    prompts = [EXAMPLES[place % len(EXAMPLES)] for place in range(arguments.batch)]
    texts = walk(model, tokenizer, prompts, arguments.new_tokens, Sampling(do_sample=True, top_p=arguments.top_p))
    if arguments.backbone:
        trunk: Any = AutoModelForCausalLM.from_config(GPT2Config()).to(device).eval().base_model
    else:
        classifier = ToxicityClassifier.from_pretrained(arguments.detector, device=device)
        trunk = cast(Any, classifier.model.get_base_model()).base_model
    ways = [
        Way(f"π₀ ≥ {arguments.candidates:g}", arguments.candidates),
        Way(f"π₀ ≥ {arguments.candidates:g}, padded", arguments.candidates, padded=True),
        Way(f"k = {arguments.k}", None, arguments.k),
    ]
    size = sum(each.numel() for each in trunk.parameters()) / 1e6
    print(f"{size:.1f} M parameters, {cpu_name()}, {torch.get_num_threads()} threads, batch {arguments.batch}\n")
    print("| candidates | mean | largest | ms | a step, ms | ratio |\n|---|---|---|---|---|---|")
    for cost in candidate_costs(trunk, texts, ways, arguments.repetitions):
        found = cost.ratio
        print(
            f"| {found.arm} | {cost.candidates:.1f} | {cost.largest:.1f} | {found.ms:.1f} | {found.against_ms:.1f} | "
            f"{found.ratio:.2f} ({found.low:.2f}–{found.high:.2f}) |"
        )


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
