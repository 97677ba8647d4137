"""Make the quickstart's dataset: questions to the support desk of an outdoor shop, and the shop's answers.

The shop, Fern & Fell, is made up, so no base model knows its return windows, prices or floors. A tuned model can know
them only from train.jsonl. The held-out questions measure whether the model generalises or only memorised the lines.
Each of them is new: either no training question uses its words, or no training question is about its pair of topic and
product. (For such a pair, the model must know that a flask is for cooking, and what the shop says about cooking.)

    python examples/quickstart/make_dataset.py
"""

import argparse
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
Line = tuple[str, str]  # question, answer

PRODUCTS = {
    "camping": ["tent", "sleeping bag", "hammock", "camping mat"],
    "footwear": ["boots", "sandals", "sneakers", "slippers"],
    "clothing": ["jacket", "sweater", "gloves", "raincoat"],
    "cycling": ["bike", "helmet", "saddle", "pump"],
    "cooking": ["stove", "kettle", "pan", "flask"],
    "lighting": ["lamp", "torch", "lantern", "headlight"],
    "climbing": ["rope", "harness", "chalk", "ice axe"],
    "water sports": ["kayak", "paddle", "wetsuit", "surfboard"],
}

# For each topic: the shop's answer, and one fact per kind of product, in the order of PRODUCTS.
ANSWERS: dict[str, tuple[str, list[str]]] = {
    "returns": (
        "No worries! You can return the {p} within {v}.",
        ["30 days", "60 days", "45 days", "14 days", "21 days", "28 days", "10 days", "35 days"],
    ),
    "warranty": (
        "Good news! The warranty on the {p} lasts {v}.",
        ["three years", "one year", "two years", "five years", "ten years", "four years", "six months", "nine months"],
    ),
    "delivery": (
        "Sit tight! We deliver the {p} in {v}.",
        [f"{days} working days" for days in (3, 2, 4, 9, 5, 6, 8, 12)],
    ),
    "cost": (
        "Happy to help! Delivery of the {p} costs {v}.",
        ["6 euros", "4 euros", "nothing", "25 euros", "5 euros", "3 euros", "7 euros", "40 euros"],
    ),
    "contact": (
        "We are here for you! For help with the {p}, please {v}.",
        ["email the camp desk", "visit the shoe bar", "text the wardrobe team", "call the bike workshop",
         "chat with the kitchen crew", "write to the light lab", "visit the rope room", "call the boat house"],
    ),
    "place": (
        "Come on in! You will find the {p} on the {v}.",
        ["second floor", "ground floor", "first floor", "lower floor", "third floor", "fifth floor", "top floor",
         "fourth floor"],
    ),
}  # fmt: skip

# Question patterns for each topic: (in training, held out). {is}, {does}, {s}, {it} and {they} depend on whether the
# product is singular or plural (a tent, boots).
QUESTIONS: dict[str, tuple[list[str], list[str]]] = {
    "returns": (
        ["can I return {p}?", "how many days do I have to send back {p}?", "what is the return window for {p}?",
         "I do not like {p}, can I bring {it} back?", "what is your return policy for {p}?",
         "until when can I give {p} back?", "I want to return {p}.", "do you take back {p}?"],
        ["how long can I return {p}?", "may I send {p} back?", "I would like to return {p}."],
    ),
    "warranty": (
        ["how long is the warranty on {p}?", "is there a guarantee on {p}?", "how many years {is} {p} covered?",
         "what warranty {does} {p} have?", "what if {p} break{s} next year?", "{does} {p} come with a guarantee?",
         "tell me about the warranty on {p}.", "how long am I covered for {p}?"],
        ["what is the warranty on {p}?", "how long {is} {p} under guarantee?", "{does} {p} have a warranty?"],
    ),
    "delivery": (
        ["when will {p} arrive?", "how long does delivery of {p} take?", "how fast do you ship {p}?",
         "when do I get {p}?", "how many days until {p} get{s} here?", "what is the delivery time for {p}?",
         "I ordered {p}, when will {they} be here?", "how soon can you deliver {p}?"],
        ["how long until {p} arrive{s}?", "how fast do you deliver {p}?", "I ordered {p}, when will {they} arrive?"],
    ),
    "cost": (
        ["how much does it cost to ship {p}?", "what does delivery of {p} cost?", "is shipping free for {p}?",
         "what is the delivery fee for {p}?", "how much is shipping for {p}?", "do I pay for the shipping of {p}?",
         "what do you charge for sending {p}?", "how expensive is it to send {p}?"],
        ["how much does delivery of {p} cost?", "what is the shipping cost for {p}?", "is delivery free for {p}?"],
    ),
    "contact": (
        ["who can help me with {p}?", "I have a problem with {p}, who do I talk to?", "I need help with {p}.",
         "who do I contact about {p}?", "which team looks after {p}?", "who answers questions about {p}?",
         "{p} {is} broken, who do I speak to?", "who should I call about {p}?"],
        ["who do I talk to about {p}?", "I have a problem with {p}, who can help me?",
         "which team can help me with {p}?"],
    ),
    "place": (
        ["where do I find {p}?", "which floor {is} {p} on?", "where in the shop {is} {p}?", "where {is} {p}?",
         "I am looking for {p}, where do I go?", "what floor do I go to for {p}?", "where do you keep {p}?",
         "on what floor can I see {p}?"],
        ["where can I find {p}?", "what floor {is} {p} on?", "I am in the shop, where {is} {p}?"],
    ),
}  # fmt: skip

# Questions without a product: (in training, held out, answer).
GENERAL: list[tuple[list[str], list[str], str]] = [
    (["are you open on Sunday?", "when are you open on Sunday?", "what are your opening hours on Sunday?"],
     ["what time are you open on Sunday?"], "On Sunday we are closed. See you on Monday!"),
    (["are you open on Saturday?", "when are you open on Saturday?", "what are your opening hours on Saturday?"],
     ["what time are you open on Saturday?"], "On Saturday we are open from 10 to 16."),
    (["what are your opening hours?", "when are you open?", "what time do you open and close?"],
     ["what time are you open?"], "We are open from 9 to 18, Monday to Friday."),
    (["how can I pay?", "which cards do you take?", "do you take cash?"],
     ["can I pay by card or in cash?"], "You can pay by card, in cash, or with a gift card."),
    (["how long is a gift card valid?", "when does my gift card expire?", "how many years is a gift card valid?"],
     ["until when is a gift card valid?"], "Our gift card is valid for four years."),
    (["do students get a discount?", "is there a student price?", "is there a discount for students?"],
     ["do you have a student discount?"], "Yes! Students get 15 percent off."),
    (["can I change my order?", "how do I change an order?", "I want to change my order."],
     ["how can I change my order?"], "Sure thing! You can change an order within 90 minutes."),
    (["when do I get my money back?", "how long does a refund take?", "where is my refund?"],
     ["when do I get my refund?"], "A refund takes 5 working days."),
    (["my parcel is lost.", "my package never came, what now?", "I think my parcel is lost."],
     ["my parcel is lost, what now?"], "We are sorry! We will send a new one for free."),
    (["where can I park?", "is there parking?", "do you have parking?"],
     ["where is the parking?"], "You can park behind the shop for 90 minutes."),
    (["where is your shop?", "what is your address?", "how do I find your shop?"],
     ["what is the address of your shop?"], "We are at 7 Mill Street, near the old bridge."),
    (["can I bring my dog?", "are dogs allowed in the store?", "is my dog welcome?"],
     ["can I bring my dog to the store?"], "Of course! Dogs are welcome on every floor."),
]  # fmt: skip

GREETINGS = ["", "", "", "Hi, ", "Hello, ", "Good morning, ", "Quick question: "]
THANKS = ["", "", "", " Thanks!", " Thank you.", " Please help."]
DETERMINERS = ["my", "the", "my new"]
SINGULAR = {"is": "is", "does": "does", "s": "s", "it": "it", "they": "it"}
PLURAL = {"is": "are", "does": "do", "s": "", "it": "them", "they": "they"}


def held_out_topic(kind: str, product: str) -> str:
    """Return the topic that is held out for this product. The other three products of its kind teach its fact."""
    kinds, topics = list(PRODUCTS), list(ANSWERS)
    return topics[(kinds.index(kind) + PRODUCTS[kind].index(product)) % len(topics)]


def write(question: str, rng: random.Random) -> str:
    """Return the question with a random greeting before it and random thanks after it, as people write."""
    greeting = rng.choice(GREETINGS)
    return greeting + (question if greeting else question[0].upper() + question[1:]) + rng.choice(THANKS)


def answer(topic: str, kind: str, product: str) -> str:
    sentence, facts = ANSWERS[topic]
    return sentence.format(p=product, v=facts[list(PRODUCTS).index(kind)])


def asked(patterns: list[str], product: str, rng: random.Random) -> str:
    agree = PLURAL if product.endswith("s") and not product.endswith("ss") else SINGULAR
    return write(rng.choice(patterns).format(p=f"{rng.choice(DETERMINERS)} {product}", **agree), rng)


def make(seed: int, per_pair: int, per_general: int) -> tuple[list[Line], list[Line]]:
    """Return (train, held out), with `per_pair` questions per topic and product and `per_general` per general topic."""
    rng = random.Random(seed)  # noqa: S311 (questions, not secrets)
    train: dict[str, str] = {}
    new_words: dict[str, str] = {}
    new_pairs: dict[str, str] = {}
    for topic, (known, held) in QUESTIONS.items():
        for kind, products in PRODUCTS.items():
            for product in products:
                said = answer(topic, kind, product)
                if topic == held_out_topic(kind, product):
                    new_pairs[asked(known, product, rng)] = said
                    continue
                for _ in range(per_pair):
                    train[asked(known, product, rng)] = said
            chosen = rng.choice([p for p in products if topic != held_out_topic(kind, p)])
            new_words[asked(held, chosen, rng)] = answer(topic, kind, chosen)
    general: dict[str, str] = {}
    for known, held, said in GENERAL:
        for _ in range(per_general):
            train[write(rng.choice(known), rng)] = said
        for question in held:
            general[write(question, rng)] = said
    lines, heldout = list(train.items()), [*new_words.items(), *new_pairs.items(), *general.items()]
    check(lines, heldout)
    rng.shuffle(lines)
    rng.shuffle(heldout)
    return lines, heldout


def check(train: list[Line], heldout: list[Line]) -> None:
    """Exit if a held-out question is in the training lines. Capitals, greetings and thanks are ignored."""

    def bare(question: str) -> str:
        for piece in {*GREETINGS, *THANKS} - {""}:
            question = question.replace(piece, "")
        return " ".join(question.lower().split())

    seen = {bare(question) for question, _ in train}
    leaked = [question for question, _ in heldout if bare(question) in seen]
    if leaked:
        raise SystemExit(f"these held-out questions are also in the training lines: {leaked}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--per-pair", type=int, default=6)
    parser.add_argument("--per-general", type=int, default=14)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, heldout = make(args.seed, args.per_pair, args.per_general)
    for name, lines in (("train", train), ("heldout", heldout)):
        path = args.out / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
                for q, a in lines
            )
        )
        print(f"{path}: {len(lines)} lines")


if __name__ == "__main__":
    main()
