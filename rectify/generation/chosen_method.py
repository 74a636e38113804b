"""The method of the command that continues prompts, by its spec or by the single flags of rectification."""

from __future__ import annotations

import argparse
from dataclasses import replace

from rectify.errors import InvalidArgumentError
from rectify.first_aid import with_q_advice
from rectify.generation.trace import check_traceable
from rectify.methods.base import Base
from rectify.methods.best_of_n import BestOfN
from rectify.methods.cmd import Cmd, CmdWith
from rectify.methods.method import Method
from rectify.methods.rectification import Detector, Rectify, RectifyWithDetector, Static
from rectify.methods.specs import parse_method

_FLAGS = ("q", "rule", "beta", "tau", "threshold", "epsilon")
_POCKET_Q = {"pocket": "pocket-q"}


def chosen_method(arguments: argparse.Namespace) -> Method:
    """The method that is asked for, by `--method` or by the flags of rectification; the base without either.

    Raises:
        InvalidArgumentError: both are given, the method does not fit the other flags, or a value is out of range.
    """
    given = {name: getattr(arguments, name) for name in _FLAGS if getattr(arguments, name) is not None}
    method: Method = Base()
    if arguments.method is not None:
        if arguments.rectify or given:
            name = next(iter(given), "rectify")
            raise InvalidArgumentError(
                f"method is {arguments.method!r}, and {name} is given too: leave one out; parameters are part of the "
                "method, as in rectify:pocket-q,beta=8"
            )
        method = parse_method(arguments.method)
        if arguments.compare and isinstance(method, Base):
            raise InvalidArgumentError("method is 'base' with compare: name a method to be compared with the base")
    elif arguments.rectify or arguments.compare:
        method = Rectify(path=given.pop("q", None), **given)
    elif given:
        raise InvalidArgumentError(
            f"{next(iter(given))} is given, but nothing is rectified: add --rectify or --compare"
        )
    if isinstance(method, Rectify):
        method = _with_q(method, arguments.model)
    elif isinstance(method, RectifyWithDetector):
        method = replace(method, rectify=_with_q(method.rectify, arguments.model))
    draws = method.n if isinstance(method, BestOfN) else 1
    if draws > 1 and (arguments.num_beams > 1 or not arguments.do_sample):
        raise InvalidArgumentError(
            f"method is {method.label!r} without sampling, or with beams: its {draws} draws would be equal; sample, "
            "with --num_beams 1"
        )
    if isinstance(method, Cmd | CmdWith) and (arguments.trace or arguments.num_beams > 1):
        flag = "trace" if arguments.trace else "num_beams"
        raise InvalidArgumentError(
            f"{flag} is given with {method.name}, which writes with another model, from another text: leave it out"
        )
    compared = Base | BestOfN | Rectify | Static | Detector | RectifyWithDetector
    if arguments.num_beams > 1 and not isinstance(method, compared):
        raise InvalidArgumentError(
            f"num_beams is {arguments.num_beams}: the scores of {method.name} are no probabilities, which beams are "
            "compared by; leave --num_beams out"
        )
    if arguments.trace:
        check_traceable(arguments.num_beams, draws)
    return method


def _with_q(method: Rectify, model: str) -> Rectify:
    if method.path is not None:
        return method
    if model not in _POCKET_Q:
        refusal = InvalidArgumentError(f"q is not given: name a Q network for the vocabulary of {model!r}")
        raise with_q_advice(refusal, model)
    return replace(method, path=_POCKET_Q[model])
