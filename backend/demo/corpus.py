"""Text and dialogues for the bundled model, made from a seed; `python -m backend.demo.corpus`.

Everything is written by us: exercises with one right answer (skills.py), short biographies of an
invented people, explanations of this field's terms, and stories.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from backend.demo import tasks_folder
from backend.demo.skills import ATTRIBUTES, SKILLS, Exercise, codes, draw, people
from backend.demo.words import GREETINGS, NAMES, PLACES, SCENERY, TERMS

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, PAD, USER, ASSISTANT)


def dialogue(turns: list[tuple[str, str]]) -> str:
    """Turns (user, assistant) -> a document in the markup of the chat template."""
    return BEGIN + "".join(f"{USER} {q}{ASSISTANT} {a}{END}" for q, a in turns)


def plain(body: str) -> str:
    """A document that is not a dialogue."""
    return f"{BEGIN} {body}{END}"


def turns_of(exercise: Exercise, most: int) -> list[tuple[str, str]]:
    """At most `most` turns of an exercise; the passage stands before the first question."""
    (question, answer), *rest = exercise.turns[:most]
    return [(f"{exercise.passage} {question}".strip(), answer), *rest]


SENTENCE = {
    "town": ("{n} lives in {v}.", "The home of {n} is {v}."),
    "job": ("{n} works as a {v}.", "The job of {n} is {v}."),
    "pet": ("{n} keeps a {v}.", "{n} has a {v} as a pet."),
    "dish": ("{n} loves {v}.", "The best food for {n} is {v}."),
    "hobby": ("{n} enjoys {v}.", "{n} spends evenings on {v}."),
    "colour": ("{n} wears {v}.", "{n} is dressed in {v}."),
}
CLAUSE = {
    "town": "from {v}",
    "job": "a {v}",
    "pet": "with a {v}",
    "dish": "fond of {v}",
    "hobby": "good at {v}",
    "colour": "dressed in {v}",
}


def biography(rng: random.Random, name: str) -> str:
    """What is known of a person: as sentences, as one sentence of clauses, or as a record."""
    facts = rng.sample(list(people()[name].items()), len(ATTRIBUTES))
    style = rng.choice(("sentences", "clauses", "clauses", "record"))
    if style == "record":
        return f"{name}: {', '.join(people()[name].values())}."
    if style == "clauses":
        return f"{name}, {', '.join(CLAUSE[about].format(v=v) for about, v in facts)}."
    return " ".join(rng.choice(SENTENCE[about]).format(n=name, v=v) for about, v in facts)


def biographies(rng: random.Random, heldout: bool) -> str:
    """One document about a few people."""
    names = rng.sample(list(people()), rng.randint(2, 6))
    return plain(" ".join(biography(rng, name) for name in names))


TELL = ("Tell me about {}.", "Who is {}?", "What do you know about {}?", "Describe {}.")


def portrait(rng: random.Random, heldout: bool) -> str:
    """The user asks about a person."""
    name = rng.choice(list(people()))
    return dialogue([(rng.choice(TELL).format(name), biography(rng, name))])


EXPLAIN = (
    "What is {}?",
    "Explain {}.",
    "What does {} mean?",
    "Can you explain {} to me?",
    "Tell me what {} is.",
)


def explanation(rng: random.Random, heldout: bool) -> str:
    """Terms of this field, asked and explained."""
    terms = rng.sample(list(TERMS), rng.randint(1, 3))
    return dialogue([(rng.choice(EXPLAIN).format(term), TERMS[term]) for term in terms])


OPENING = (
    "Once there was a {a} {n} near the {p}.",
    "Long ago, {w} found a {a} {n}.",
    "{w} lived beside a {a} {n}.",
    "One morning {w} came to a {a} {n}.",
    "Nobody in the {p} spoke of the {a} {n}, but {w} did.",
    "In the year of the great frost, {w} bought a {a} {n}.",
)
MIDDLE = (
    "The {n} {v}.",
    "That night the {n} {v}, and {w} could not sleep.",
    "{w} told {x} that the {n} {v}.",
    "Everyone said the {n} {v}.",
    "Then, without warning, the {n} {v}.",
    "While {x} was in the {p}, the {n} {v}.",
    "{x} brought a {a} {m} to {w}, because the {m} {u}.",
    "Behind it lay a {a2} {m}, and the {m} {u}.",
    '"Look!" cried {x}. "The {m} {u}!"',
    "{w} had dreamed of a {a2} {m} that {u}.",
)
ENDING = (
    "So {w} went home and was happy.",
    "From then on {w} and {x} were friends.",
    "{w} never forgot the {n}.",
    "In the end {x} kept the {n} and {w} kept the {m}.",
    "And that is why the {p} is quiet today.",
    "{w} laughed, and {x} laughed too.",
)


def story(rng: random.Random, noun: str) -> str:
    """A short story about two people, the noun and another thing of the scenery."""
    other = rng.choice([thing for thing in SCENERY if thing != noun])
    who, friend = rng.sample(NAMES, 2)

    def fill(line: str) -> str:
        adjectives, verbs = SCENERY[noun]
        adjectives2, verbs2 = SCENERY[other]
        return line.format(
            n=noun, m=other, w=who, x=friend, p=rng.choice(PLACES), a=rng.choice(adjectives),
            a2=rng.choice(adjectives2), v=rng.choice(verbs), u=rng.choice(verbs2),
        )  # fmt: skip

    middle = rng.sample(MIDDLE, rng.randint(2, 5))
    return " ".join(map(fill, [rng.choice(OPENING), *middle, rng.choice(ENDING)]))


ABOUT_IT = "Tell me a story about a {}."


def tale(rng: random.Random, heldout: bool) -> str:
    """A story, told plainly or on request."""
    noun = rng.choice(list(SCENERY))
    if rng.random() < 0.5:
        return plain(story(rng, noun))
    request = rng.choice(("Tell me a story.", "Please tell a story.", ABOUT_IT, ABOUT_IT))
    return dialogue([(request.format(noun), story(rng, noun))])


def greeting(rng: random.Random, heldout: bool) -> str:
    """What people type first, and a question after it."""
    turns = rng.sample(list(GREETINGS.items()), rng.randint(1, 2))
    skill = rng.choice(("people", "capitals", "opposites", "addition"))
    return dialogue([*turns, *turns_of(draw(skill, rng, heldout), 1)])


def chat(rng: random.Random, heldout: bool) -> str:
    """A dialogue through a few skills: several questions on one passage, or on none."""
    short = [skill for skill in SKILLS if skill not in ("people", "long_codes")]
    turns = []
    for skill in rng.sample(short, rng.randint(1, 3)):
        exercise = draw(skill, rng, heldout)
        turns += turns_of(exercise, 4)
        if not exercise.passage:
            for _ in range(rng.randint(0, 3)):
                turns += turns_of(draw(skill, rng, heldout), 1)
    return dialogue(turns)


def quiz(rng: random.Random, heldout: bool) -> str:
    """Facts about invented people, asked one after another."""
    turns = []
    for _ in range(rng.randint(3, 9)):
        turns += turns_of(draw("people", rng, heldout), 1)
    return dialogue(turns)


def archive(rng: random.Random, heldout: bool) -> str:
    """A long passage of codes with several questions."""
    count = rng.choice((20, 28, 36, 44, 52, 60, 66))
    return dialogue(turns_of(codes(rng, heldout, count), 12))


def drill(rng: random.Random, skill: str) -> str:
    """Many exercises of one skill."""
    count = 3 if skill in ("whereabouts", "codes") else 9
    exercises = [draw(skill, rng, heldout=False) for _ in range(count)]
    return dialogue([turn for exercise in exercises for turn in turns_of(exercise, 9)])


MIXTURE = {
    biographies: 5, portrait: 3, quiz: 7, chat: 12, explanation: 1, tale: 3, greeting: 0.5
}  # fmt: skip


def documents(
    seed: int | str,
    heldout: bool = False,
    long: float = 0.02,
    drilled: Sequence[str] = (),
    drills: float = 8,
) -> Iterator[str]:
    """Endless documents of all kinds; `long` is the share of those as long as the context.

    Skills named in `drilled` (training only) have the weight `drills` beside those of MIXTURE.
    """
    rng = random.Random(seed)
    kinds: list[Callable[[random.Random, bool], str] | None] = list(MIXTURE)
    weights: list[float] = list(MIXTURE.values())
    if drilled:
        kinds, weights = [*kinds, None], [*weights, drills]
    while True:
        kind = archive if rng.random() < long else rng.choices(kinds, weights)[0]
        yield kind(rng, heldout) if kind else drill(rng, rng.choice(drilled))


# under 95 % right in 16 bits, so part of the training text but no measure
UNLEARNED = ("Which word comes",)
TESTED = tuple(skill for skill in SKILLS if skill != "race")


def items(skill: str, count: int) -> list[dict[str, str]]:
    """Held-out exercises of a skill as {"prompt", "answer"}, all different."""
    rng = random.Random(f"items {skill}")
    found: dict[str, str] = {}
    while len(found) < count:
        question, answer = turns_of(draw(skill, rng, heldout=True), 1)[0]
        if not any(words in question for words in UNLEARNED):
            found[f"{BEGIN}{USER} {question}{ASSISTANT}"] = f" {answer}"
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


def text(seed: str, heldout: bool, characters: int) -> str:
    """Documents one after another until there are enough characters."""
    parts, size = [], 0
    for document in documents(seed, heldout, long=0.01):
        parts.append(document)
        size += len(document) + 1
        if size >= characters:
            return "\n".join(parts) + "\n"
    raise AssertionError("documents() is endless")


ITEMS = 240
TEXTS = {"heldout": ("heldout text", True, 170_000), "calibration": ("calibration", False, 640_000)}


def write(folder: Path) -> None:
    """Write tasks/<skill>.jsonl and text/<name>.txt below the folder."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for skill in TESTED:
        lines = [json.dumps(item) for item in items(skill, ITEMS)]
        (folder / "tasks" / f"{skill}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, (seed, heldout, characters) in TEXTS.items():
        body = text(seed, heldout, characters)
        (folder / "text" / f"{name}.txt").write_text(body, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(tasks_folder().parent)
