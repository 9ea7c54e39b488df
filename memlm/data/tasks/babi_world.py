"""What a published bAbI story of people, places and objects tells besides the one question that comes with it.

Source: the rules of the world of tasks 1 to 3 (J. Weston et al., "Towards AI-complete question answering", 2015): who
moves is there with all that is held; what is taken goes along, what is dropped stays where it is.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

_MOVE = re.compile(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)\.")
_TAKE = re.compile(r"(\w+) (?:took|got|grabbed|picked up) the (\w+)(?: there)?\.")
_DROP = re.compile(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?\.")


def answers(facts: Iterable[str]) -> dict[str, str]:
    """Answers by question after ``facts``: where everybody and everything is, and where things were before that.

    Questions are those of tasks 1 to 3: ``Where is Mary?``, ``Where is the apple?``, ``Where was the apple before the
    garden?``. Of several visits to a place the latest counts. Sentences of another kind tell nothing.
    """
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    trail: dict[str, list[str]] = {}

    def goes(what: str, where: str) -> None:
        known = trail.setdefault(what, [])
        if known[-1:] != [where]:
            known.append(where)

    for fact in facts:
        if (found := _MOVE.fullmatch(fact)) is not None:
            place[found[1]] = found[2]
            for what in [what for what, who in holder.items() if who == found[1]]:
                goes(what, found[2])
        elif (found := _TAKE.fullmatch(fact)) is not None:
            holder[found[2]] = found[1]
            if found[1] in place:
                goes(found[2], place[found[1]])
        elif (found := _DROP.fullmatch(fact)) is not None:
            holder.pop(found[2], None)
    told = {f"Where is {who}?": where for who, where in place.items()}
    for what, known in trail.items():
        told[f"Where is the {what}?"] = known[-1]
        told |= {f"Where was the {what} before the {b}?": a for a, b in itertools.pairwise(known)}
    return told
