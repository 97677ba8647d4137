"""The text that the tiny base model is pretrained on, made from templates with a seeded generator.

A model this small can be tuned only if its pretraining was broad. It must understand questions in many wordings, copy
words from the prompt, know which kind of thing a tent is, and recall a fact that is not in the prompt. So the text
mixes general skills (repeating, looking up, picking words), small talk, some world knowledge, and a few made-up shops.
Each shop has its own facts and its own tone. The shop of the quickstart is not among them. The model sees that shop's
facts only in tuning.

A document is a list of (role, text) turns. The role "text" marks plain prose without the chat format.
"""

import random
from collections.abc import Callable, Iterator

from phrases import (
    ADJECTIVES,
    ANIMALS,
    ANSWERS,
    CAPITALS,
    CHANNELS,
    COLOURS,
    DAYS,
    DETERMINERS,
    FOODS,
    KIND_OF,
    KINDS,
    LEADS,
    LIFE_QUESTIONS,
    MONTHS,
    NUMBER_WORDS,
    OPENERS,
    OPPOSITES,
    ORDINALS,
    PEOPLE,
    PLACES,
    QUESTIONS,
    SHOP_LIFE,
    SHOP_NAMES,
    SMALL_TALK,
    TAILS,
    TEAMS,
    THINGS,
    TOPIC_WORDS,
)

Document = list[tuple[str, str]]


class Corpus:
    """An endless stream of documents. The same seed gives the same stream."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)  # noqa: S311 (templates, not secrets)
        self.shops = {name: self._shop() for name in SHOP_NAMES}
        self.tasks: list[tuple[Callable[[], Document], int]] = [
            (self.shop_question, 30),
            (self.policy_in_prompt, 16),
            (self.life_question, 6),
            (self.shop_prose, 6),
            (self.kind_question, 8),
            (self.topic_question, 8),
            (self.rephrase, 6),
            (self.repeat, 6),
            (self.pick_word, 5),
            (self.lookup, 8),
            (self.styled, 5),
            (self.story, 5),
            (self.world, 6),
            (self.small_talk, 3),
            (self.dialogue, 4),
        ]

    def documents(self) -> Iterator[Document]:
        makers, weights = zip(*self.tasks, strict=True)
        while True:
            yield self.rng.choices(makers, weights)[0]()

    # Parts of the tasks.

    def value(self, topic: str) -> str:
        """Return a made-up fact of the topic: a time, a price, a team or a floor."""
        r = self.rng
        if topic == "returns":
            return f"{r.randint(5, 99)} days"
        if topic == "warranty":
            return r.choice([f"{n} {u}" for n in NUMBER_WORDS[1:] for u in ("years", "months")] + ["one year"])
        if topic == "delivery":
            return f"{r.randint(2, 15)} {r.choice(['working days', 'working days', 'days'])}"
        if topic == "cost":
            return r.choice([f"{r.randint(2, 60)} euros", f"{r.randint(2, 60)} euros", "nothing"])
        if topic == "contact":
            return f"{r.choice(CHANNELS)} the {r.choice(TEAMS)}"
        return f"{r.choice(ORDINALS)} floor"

    def _shop(self) -> dict[str, dict[str, str]]:
        """Return the facts of one shop: for each topic and kind of thing an answer, in the shop's own words."""
        facts: dict[str, dict[str, str]] = {}
        for topic, answers in ANSWERS.items():
            opener = self.rng.choice([*OPENERS, "", "", "", ""])
            template = f"{opener} {self.rng.choice(answers)}".strip()
            facts[topic] = {kind: template.replace("{v}", self.value(topic)) for kind in KINDS}
        return facts

    def fill(self, template: str) -> str:
        r = self.rng
        d, d2 = r.sample(DAYS, 2)
        c, c2 = r.sample(PLACES, 2)
        f, f2 = r.sample(FOODS, 2)
        return template.format(
            s=r.choice(SHOP_NAMES),
            n=r.randint(1, 12),
            n2=r.randint(13, 22),
            d=d,
            d2=d2,
            c=c,
            c2=c2,
            f=f,
            f2=f2,
            v=self.value("warranty"),
            t=r.choice(THINGS),
            p=r.choice(PEOPLE),
        )

    def ask(self, question: str) -> str:
        """Return the question as a user would type it: with or without a greeting, a capital letter and thanks."""
        r = self.rng
        lead = r.choice(LEADS)
        if not lead and r.random() < 0.85:
            question = question[0].upper() + question[1:]
        if r.random() < 0.1:
            question = question.rstrip("?.")
        return lead + question + r.choice(TAILS)

    def question(self, topic: str, thing: str) -> str:
        r = self.rng
        return r.choice(QUESTIONS[topic]).format(p=f"{r.choice(DETERMINERS)} {thing}")

    def phrase(self, low: int = 2, high: int = 6) -> list[str]:
        pool = [
            *THINGS,
            *COLOURS,
            *ANIMALS,
            *FOODS,
            *PEOPLE,
            *PLACES,
            *DAYS,
            *ADJECTIVES,
            *NUMBER_WORDS,
            *TEAMS,
            *KINDS,
        ]
        return self.rng.sample(pool, self.rng.randint(low, high))

    @staticmethod
    def answer(template: str, thing: str) -> str:
        return template.replace("{p}", f"the {thing}").replace("{P}", f"The {thing}")

    # The tasks.

    def shop_question(self) -> Document:
        """Recall: ask for a fact of a named shop. Without a name, any shop can be meant and the model must guess."""
        r = self.rng
        topic, thing, shop = r.choice(list(QUESTIONS)), r.choice(THINGS), r.choice(SHOP_NAMES)
        question = self.question(topic, thing)
        answer = self.answer(self.shops[shop][topic][KIND_OF[thing]], thing)
        form = r.random()
        if form < 0.2:
            return [("user", self.ask(question)), ("assistant", answer)]
        if form < 0.6:
            return [("system", f"You work for {shop}."), ("user", self.ask(question)), ("assistant", answer)]
        return [
            ("user", self.ask(f"{r.choice(['at', 'here at', 'question for'])} {shop}: {question}")),
            ("assistant", answer),
        ]

    def policy_in_prompt(self) -> Document:
        """Reading: the prompt has a rule for each kind of thing, and the question names a thing."""
        r = self.rng
        topic = r.choice(list(QUESTIONS))
        kinds = r.sample(list(KINDS), r.randint(1, 4))
        values = {kind: self.value(topic) for kind in kinds}
        thing = r.choice(KINDS[r.choice(kinds)])
        if r.random() < 0.3:
            rules = " ".join(f"{thing if k == KIND_OF[thing] else r.choice(KINDS[k])}: {v}." for k, v in values.items())
        else:
            rules = " ".join(f"{kind}: {value}." for kind, value in values.items())
        template = r.choice(ANSWERS[topic])
        answer = self.answer(template.replace("{v}", values[KIND_OF[thing]]), thing)
        if r.random() < 0.5:
            return [("system", rules), ("user", self.ask(self.question(topic, thing))), ("assistant", answer)]
        return [("user", f"{rules} {self.ask(self.question(topic, thing))}"), ("assistant", answer)]

    def life_question(self) -> Document:
        question, answer = self.rng.choice(LIFE_QUESTIONS)
        both = self.fill(f"{question}\n{answer}")
        question, answer = both.split("\n")
        if self.rng.random() < 0.4:
            answer = f"{self.rng.choice(OPENERS)} {answer}"
        return [("user", self.ask(question)), ("assistant", answer)]

    def shop_prose(self) -> Document:
        return [("text", " ".join(self.fill(t) for t in self.rng.sample(SHOP_LIFE, self.rng.randint(1, 4))))]

    def kind_question(self) -> Document:
        r = self.rng
        thing = r.choice(THINGS)
        kind = KIND_OF[thing]
        other = r.choice([t for t in THINGS if KIND_OF[t] != kind])
        pair = [thing, other]
        r.shuffle(pair)
        asked, answer = r.choice(
            [
                (f"what kind of thing is the {thing}?", f"The {thing} belongs to {kind}."),
                (f"what is the {thing} for?", f"The {thing} is for {kind}."),
                (f"which one belongs to {kind}: {pair[0]} or {pair[1]}?", f"The {thing}."),
                (f"name something for {kind}.", f"The {thing}."),
                (f"what else is like the {thing}?", f"The {r.choice([t for t in KINDS[kind] if t != thing])}."),
                (f"does the {thing} belong to {KIND_OF[other]}?", f"No, the {thing} belongs to {kind}."),
            ]
        )
        return [("user", self.ask(asked)), ("assistant", answer)]

    def topic_question(self) -> Document:
        r = self.rng
        topic, thing = r.choice(list(QUESTIONS)), r.choice(THINGS)
        question = self.ask(self.question(topic, thing))
        return [
            ("user", f"What does this customer ask about? {question}"),
            ("assistant", f"The customer asks about {TOPIC_WORDS[topic]} for the {thing}."),
        ]

    def rephrase(self) -> Document:
        r = self.rng
        topic, thing = r.choice(list(QUESTIONS)), r.choice(THINGS)
        first, second = (q.format(p=f"the {thing}") for q in r.sample(QUESTIONS[topic], 2))
        return [("user", f"Say it in other words: {self.ask(first)}"), ("assistant", second[0].upper() + second[1:])]

    def repeat(self) -> Document:
        text = " ".join(self.phrase())
        if self.rng.random() < 0.3:
            text = self.fill(self.rng.choice(SHOP_LIFE))
        ask = self.rng.choice(["Repeat: {}", "Say this again: {}", "Please repeat the words: {}", "Copy this text: {}"])
        return [("user", ask.format(text)), ("assistant", text)]

    def pick_word(self) -> Document:
        r = self.rng
        words = self.phrase(3, 6)
        i = r.randrange(len(words) - 1)
        listed = ", ".join(words)
        asked, answer = r.choice(
            [
                (f"Which word comes after {words[i]} in this list: {listed}?", words[i + 1]),
                (f"What is the first word of: {listed}?", words[0]),
                (f"What is the last word of: {listed}?", words[-1]),
                (f"How many words are in this list: {listed}?", NUMBER_WORDS[len(words) - 1]),
            ]
        )
        return [("user", asked), ("assistant", answer)]

    def lookup(self) -> Document:
        r = self.rng
        keys = r.sample(r.choice([THINGS, PEOPLE, PLACES, DAYS, ANIMALS, list(KINDS)]), r.randint(2, 5))
        topic = r.choice([*QUESTIONS, "colour"])
        pairs = {key: r.choice(COLOURS) if topic == "colour" else self.value(topic) for key in keys}
        key = r.choice(keys)
        listed = " ".join(f"{k}: {v}." for k, v in pairs.items())
        return [
            ("user", f"{listed} {r.choice(['What about', 'What is noted for', 'And'])} {key}?"),
            ("assistant", f"{key}: {pairs[key]}."),
        ]

    def styled(self) -> Document:
        """Tone on request: the system message says how the answer must begin."""
        r = self.rng
        opener = r.choice(OPENERS)
        asked, said = r.choice([self.life_question, self.world, self.policy_in_prompt, self.kind_question])()[-2:]
        return [("system", f"Start every answer with: {opener}"), asked, ("assistant", f"{opener} {said[1]}")]

    def story(self) -> Document:
        r = self.rng
        a, b = r.sample(PEOPLE, 2)
        thing, place, colour, animal = r.choice(THINGS), r.choice(PLACES), r.choice(COLOURS), r.choice(ANIMALS)
        food, day = r.choice(FOODS), r.choice(DAYS)
        lines = {
            f"Where does {a} live?": (f"{a} lives in {place}.", f"{a} lives in {place}."),
            f"What does {a} like to eat?": (f"{a} likes {food}.", f"{a} likes {food}."),
            f"What did {b} buy?": (f"On {day} {b} bought a {colour} {thing}.", f"{b} bought a {colour} {thing}."),
            f"Who has a {animal}?": (f"{b} has a {r.choice(ADJECTIVES)} {animal}.", f"{b} has a {animal}."),
        }
        asked = r.choice(list(lines))
        told = [said for said, _ in lines.values()]
        r.shuffle(told)
        if r.random() < 0.3:
            return [("text", " ".join(told))]
        return [("user", f"{' '.join(told)} {asked}"), ("assistant", lines[asked][1])]

    def world(self) -> Document:
        r = self.rng
        left, right = r.choice(OPPOSITES).split()
        country, city = r.choice(CAPITALS).split()
        day, month, number = r.randrange(7), r.randrange(12), r.randrange(11)
        asked, answer = r.choice(
            [
                (f"what is the opposite of {left}?", f"The opposite of {left} is {right}."),
                (f"what is the capital of {country}?", f"The capital of {country} is {city}."),
                (f"which day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."),
                (
                    f"which month comes after {MONTHS[month]}?",
                    f"{MONTHS[(month + 1) % 12]} comes after {MONTHS[month]}.",
                ),
                (f"which number comes after {NUMBER_WORDS[number]}?", f"{NUMBER_WORDS[number + 1]}"),
            ]
        )
        return [("user", self.ask(asked)), ("assistant", answer)]

    def small_talk(self) -> Document:
        asked, answer = self.rng.choice(SMALL_TALK)
        return [("user", asked), ("assistant", answer)]

    def dialogue(self) -> Document:
        """Several turns in one document, so that the model also sees later turns and longer contexts."""
        makers = [self.small_talk, self.life_question, self.kind_question, self.world, self.lookup, self.repeat]
        return [turn for maker in self.rng.choices(makers, k=self.rng.randint(2, 6)) for turn in maker()]
