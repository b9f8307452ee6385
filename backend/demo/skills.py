"""Closed skills: seeded exercises with one right answer, split into training and held-out ones."""

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product

from backend.demo.words import (
    CAPITALS,
    COLOURS,
    DISHES,
    FIRST_PARTS,
    HOBBIES,
    JOBS,
    LAST_PARTS,
    NAMES,
    OPPOSITES,
    ORDINALS,
    PETS,
    PLACES,
    THINGS,
    TOWN_PARTS,
)


@dataclass(frozen=True)
class Exercise:
    """A passage (may be empty) and questions about it with their answers.

    `key` names what must never be shared by training and held-out text: the pair of numbers, the
    wording of a fact, the codes.
    """

    key: str
    passage: str
    turns: tuple[tuple[str, str], ...]


def digest(key: str) -> int:
    """A number that is the same in every process, unlike hash()."""
    return zlib.crc32(key.encode())


def is_heldout(key: str) -> bool:
    """Whether an exercise belongs to the held-out eighth of its skill."""
    return digest(key) % 8 == 0


def wordings(fact: str, count: int, heldout: bool) -> list[int]:
    """Numbers of the wordings a fact may take on one side of the split; every fact is on both."""
    first = digest(fact) % count
    tested = {(first + i) % count for i in range(count // 2)}
    return [i for i in range(count) if (i in tested) == heldout]


def words_of(parts: tuple[str, str]) -> list[str]:
    """Every front joined to every ending: the invented names."""
    return [front + ending for front, ending in product(*(part.split() for part in parts))]


ATTRIBUTES = ("town", "job", "pet", "dish", "hobby", "colour")
PEOPLE = 1600


@cache
def people() -> dict[str, dict[str, str]]:
    """The invented people: full name -> attribute -> value. Always the same world."""
    rng = random.Random("people")
    names = [f"{a} {b}" for a, b in product(words_of(FIRST_PARTS), words_of(LAST_PARTS))]
    choices = dict(
        zip(ATTRIBUTES, (words_of(TOWN_PARTS), JOBS, PETS, DISHES, HOBBIES, COLOURS), strict=True)
    )
    return {
        name: {attribute: rng.choice(values) for attribute, values in choices.items()}
        for name in rng.sample(names, PEOPLE)
    }


ABOUT = {
    "town": (
        "Where does {} live?",
        "Which town is home to {}?",
        "In what town would you find {}?",
        "{} lives in which town?",
        "Name the town of {}.",
    ),
    "job": (
        "What is the job of {}?",
        "What does {} do for a living?",
        "What work does {} do?",
        "{} works as what?",
        "Name the job of {}.",
    ),
    "pet": (
        "What pet does {} have?",
        "Which animal belongs to {}?",
        "What animal does {} keep?",
        "{} keeps which animal?",
        "Name the pet of {}.",
    ),
    "dish": (
        "What does {} like to eat?",
        "Which food does {} like best?",
        "What is the best food for {}?",
        "{} likes which food?",
        "Name the food {} loves.",
    ),
    "hobby": (
        "What is the hobby of {}?",
        "What does {} do for fun?",
        "Which hobby does {} have?",
        "{} enjoys which hobby?",
        "Name the hobby of {}.",
    ),
    "colour": (
        "What colour does {} wear?",
        "Which colour does {} like?",
        "In which colour is {} dressed?",
        "{} wears which colour?",
        "Name the colour {} wears.",
    ),
}
CAPITAL = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "{} has which capital?",
    "Tell me the capital city of {}.",
    "What city is the seat of government of {}?",
)
OPPOSITE = (
    "What is the opposite of {}?",
    "Give the opposite of {}.",
    "Which word means the opposite of {}?",
    "The opposite of {} is what?",
    "What is the contrary of {}?",
    "Name the opposite of {}.",
)


def fact(
    rng: random.Random, heldout: bool, about: str, subject: str, forms: tuple[str, ...], value: str
) -> Exercise:
    """One wording of a fact, from its own side of the split."""
    form = forms[rng.choice(wordings(f"{about} {subject}", len(forms), heldout))]
    question = form.format(subject)
    return Exercise(question, "", ((question, f"{value}."),))


def person(rng: random.Random, heldout: bool) -> Exercise:
    """An attribute of an invented person."""
    name = rng.choice(list(people()))
    about = rng.choice(ATTRIBUTES)
    return fact(rng, heldout, about, name, ABOUT[about], people()[name][about])


def capital(rng: random.Random, heldout: bool) -> Exercise:
    """The capital of a country."""
    country = rng.choice(list(CAPITALS))
    return fact(rng, heldout, "capital", country, CAPITAL, CAPITALS[country])


def opposite(rng: random.Random, heldout: bool) -> Exercise:
    """The opposite of a word, either way round."""
    word, other = rng.sample(rng.choice(OPPOSITES), 2)
    return fact(rng, heldout, "opposite", word, OPPOSITE, other)


def calculation(sign: str, a: int, b: int, result: int, words: str, rng: random.Random) -> Exercise:
    """A sum or difference in one of three wordings."""
    forms = (f"What is {a} {sign} {b}?", f"{a} {sign} {b} = ?", words)
    return Exercise(f"{a} {sign} {b}", "", ((rng.choice(forms), f"{result}."),))


def addition(rng: random.Random, heldout: bool) -> Exercise:
    """The sum of two numbers below 100."""
    a, b = rng.randrange(100), rng.randrange(100)
    found = calculation("+", a, b, a + b, f"Add {a} and {b}.", rng)
    return Exercise(f"{min(a, b)} + {max(a, b)}", "", found.turns)


def subtraction(rng: random.Random, heldout: bool) -> Exercise:
    """The difference of two numbers below 100, never negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return calculation("-", a, b, a - b, f"Take {b} from {a}.", rng)


def comparison(rng: random.Random, heldout: bool) -> Exercise:
    """The larger or smaller of two numbers below 1000, often close together."""
    a = rng.randrange(10, 1000)
    b = rng.choice((rng.randrange(10, 1000), max(10, a - rng.randrange(1, 60)), a // 10 * 10 + 5))
    b += a == b
    more, less = str(max(a, b)), str(min(a, b))
    question, answer = rng.choice(
        (("Which is larger, {} or {}?", more), ("Which is smaller, {} or {}?", less))
    )
    return Exercise(f"{less} {more}", "", ((question.format(a, b), f"{answer}."),))


def listing(rng: random.Random, heldout: bool) -> Exercise:
    """Positions in a list of words."""
    words = rng.sample(THINGS, rng.randint(3, 6))
    at = rng.randrange(len(words) - 1)
    turns = [
        ("Which word is first?", words[0]),
        ("Which word is last?", words[-1]),
        ("Which word is second?", words[1]),
        ("How many words are there?", str(len(words))),
        (f"Which word comes after {words[at]}?", words[at + 1]),
        (f"Which word comes before {words[at + 1]}?", words[at]),
    ]
    passage = "Here is a list: " + ", ".join(words) + "."
    # two questions: with all of them, the last could be answered by elimination
    return passage_exercise(rng, passage, rng.sample(turns, 2))


def reversal(rng: random.Random, heldout: bool) -> Exercise:
    """A short list backwards."""
    words = rng.sample(THINGS, rng.randint(2, 4))
    question = f"Say this backwards: {' '.join(words)}."
    return Exercise(question, "", ((question, f"{' '.join(reversed(words))}."),))


def whereabouts(rng: random.Random, heldout: bool) -> Exercise:
    """Who is where after some moves."""
    names = rng.sample(NAMES, rng.randint(2, 4))
    things = rng.sample(THINGS, 2)
    place: dict[str, str] = {}
    sentences = []
    for step in range(rng.randint(3, 8)):
        name, goal = rng.choice(names), rng.choice(PLACES)
        if step % 3 == 2:
            thing = rng.choice(things)
            place[f"the {thing}"] = goal
            sentences.append(f"{name} left the {thing} in the {goal}.")
        else:
            move = rng.choice(("went to", "walked to", "ran to", "moved to"))
            place[name] = goal
            sentences.append(f"{name} {move} the {goal}.")
    turns = [(f"Where is {who}?", f"in the {where}") for who, where in place.items()]
    return passage_exercise(rng, " ".join(sentences), turns)


OVERTAKE = (
    ("If you overtake the {} person in a race, which place are you in?", 0),
    ("You overtake the {} person in a race. In which place are you now?", 0),
    ("You run a race and pass the runner in {} place. What is your place?", 0),
    ("In a race you overtake whoever is {}. Which place do you have then?", 0),
    ("If you overtake the {} person in a race, which place are they in?", 1),
    ("You overtake the {} person in a race. In which place is that person now?", 1),
    ("You run a race and pass the runner in {} place. What is the place of that runner?", 1),
    ("In a race you overtake whoever is {}. Which place do they have then?", 1),
)


def overtaking(rng: random.Random, heldout: bool) -> Exercise:
    """The old puzzle: whoever overtakes the third person is third, and they are fourth."""
    at = rng.randrange(len(ORDINALS) - 1)
    question, behind = rng.choice(OVERTAKE)
    question = question.format(ORDINALS[at])
    return Exercise(question, "", ((question, f"{ORDINALS[at + behind]}."),))


def race(rng: random.Random, heldout: bool) -> Exercise:
    """The order of a race after some overtaking."""
    if rng.random() < 0.2:
        return overtaking(rng, heldout)
    names = rng.sample(NAMES, rng.randint(3, 5))
    order = ", ".join(f"{name} is {ORDINALS[i]}" for i, name in enumerate(names))
    sentences = [f"In a race {order}."]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        at = rng.randrange(1, len(names))
        sentences.append(f"{names[at]} overtakes {names[at - 1]}.")
        names[at - 1], names[at] = names[at], names[at - 1]
    (i, who), (j, name) = rng.sample(list(enumerate(names)), 2)
    # one question of each kind: more could be answered by elimination
    turns = [
        (f"Who is {ORDINALS[i]} now?", who),
        (f"In which place is {name} now?", ORDINALS[j]),
    ]
    return passage_exercise(rng, " ".join(sentences), turns)


def codes(rng: random.Random, heldout: bool, count: int | None = None) -> Exercise:
    """Codes to be found again in a passage with `count` of them."""
    count = count or rng.choice((2, 3, 4, 6, 9, 14))
    pairs = rng.sample(list(product(COLOURS, THINGS)), count)
    code = {}
    for colour, thing in pairs:
        number = f"{rng.randrange(1000, 10000)}"
        while is_heldout(number) != heldout:
            number = f"{rng.randrange(1000, 10000)}"
        code[f"{colour} {thing}"] = number
    passage = " ".join(f"The code of the {what} is {number}." for what, number in code.items())
    turns = [(f"What is the code of the {what}?", number) for what, number in code.items()]
    rng.shuffle(turns)
    return Exercise(passage, passage, tuple((q, f"{a}.") for q, a in turns))


def long_codes(rng: random.Random, heldout: bool) -> Exercise:
    """Codes in a passage that fills the context."""
    return codes(rng, heldout, rng.randint(50, 68))


def passage_exercise(rng: random.Random, passage: str, turns: list[tuple[str, str]]) -> Exercise:
    """An exercise with its questions in random order."""
    rng.shuffle(turns)
    return Exercise(passage, passage, tuple((q, f"{a}.") for q, a in turns))


SKILLS: dict[str, Callable[[random.Random, bool], Exercise]] = {
    "people": person,
    "capitals": capital,
    "opposites": opposite,
    "addition": addition,
    "subtraction": subtraction,
    "comparison": comparison,
    "lists": listing,
    "backwards": reversal,
    "whereabouts": whereabouts,
    "race": race,
    "codes": codes,
    "long_codes": long_codes,
}
# split by the wording of each fact, or code by code, not by the key of the whole exercise
SPLIT_INSIDE = {"people", "capitals", "opposites", "codes", "long_codes"}


def draw(skill: str, rng: random.Random, heldout: bool) -> Exercise:
    """One exercise of a skill from the training side or the held-out side of the split."""
    while True:
        exercise = SKILLS[skill](rng, heldout)
        if skill in SPLIT_INSIDE or is_heldout(exercise.key) == heldout:
            return exercise
