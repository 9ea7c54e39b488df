"""Simulated users who tell what they like, among much else, over many sessions.

A user has preferences, one value of each of a few aspects (how things are to be explained, what to cook, ...), and says
so now and then, in ever other words. The other turns of a session are noise: greetings and small talk, questions,
what others like (`My sister likes jazz.`), topics (`Who invented jazz?`), and irony: the words of a preference in a
mocking tone. One preference changes its value on the way, and one its user never tells again.

Implicit signals accompany each turn: ``tone`` (from mocking, -1, to warm, 1), which is low in irony and the same in all
else, so that it tells irony and nothing more; and ``hour`` (cosine and sine of the time of day), which tells nothing.

Held out: of every list of phrasings those with the lowest CRC-32, a quarter of them, are said by users of evaluation
alone; users of training never say them. Each kind of noise has its own list, so that both meet every kind. Values are
the same for both.

Shapes: U users, S sessions, T turns per session, A aspects.
"""

from __future__ import annotations

import zlib
from typing import Literal, NamedTuple

import numpy as np

Split = Literal["train", "evaluation"]


SIGNALS = {"hour": 2, "tone": 1}


"""Implicit signals and how many numbers each has."""


class Aspect(NamedTuple):
    """Something one may have a preference about.

    Attributes:
        name: What it is called.
        values: What may be preferred.
        ask: Questions whose answer depends on it; ``{}`` is whatever the question is about.
    """

    name: str
    values: tuple[str, ...]
    ask: tuple[str, ...]


ASPECTS = (
    Aspect(
        "explanations", ("visuals", "bullet points", "worked examples", "long prose", "analogies"),
        ("Explain {} to me.", "Can you explain how {} works?", "How does {} work?", "Explain the idea of {}.",
         "I do not understand how {} works.", "Help me understand {}.", "Please explain {} once more.",
         "What is the idea behind {}?"),
    ),
    Aspect(
        "food", ("vegetarian dishes", "spicy curries", "grilled fish", "pasta", "fresh salads"),
        ("What should I cook tonight?", "Suggest a dinner for {}.", "Give me a recipe for tonight.",
         "What could I cook for {}?", "Plan the dinner with {}.", "Which recipe is good for {}?",
         "I have to cook dinner, any idea?", "A recipe for {}, please."),
    ),
    Aspect(
        "music", ("jazz", "techno", "folk songs", "opera", "hip hop"),
        ("Play some music.", "Which music fits {}?", "Make a playlist for {}.", "Find songs for a playlist.",
         "Put on some music for {}.", "I need a playlist.", "What music should I play for {}?", "Any songs for {}?"),
    ),
    Aspect(
        "travel", ("night trains", "cheap flights", "road trips", "cycling tours", "boat cruises"),
        ("Plan my trip to {}.", "How should I travel to {}?", "Book the journey to {}.",
        "What is the best way to travel?",
         "I have to travel to {} soon.", "Arrange a trip for {}.", "Find me a journey to {}.",
         "Organise the trip, please."),
    ),
    Aspect(
        "letters", ("formal language", "a casual style", "very short letters", "friendly words", "plain facts"),
        ("Write a letter to {}.", "Draft an email to {}.", "Answer this email.", "Write an email about {}.",
         "Reply to the letter of {}.", "Help me write to {}.", "Draft a reply for {}.", "Please answer the letter."),
    ),
    Aspect(
        "meetings", ("early mornings", "late afternoons", "lunch breaks", "quiet evenings", "the weekend"),
        ("When should I meet {}?", "Find a time for the meeting.", "Schedule a meeting with {}.",
         "Which time is good for a call with {}?", "Schedule the call.", "Set a time to meet {}.",
         "Put the meeting in my calendar.", "Find a slot in my calendar for {}."),
    ),
    Aspect(
        "books", ("science fiction", "crime novels", "poetry", "biographies", "history"),
        ("Recommend a book.", "What should I read next?", "Which book should I take to {}?",
        "Find me something to read.",
         "A book for {}, please.", "I want to read about {}.", "Recommend something to read on {}.",
         "What is a good book about {}?"),
    ),
    Aspect(
        "code", ("Python", "Rust", "JavaScript", "Haskell", "plain C"),
        ("Write a function for {}.", "Write a program that handles {}.", "How do I code {}?", "Code a script for {}.",
         "Show me a function that sorts {}.", "I need a script about {}.", "Fix the program for {}.",
         "Which function would you code?"),
    ),
    Aspect(
        "exercise", ("swimming", "yoga", "running", "climbing", "team sports"),
        ("Suggest a workout.", "How should I train today?", "Plan my training for {}.", "Make a workout for {}.",
         "Which exercise is good before {}?", "I want to exercise after {}.", "Set up a training plan.",
         "What exercise should I do?"),
    ),
    Aspect(
        "gifts", ("handmade things", "gadgets", "flowers", "concert tickets", "board games"),
        ("What gift should I get {}?", "Find a present for {}.", "Suggest a gift.", "I need a birthday present.",
         "It is the birthday of {} soon.", "A gift for {}, please.", "Which present would fit {}?",
         "Help me choose a birthday gift."),
    ),
)  # fmt: skip


"""What preferences are about."""


TELL = (
    "I like {}.", "I prefer {}.", "I love {}.", "I really like {}.", "I always prefer {}.", "For me it has to be {}.",
    "Please give me {} from now on.", "From now on only {} for me.", "My favourite is {}.",
    "My favourite choice is {}.",
    "{} works best for me.", "I find {} best.", "I enjoy {} most.", "I enjoy {} a lot.",
    "Nothing is better for me than {}.",
    "I am a big fan of {}.", "I am very fond of {}.", "I would rather have {}.", "I want {} whenever possible.",
    "Give me {} whenever possible.", "Remember that I like {}.", "Remember that I prefer {}.", "{} suits me best.",
    "I have always loved {}.",
)  # fmt: skip


"""How a preference is told; ``{}`` is the value."""


TALK = (
    "Hi.", "Hello.", "Hi there.", "Hello again.", "Good morning.", "Good evening.", "Good to see you.", "Okay.",
    "Ok.",
    "Okay then.", "All right.", "Right.", "Sure.", "Yes.", "No.", "Yes please.", "No thanks.", "Thanks.",
    "Thank you.",
    "Thanks a lot.", "Thank you very much.", "Great.", "Great, thanks.", "Cool.", "Hm.", "I see.", "Never mind.",
    "Wait a moment.", "One moment please.", "See you.", "See you later.", "Bye.", "Good night.",
    "That is all for now.",
    "That was all, thanks.", "It is raining again.", "It is cold today.", "Nice weather today.", "I am tired today.",
    "I am late again.", "What a day.", "Long day today.",
)  # fmt: skip


"""Small talk."""


OTHERS = (
    "My sister likes {}.", "My brother likes {}.", "My boss loves {}.", "My sister always wants {}.",
    "My neighbour prefers {}.", "A friend of mine loves {}.", "My brother is a fan of {}.",
    "My neighbour is fond of {}.", "He said that {} works best for him.", "She said that she enjoys {}.",
    "They want {} whenever possible.", "He would rather have {}.", "Her favourite is {}.",
)  # fmt: skip


"""What others like; ``{}`` is the value."""


TOPIC = (
    "A friend told me about {}.", "Someone told me about {}.", "I saw something about {} today.",
    "There was something about {} on television.", "What are people saying about {}?", "Have you heard about {}?",
    "Who invented {}?", "Who came up with {}?", "My boss asked me about {}.", "I read an article about {}.",
    "There is an article about {}.",
)  # fmt: skip


"""What names a value that nobody is said to like."""


NOISE = ("talk", "talk", "question", "others", "topic", "irony")


"""Kinds of turns that tell no preference, each as likely as its share of this list."""


ABOUT = (
    "gravity", "the tides", "a transformer", "my parents", "Anna", "the new team", "next Friday", "Lisbon",
    "the party",
    "volcanoes", "my landlord", "a prime number", "the summer", "Oslo", "my cousin", "the weekend guests",
)  # fmt: skip


"""What questions are about."""


def phrasings(choices: tuple[str, ...], split: Split) -> list[str]:
    """Those of ``choices`` that a split says: a quarter, by CRC-32, is for evaluation alone."""
    ordered = sorted(choices, key=lambda text: zlib.crc32(text.encode()))
    n_held = -(-len(ordered) // 4)
    return ordered[:n_held] if split == "evaluation" else ordered[n_held:]


class Users(NamedTuple):
    """Sessions of simulated users. Turns and questions are numbers of ``texts``.

    Attributes:
        texts: All utterances.
        turn: (U, S, T).
        aspect: What a turn is about, (U, S, T); -1 for small talk and questions.
        value: Which of its values it names, (U, S, T); -1 for none.
        earnest: Turns that tell a preference, (U, S, T).
        signals: By name, (U, S, T, n).
        wanted: Value that was told last, (U, S, A), up to a session; -1 if none was.
        told: Session in which it was told last, (U, S, A); -1 if never.
        changed: Aspect whose value changes, (U,).
        dropped: Aspect that is not mentioned any more, (U,).
        ask: A question about each aspect, (U, S, A).
    """

    texts: list[str]
    turn: np.ndarray
    aspect: np.ndarray
    value: np.ndarray
    earnest: np.ndarray
    signals: dict[str, np.ndarray]
    wanted: np.ndarray
    told: np.ndarray
    changed: np.ndarray
    dropped: np.ndarray
    ask: np.ndarray


def draw(
    rng: np.random.Generator, n_user: int, n_session: int, n_turn: int, split: Split, n_preference: int = 4
) -> Users:
    """Draw users and all they say.

    A preference is told in a session with probability 0.3. One changes its value half-way, another is not mentioned
    after a third of the sessions.

    Args:
        rng: Source of all draws.
        n_user: Users.
        n_session: Sessions of each.
        n_turn: Turns of a session.
        split: Whose phrasings are used.
        n_preference: Preferences of a user.
    """
    texts: dict[str, int] = {}
    lists = {"tell": TELL, "irony": TELL, "talk": TALK, "others": OTHERS, "topic": TOPIC}
    said = {kind: phrasings(choices, split) for kind, choices in lists.items()}
    asked = [phrasings(aspect.ask, split) for aspect in ASPECTS]
    n_aspect = len(ASPECTS)
    turn, aspect, value = (np.full((n_user, n_session, n_turn), -1) for _ in range(3))
    wanted, told = (np.full((n_user, n_session, n_aspect), -1) for _ in range(2))
    earnest, mocking = np.zeros(turn.shape, dtype=bool), np.zeros(turn.shape, dtype=bool)
    chosen = np.stack([rng.permutation(n_aspect) for _ in range(n_user)])

    def pick(options: list[str]) -> str:
        return options[int(rng.integers(len(options)))]

    def number(text: str) -> int:
        text = text[0].upper() + text[1:]
        return texts.setdefault(text, len(texts))

    questions = [[number(text.format(about)) for text in each for about in ABOUT] for each in asked]
    ask = np.stack([np.array(each)[rng.integers(len(each), size=(n_user, n_session))] for each in questions], axis=-1)
    for u in range(n_user):
        own = chosen[u, :n_preference]
        likes = {int(a): int(rng.integers(len(ASPECTS[a].values))) for a in own}
        for s in range(n_session):
            if s == n_session // 2:
                a = int(own[0])
                likes[a] = (likes[a] + 1 + int(rng.integers(len(ASPECTS[a].values) - 1))) % len(ASPECTS[a].values)
            active = own if s < n_session // 3 else np.delete(own, 1)
            telling = [int(a) for a in active if rng.random() < 0.3][:n_turn]
            order = rng.permutation(n_turn)
            if s:
                wanted[u, s], told[u, s] = wanted[u, s - 1], told[u, s - 1]
            for k, t in enumerate(order):
                place = (u, s, int(t))
                if k < len(telling):
                    a, v = telling[k], likes[telling[k]]
                    kind, earnest[place] = "tell", True
                    wanted[u, s, a], told[u, s, a] = v, s
                else:
                    kind = NOISE[int(rng.integers(len(NOISE)))]
                    a = int(rng.integers(n_aspect))
                    v = int(rng.integers(len(ASPECTS[a].values)))
                    mocking[place] = kind == "irony"
                if kind == "question":
                    turn[place] = questions[a][int(rng.integers(len(questions[a])))]
                elif kind == "talk":
                    turn[place] = number(pick(said["talk"]))
                else:
                    turn[place] = number(pick(said[kind]).format(ASPECTS[a].values[v]))
                    aspect[place], value[place] = a, v
    angle = rng.uniform(0, 2 * np.pi, turn.shape)
    signals = {
        "hour": np.stack([np.cos(angle), np.sin(angle)], axis=-1),
        "tone": (np.where(mocking, -0.6, 0.3) + 0.2 * rng.standard_normal(turn.shape))[..., None],
    }
    return Users(
        texts=list(texts), turn=turn, aspect=aspect, value=value, earnest=earnest,
        signals={name: part.astype(np.float32) for name, part in signals.items()},
        wanted=wanted, told=told, changed=chosen[:, 0], dropped=chosen[:, 1], ask=ask,
    )  # fmt: skip
