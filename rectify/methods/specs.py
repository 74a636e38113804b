"""Methods by name, as the commands take them: `NAME[:PATH][,key=value…]`, and `A+B` for two in one."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields

from rectify.errors import InvalidArgumentError
from rectify.methods.base import Base
from rectify.methods.best_of_n import BestOfN
from rectify.methods.cmd import Cmd
from rectify.methods.dexperts import DExperts
from rectify.methods.method import Method
from rectify.methods.rectification import Detector, Rectify, Static
from rectify.methods.reward_reranking import RewardReranking
from rectify.methods.self_debias import SelfDebias
from rectify.methods.word_filter import WordFilter
from rectify.spec_pairs import read_pairs

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Base, Rectify, Detector, Static, WordFilter, SelfDebias, DExperts, RewardReranking, BestOfN, Cmd)
}


def parse_method(spec: str) -> Method:
    """The method of `NAME[:PATH][,key=value…]`, or of several of them joined by `+`.

    A `+` joins only where a method's name and then `:`, `,`, `+` or the end follow, so paths may hold one. Of several
    the last two are combined first, see `Method.combined_with`.

    Raises:
        InvalidArgumentError: an unknown method or parameter, a value that it cannot have, or methods that cannot be
            combined.

    Example:
        >>> from rectify.methods.specs import parse_method
        >>> parse_method("rectify:pocket-q,beta=4").label
        'rectify:pocket-q,beta=4'
        >>> parse_method("rectify:pocket-q+detector:pocket-reward,candidates=0.02").family
        'rectify:pocket-q+detector:pocket-reward,candidates=0.02'
    """
    *others, method = map(_parse_one, re.split(rf"\+(?=(?:{'|'.join(METHODS)})(?:[:,+]|$))", spec))
    try:
        for other in reversed(others):
            method = other.combined_with(method)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"method {spec!r}: {error}") from error
    return method


def _parse_one(spec: str) -> Method:
    title, *pairs = spec.split(",")
    name, colon, path = title.partition(":")
    if name not in METHODS or (colon and not path):
        raise InvalidArgumentError(
            f"method is {spec!r}: give NAME, NAME:PATH or NAME:PATH,key=value, NAME being one of {', '.join(METHODS)}"
        )
    kind = METHODS[name]
    known = {each.name: _type(kind, each.name) for each in fields(kind) if each.name != "path"}
    given = read_pairs(pairs, known, f"method {spec!r}")
    try:
        return kind(path=path or None, **given)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"method {spec!r}: {error}") from error


def parse_methods(specs: Sequence[str]) -> list[Method]:
    """The methods of several specs, in their order.

    Raises:
        InvalidArgumentError: a spec cannot be used, or two mean the same.
    """
    methods: list[Method] = []
    for spec in specs:
        method = parse_method(spec)
        if method in methods:
            raise InvalidArgumentError(f"methods hold {spec!r} twice ({method.label}): give it once")
        methods.append(method)
    return methods


def _type(kind: type[Method], name: str) -> type:
    """What a parameter is read as: `float`, `int` or `str`, `None` left aside."""
    hint = typing.get_type_hints(kind)[name]
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    return hint
