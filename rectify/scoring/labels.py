"""What classifiers call their outputs, in Perspective's names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rectify.errors import InvalidArgumentError
from rectify.scoring.scores import ATTRIBUTES

# the names of Jigsaw's two competitions, and of models that were trained on their data
_SYNONYMS = {
    "TOXIC": "TOXICITY",
    "SEVERE_TOXIC": "SEVERE_TOXICITY",
    "OBSCENE": "PROFANITY",
    "OBSCENITY": "PROFANITY",
    "PROFANE": "PROFANITY",
    "IDENTITY_HATE": "IDENTITY_ATTACK",
    "SEXUAL_EXPLICIT": "SEXUALLY_EXPLICIT",
}


def attribute_of(label: str) -> str | None:
    """The attribute that a label means; `None` where it means none, as `"neutral"`, or another thing, as `"hate"`."""
    name = re.sub(r"[\s-]+", "_", label.strip()).upper()
    name = _SYNONYMS.get(name, name)
    return name if name in ATTRIBUTES else None


def outputs_by_attribute(labels: Sequence[str], names: Mapping[str, str] | None = None) -> dict[str, int]:
    """Which of a classifier's outputs scores which attribute.

    Args:
        labels: of the outputs, in their order.
        names: what labels mean, where their names do not say it.

    Raises:
        InvalidArgumentError: no label means an attribute, two mean the same, or `names` has a label or an attribute
            that there is not.
    """
    names = names or {}
    for label, meant in names.items():
        if label not in labels or meant not in ATTRIBUTES:
            raise InvalidArgumentError(
                f"labels holds {label}={meant}: give a label of the model ({', '.join(labels)}) and one of "
                f"{', '.join(ATTRIBUTES)}"
            )
    outputs: dict[str, int] = {}
    for place, label in enumerate(labels):
        # told what some labels mean, it guesses none of the others
        attribute = names.get(label) if names else attribute_of(label)
        if attribute is None:
            continue
        if attribute in outputs:
            raise InvalidArgumentError(
                f"labels {labels[outputs[attribute]]!r} and {label!r} both mean {attribute}: say which does, as "
                f"labels {label}={attribute}"
            )
        outputs[attribute] = place
    if not outputs:
        raise InvalidArgumentError(
            f"the model's labels are {', '.join(map(repr, labels))}, and none is known to mean one of "
            f"{', '.join(ATTRIBUTES)}: say it, as labels {labels[-1]}=TOXICITY, or give another model"
        )
    return outputs
