"""The chat page's bar: where they part, again, settings, prompts to try, link and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from markupsafe import Markup

from app.chat_parts import Scene
from app.markup import join, tag
from backend import prompts
from jobs.chat_types import Sampling

LARGEST_SEED = 2**31 - 1
LABEL = 46  # characters of a prompt on its chip


@dataclass(frozen=True)
class Setting:
    """One setting of how answers are drawn, under its name in the URL."""

    name: str
    label: str
    low: float
    high: float
    step: float
    default: float
    help: str

    def read(self, text: str) -> tuple[float, str]:
        """Text -> the value, and a sentence where it is another than was written."""
        if not text:
            return self.default, ""
        try:
            wished = float(text)
        except ValueError:
            wished = float("nan")
        if wished != wished or (self.whole and wished % 1):
            kind = "whole number" if self.whole else "number"
            return (
                self.default,
                f"{self.label}: {text[:20]!r} is no {kind}; {self.default:g} holds.",
            )
        value = min(max(wished, self.low), self.high)
        bounds = f"{self.low:g} to {self.shown(self.high)}"
        return value, "" if value == wished else f"{self.label} is {bounds}."

    @property
    def whole(self) -> bool:
        """True for counts."""
        return self.step == 1

    def shown(self, value: float) -> str:
        """The value as it stands in its field."""
        return str(int(value)) if self.whole else f"{value:g}"


SETTINGS = (
    Setting(
        "temperature",
        "Temperature",
        0,
        2,
        0.1,
        0,
        "0 always takes the likeliest token. Higher values leave more to chance.",
    ),
    Setting(
        "top_p",
        "Top-p",
        0.05,
        1,
        0.05,
        1,
        "Chance picks among the likeliest tokens that have this share together.",
    ),
    Setting("max_new", "Most tokens", 1, 1024, 1, 256, "An answer is cut off after so many."),
    Setting(
        "seed",
        "Seed",
        0,
        LARGEST_SEED,
        1,
        0,
        "The same for every side, so that chance is the same for every side.",
    ),
)


def sampling_of(params: Mapping[str, str]) -> tuple[Sampling, list[str]]:
    """URL parameters -> the settings within their bounds, and what could not be taken."""
    read = {s.name: s.read(params.get(s.name, "")) for s in SETTINGS}
    value = {name: number for name, (number, _) in read.items()}
    sampling = Sampling(
        temperature=value["temperature"],
        top_p=value["top_p"],
        max_new=int(value["max_new"]),
        seed=int(value["seed"]),
    )
    return sampling, [problem for _, problem in read.values() if problem]


def bar(scene: Scene, sampling: Sampling, problems: Sequence[str], model: str) -> Markup:
    """Everything above the prompt box."""
    begun = bool(scene.turns)
    part = tag(
        "button",
        "Where they part",
        class_="tool",
        aria_pressed=str(scene.part).lower(),
        data_set={"part": "" if scene.part else "1", "turn": ""},
        data_part=True,
        title="Show tokens, coloured by their divergence from the 16-bit model",
    )
    again = tag("button", "Again", class_="tool", data_act={"do": "again"}, data_again=True)
    more = [
        tag("button", "New chat", class_="entry", data_set={"chat": "", "q": "", "turn": ""}),
        tag("button", "Copy link", class_="entry", data_link=True),
        save("Save as Markdown", "md"),
        save("Save as JSON", "json"),
    ]
    made = [
        part,
        again if begun else None,
        settings(sampling, problems),
        menu("prompts", "Prompts", chips(model)) if begun else None,
        menu("more", "More", more) if begun else None,
    ]
    return join([tag("div", made, class_="tools"), warning(problems)])


def warning(problems: Sequence[str]) -> Markup | None:
    """Settings that are not as written."""
    return tag("p", " ".join(problems), class_="problem") if problems else None


def save(words: str, kind: str) -> Markup:
    """A file of the conversation."""
    return tag("button", words, class_="entry", data_act={"do": "save", "kind": kind})


def menu(key: str, words: str, content: object) -> Markup:
    """A button that opens upwards."""
    summary = tag("summary", words, class_="tool")
    return tag(
        "details",
        summary,
        tag("div", content, class_="menu"),
        data_menu=True,
        data_key=key,
        class_=f"up {key}",
    )


def settings(sampling: Sampling, problems: Sequence[str]) -> Markup:
    """How answers are drawn; the button tells what is not at its default."""
    told = [
        f"{s.label.lower()} {s.shown(getattr(sampling, s.name))}"
        for s in SETTINGS
        if getattr(sampling, s.name) != s.default
    ]
    words = "Settings" + (f": {', '.join(told)}" if told else "")
    return menu("settings", words, tag("div", [field(s, sampling) for s in SETTINGS]))


def field(setting: Setting, sampling: Sampling) -> Markup:
    """One setting with its help."""
    name = f"set-{setting.name}"
    bounds = f"{setting.low:g} to {setting.shown(setting.high)}"
    number = tag(
        "input",
        type="number",
        id=name,
        value=setting.shown(getattr(sampling, setting.name)),
        min=setting.low,
        max=setting.shown(setting.high),
        step=setting.step,
        data_param=setting.name,
        aria_describedby=f"{name}-help",
        inputmode="numeric" if setting.whole else "decimal",
    )
    about = tag("p", setting.help, " ", tag("span", bounds, class_="bounds"), id=f"{name}-help")
    return tag("div", tag("label", setting.label, for_=name), number, about, class_="field")


@lru_cache(maxsize=8)
def chips(model: str) -> Markup:
    """Prompts that show differences; a click writes one into the box."""
    made = [
        tag(
            "button",
            tag("small", prompt.category),
            " ",
            label(prompt.turns[0]),
            class_="chip",
            title=prompt.turns[0],
            data_prompt=prompt.turns[0],
        )
        for prompt in prompts.suggested(model)
    ]
    return tag("div", made, class_="suggestions")


def label(text: str) -> str:
    """The beginning of a prompt."""
    line = " ".join(text.split())
    return line if len(line) <= LABEL else line[: LABEL - 1].rsplit(" ", 1)[0] + "…"
