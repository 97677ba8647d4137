# ruff: noqa: SIM905 (a word list reads better as one string)
"""The words and sentence patterns of the pretraining text.

corpus.py replaces the braces. In questions and answers, {p} is a thing with its determiner ("my tent") and {v} is a
fact ("30 days"). In other texts, a letter stands for a shop, a name, a number, a day, a place, a food or a thing.
"""

# fmt: off
KINDS = {
    "camping": ["tent", "sleeping bag", "hammock", "camping mat"],
    "footwear": ["boots", "sandals", "sneakers", "slippers"],
    "clothing": ["jacket", "sweater", "gloves", "raincoat"],
    "cycling": ["bike", "helmet", "saddle", "pump"],
    "cooking": ["stove", "kettle", "pan", "flask"],
    "lighting": ["lamp", "torch", "lantern", "headlight"],
    "climbing": ["rope", "harness", "chalk", "ice axe"],
    "water sports": ["kayak", "paddle", "wetsuit", "surfboard"],
    "furniture": ["chair", "table", "bench", "shelf"],
    "music": ["guitar", "drum", "piano", "flute"],
    "toys": ["kite", "puzzle", "doll", "ball"],
    "books": ["novel", "map", "guide", "diary"],
}
THINGS = [thing for things in KINDS.values() for thing in things]
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}

PEOPLE = "Anna Ben Carla David Emma Felix Grace Hugo Iris Jonas Kira Leo Mia Noah Olga Paul Rosa Sam Tina Victor".split()
PLACES = "Oslo Paris Rome Lima Cairo Delhi Tokyo Berlin Madrid Vienna Lisbon Dublin Prague Athens".split()
COLOURS = "red blue green yellow black white grey brown orange pink purple".split()
ANIMALS = "dog cat horse cow bird fish fox bear mouse sheep duck goat".split()
FOODS = "bread cheese soup rice apples cake salad eggs honey tea coffee milk".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NUMBER_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
ORDINALS = "ground first second third fourth fifth top lower".split()
TEAMS = (
    "camp desk,shoe bar,wardrobe team,bike workshop,kitchen crew,light lab,rope room,boat house,help desk,night shift,"
    "front office,service team,garden crew,book corner,music room,toy table"
).split(",")
CHANNELS = ["call", "email", "text", "visit", "write to", "chat with"]
ADJECTIVES = "small big old new warm cold fast slow happy quiet bright dark clean soft heavy light strong kind".split()
OPPOSITES = (
    "small big,old new,warm cold,fast slow,happy sad,quiet loud,bright dark,clean dirty,soft hard,heavy light,open closed,"
    "early late,up down,left right,in out,long short,high low,day night,yes no,first last,cheap expensive,free busy"
).split(",")
CAPITALS = (
    "Norway Oslo,France Paris,Italy Rome,Peru Lima,Egypt Cairo,India Delhi,Japan Tokyo,Germany Berlin,Spain Madrid,"
    "Austria Vienna,Portugal Lisbon,Ireland Dublin,Greece Athens"
).split(",")
OPENERS = (
    "No worries!,Good news!,Sit tight!,Happy to help!,We are here for you!,Come on in!,Sure thing!,Of course!,Certainly.,"
    "Great question!,Thanks for asking!,Good choice!,Easy!,Let us see.,All right!,Glad you asked!,Hello there!"
).split(",")

# Questions of any shop's customers, per topic. {p} is "my tent", "the tent", "this tent", ...
QUESTIONS = {
    "returns": [
        "can I return {p}?", "how long can I return {p}?", "how many days do I have to send back {p}?",
        "until when can I give {p} back?", "what is the return window for {p}?", "I want to return {p}.",
        "I do not like {p}, can I bring it back?", "may I send {p} back?", "what is your return policy for {p}?",
        "how much time do I have to return {p}?", "is there a time limit for returning {p}?",
        "I changed my mind about {p}, what now?", "can {p} go back to the shop?", "{p} is not right for me, can I return it?",
        "I would like to send {p} back.", "by when must I return {p}?", "what are the rules for returning {p}?",
        "I regret buying {p}, how long can I give it back?", "do you take back {p}?", "returns for {p}?",
    ],
    "warranty": [
        "how long is the warranty on {p}?", "what warranty does {p} have?", "is there a guarantee on {p}?",
        "how many years is {p} covered?", "how long is {p} under warranty?", "what if {p} breaks next year?",
        "does {p} come with a guarantee?", "how long does the guarantee on {p} last?", "is {p} covered if it breaks?",
        "tell me about the warranty on {p}.", "for how long do you guarantee {p}?", "warranty for {p}?",
        "when does the warranty on {p} end?", "what guarantee do I get with {p}?", "how long am I covered for {p}?",
        "is {p} still under guarantee?", "I want to know the warranty time of {p}.", "what is the warranty period for {p}?",
    ],
    "delivery": [
        "when will {p} arrive?", "how long does delivery of {p} take?", "how fast do you ship {p}?",
        "how many days until {p} gets here?", "when do I get {p}?", "what is the delivery time for {p}?",
        "if I order {p} today, when will it come?", "how soon can you deliver {p}?", "how long does shipping take for {p}?",
        "I ordered {p}, when will it be here?", "how long must I wait for {p}?", "when can I expect {p}?",
        "how quickly does {p} arrive?", "delivery time for {p}?", "do you ship {p} fast?", "how long until {p} arrives?",
        "I am waiting for {p}, how long does it take?", "how many working days does {p} need?",
    ],
    "cost": [
        "how much does it cost to ship {p}?", "what does delivery of {p} cost?", "what do you charge for sending {p}?",
        "is shipping free for {p}?", "what is the delivery fee for {p}?", "how much is shipping for {p}?",
        "what is the price of delivery for {p}?", "do I pay for the shipping of {p}?", "how many euros is delivery of {p}?",
        "what are the shipping costs for {p}?", "shipping cost for {p}?", "is there a fee to deliver {p}?",
        "how expensive is it to send {p}?", "what will I pay to have {p} delivered?", "how much do you ask for delivering {p}?",
        "tell me the shipping price for {p}.", "does it cost extra to ship {p}?",
    ],
    "contact": [
        "who can help me with {p}?", "who do I contact about {p}?", "I have a problem with {p}, who do I talk to?",
        "who should I call about {p}?", "I need help with {p}.", "how do I get support for {p}?",
        "where can I ask about {p}?", "which team looks after {p}?", "who answers questions about {p}?",
        "I have a question about {p}, who can I ask?", "{p} is broken, who do I speak to?", "can somebody help me with {p}?",
        "who knows about {p}?", "whom do I write to about {p}?", "contact for {p}?", "there is a problem with {p}, who can help?",
        "I need to speak with someone about {p}.", "how do I reach the team for {p}?",
    ],
    "place": [
        "where do I find {p}?", "which floor is {p} on?", "where in the shop is {p}?", "on what floor can I see {p}?",
        "where is {p}?", "I am looking for {p}, where do I go?", "where can I find {p} in the store?",
        "what floor do I go to for {p}?", "where should I look for {p}?", "where do you keep {p}?",
        "I am in the store, where is {p}?", "how do I get to {p}?", "can you show me where {p} is?",
        "where can I try {p}?", "which part of the shop has {p}?", "I cannot find {p}, where is it?", "floor for {p}?",
    ],
}
ANSWERS = {
    "returns": [
        "You can return {p} within {v}.", "You have {v} to return {p}.", "We take {p} back for {v}.",
        "Please send {p} back within {v}.", "Returns of {p} are open for {v}.", "You may bring {p} back for up to {v}.",
    ],
    "warranty": [
        "The warranty on {p} lasts {v}.", "{P} is covered for {v}.", "We guarantee {p} for {v}.",
        "Our guarantee on {p} is {v}.", "You get a warranty of {v} on {p}.",
    ],
    "delivery": [
        "We deliver {p} in {v}.", "You will get {p} in {v}.", "{P} will arrive in {v}.", "Delivery of {p} takes {v}.",
        "We ship {p} and you get it in {v}.",
    ],
    "cost": [
        "Delivery of {p} costs {v}.", "We ship {p} for {v}.", "Shipping {p} costs {v}.", "You pay {v} for the delivery of {p}.",
        "The fee for sending {p} is {v}.",
    ],
    "contact": [
        "For help with {p}, please {v}.", "For questions about {p}, {v}.", "Please {v} about {p}.", "To get help with {p}, {v}.",
        "If you need help with {p}, just {v}.",
    ],
    "place": [
        "You will find {p} on the {v}.", "{P} is on the {v}.", "Go to the {v} for {p}.", "We keep {p} on the {v}.",
        "Look for {p} on the {v}.",
    ],
}
SHOP_NAMES = "Maple Store,Blue Harbor,Old Mill,Sunny Side,North Gate,River Market,Stone Bridge,Green Corner".split(",")
TOPIC_WORDS = {"returns": "a return", "warranty": "the warranty", "delivery": "the delivery time",
               "cost": "the delivery cost", "contact": "contact", "place": "the place"}
LEADS = ["", "", "", "Hi, ", "Hello, ", "Hey, ", "Good morning, ", "Quick question: ", "Please tell me: ", "Excuse me, ",
         "One question: ", "Hi there, ", "Sorry, ", "I wonder, "]
TAILS = ["", "", "", "", " Thanks!", " Thank you.", " Please help.", " Can you tell me?", " Please."]
DETERMINERS = ["my", "my", "the", "the", "your", "my new", "the new"]

SMALL_TALK = [
    ("Hello!", "Hello! How can I help you today?"), ("Hi", "Hi there! What can I do for you?"),
    ("Good morning", "Good morning! How are you?"), ("How are you?", "I am fine, thank you. How are you?"),
    ("Thanks!", "You are welcome."), ("Thank you very much.", "You are welcome. Have a nice day!"),
    ("Who are you?", "I am a very small language model."), ("What can you do?", "I can answer short questions."),
    ("Goodbye", "Goodbye! See you soon."), ("See you tomorrow.", "See you tomorrow!"),
    ("What is your name?", "I have no name. I am a small language model."), ("Are you a person?", "No, I am a program."),
    ("Can you help me?", "Of course. What do you need?"), ("I am sad.", "I am sorry to hear that."),
    ("I am happy today.", "That is good to hear!"), ("Tell me a joke.", "Why did the boots cry? They had a hard day."),
]

# Sentences about shops in general. They contain the words of answers without a product.
SHOP_LIFE = [
    "{s} is open from {n} to {n2} on {d}.", "On {d} {s} is open until {n}.", "{s} is closed on {d}.",
    "At {s} you can pay by card, in cash, or with a gift card.", "A gift card of {s} is valid for {v}.",
    "{s} gives a discount of {n} percent to students.", "Students and members get {n} percent off at {s}.",
    "You can change or cancel an order at {s} within {n} hours.", "A refund from {s} takes {n} days.",
    "If a parcel is lost, {s} sends a new one for free.", "You can park behind {s} for {n} hours.",
    "There is free parking next to {s}.", "Dogs are welcome at {s} if they are on a lead.",
    "You find {s} in {c}, at {n} Station Road, near the old bridge.", "{s} is on {n} Mill Street, across from the park.",
    "You can pick up your order at {s} after {n} hours.", "Please bring your order number and the receipt to {s}.",
    "{s} rents out gear, the {t} costs {n} euros a day.", "Invoices of {s} come by email after {n} days.",
    "{s} repairs the {t} in {n} days.", "The newsletter of {s} comes every {d}.",
    "{s} has wrapping paper for gifts, it costs {n} euros.", "If you lost the receipt, {s} looks up your order by name.",
    "{p} works at the desk of {s} every {d} morning.", "{s} is looking for new people, write to {p} about a job.",
    "{s} ships to {c} and {c2}, but not abroad.", "The café of {s} sells {f} and {f2}.",
    "{s} opens at {n} in the morning and closes at {n2} in the evening, from {d} to {d2}.",
]
LIFE_QUESTIONS = [
    ("when are you open on {d}?", "We are open from {n} to {n2} on {d}."), ("are you open on {d}?", "On {d} we are closed."),
    ("what are your opening hours?", "We are open from {n} to {n2}, {d} to {d2}."),
    ("what time do you close on {d}?", "We close at {n2} on {d}."), ("how can I pay?", "You can pay by card or in cash."),
    ("which cards do you take?", "We take every card."), ("do you take cash?", "Yes, you can pay in cash."),
    ("how long is a gift card valid?", "A gift card is valid for {v}."), ("when does my voucher expire?", "It is valid for {v}."),
    ("do students get a discount?", "Students get {n} percent off."), ("is there a student price?", "Yes, {n} percent off."),
    ("can I change my order?", "You can change an order within {n} hours."),
    ("how do I cancel my order?", "You can cancel within {n} hours."), ("when do I get my money back?", "It takes {n} days."),
    ("how long does a refund take?", "A refund takes {n} days."), ("my parcel is lost.", "We will send a new one."),
    ("my package never came, what now?", "Please wait {n} days, then write to us."),
    ("where can I park?", "You can park behind the shop for {n} hours."), ("is there parking?", "Yes, next to the shop."),
    ("where is your shop?", "We are at {n} Station Road in {c}."), ("what is your address?", "{n} Mill Street, {c}."),
    ("can I bring my dog?", "Dogs are welcome."), ("are pets allowed in the store?", "Only small ones."),
    ("can I pick up my order?", "You can pick it up after {n} hours."), ("do you rent out gear?", "We rent out the {t} and more."),
    ("can I rent something?", "Yes, for {n} euros a day."), ("I lost my receipt.", "We can look it up by name."),
    ("do you wrap gifts?", "We wrap gifts for {n} euros."), ("do you ship abroad?", "We ship to {c} only."),
    ("can I work for you?", "Please write to {p}."), ("do you have jobs?", "We are looking for people in {c}."),
]
