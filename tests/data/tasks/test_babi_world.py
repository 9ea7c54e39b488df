"""What stories of people, places and objects tell, by hand."""

from memlm.data.tasks.babi_world import answers

STORY = """Mary moved to the kitchen.
Mary got the apple there.
John went back to the office.
Mary journeyed to the garden.
Mary went to the hallway.
Mary put down the apple.
Mary travelled to the kitchen.
John took the milk."""


def test_what_is_held_goes_along_and_what_is_dropped_stays() -> None:
    assert answers(STORY.splitlines()) == {
        "Where is Mary?": "kitchen",
        "Where is John?": "office",
        "Where is the apple?": "hallway",
        "Where is the milk?": "office",
        "Where was the apple before the garden?": "kitchen",
        "Where was the apple before the hallway?": "garden",
    }


def test_of_several_visits_the_latest_counts() -> None:
    facts = ["John took the milk there."] + [f"John went to the {p}." for p in ("den", "attic", "cellar", "attic")]
    told = answers(facts)
    assert told["Where was the milk before the attic?"] == "cellar"
    assert told["Where was the milk before the cellar?"] == "attic"


def test_what_is_taken_where_nobody_knows_is_nowhere_yet() -> None:
    assert answers(["John took the milk."]) == {}
    assert answers(["John took the milk.", "Sandra yawned.", "John went to the den."]) == {
        "Where is John?": "den", "Where is the milk?": "den"}  # fmt: skip
    assert answers(["John dropped the milk."]) == {}
