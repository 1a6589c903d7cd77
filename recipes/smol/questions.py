"""What is asked: about pictures in several wordings, and about anything in text. Written for this recipe."""

import random

# The last wording of each is never trained: it is what the figures are measured with, beside the first.
ABOUT_PICTURES = {
    "name": [
        "What is shown in this picture?",
        "What does this picture show?",
        "Name the thing in this picture.",
        "What is this?",
        "What can you see here?",
    ],
    "brand": [
        "Which brand is this?",
        "Whose logo is this?",
        "Name the brand with this logo.",
        "To which brand does this logo belong?",
    ],
    "kind": [
        "What kind of thing is this?",
        "Which category does this belong to?",
        "What type of thing is shown here?",
        "To what group does this belong?",
    ],
    "country": [
        "Which country's flag is this?",
        "To which country does this flag belong?",
        "Name the country of this flag.",
        "Which country is this?",
        "Whose flag is shown here?",
    ],
    "capital": [
        "What is the capital of the country with this flag?",
        "Name the capital of this flag's country.",
        "Which city is the capital of this country?",
        "What is the capital of this country?",
    ],
    "continent": [
        "On which continent is the country with this flag?",
        "In which part of the world is this flag's country?",
        "Which continent does this country belong to?",
        "Where in the world is this country?",
    ],
    "currency": [
        "What currency is used in the country with this flag?",
        "Which money does this flag's country use?",
        "Name the currency of this country.",
        "What do people pay with in this country?",
    ],
    "language": [
        "Which language is spoken in the country with this flag?",
        "What do people speak in this flag's country?",
        "Name the language of this country.",
        "What is the language of this country?",
    ],
}
TEXT_ABOUT_COUNTRIES = {
    "training": [
        "What is the capital of {}?",
        "Which currency is used in {}?",
        "On which continent is {}?",
        "Name a neighbour of {}.",
        "What is {} famous for?",
        "Which language do people speak in {}?",
    ],
    "test": [
        "What is the capital city of {}?",
        "What money do people use in {}?",
        "Where is {}?",
        "What language is spoken in {}?",
        "Which sea or ocean is near {}?",
    ],
}
TEXT_ABOUT_THINGS = {
    "training": [
        "What is the use of this: {}?",
        "What colour is this usually: {}?",
        "Write one sentence with the word {}.",
        "Where would you find this: {}?",
        "Explain {} to a child.",
        "What rhymes with {}?",
        "What kind of thing is this: {}?",
    ],
    "test": [
        "In a few words, what does {} mean?",
        "How big is this: {}?",
        "Make a short sentence about {}.",
        "What is {} made of?",
        "Name something like this: {}.",
    ],
}
# fmt: off
TEXT_EVERYDAY = (
    "What is 3 plus 4?", "What is 12 minus 5?", "How many days are in a week?",
    "What is the opposite of hot?", "What colour is the sky?", "What do bees make?",
    "Which animal says meow?", "Who wrote Hamlet?", "What is the largest planet?",
    "How many legs does a spider have?", "What is ice made of?", "Which season comes after winter?",
    "What is the boiling point of water?", "Name a primary colour.", "How do plants make food?",
    "What is the past tense of go?", "What is a synonym of happy?", "Translate hello into French.",
    "Which month comes after June?", "How many minutes are in an hour?", "What is gravity?",
    "What is the first letter of the alphabet?", "Name a musical instrument.", "Why do birds fly south?",
    "What is the plural of mouse?", "Who painted the Mona Lisa?", "What is the square root of 81?",
    "How many continents are there?", "What is the fastest land animal?", "What do cows drink?",
    "What is bread made from?", "Which planet is red?", "What is the chemical sign of gold?",
    "How do you say thank you in Spanish?", "What is a haiku?", "What does a doctor do?",
    "Where do fish live?", "What is the sun?", "How long is a year?", "Give me a tip for sleeping well.",
    "What should I cook for dinner?", "Tell me a joke.", "Write a line about the sea.",
    "How do I boil an egg?", "What is a good name for a cat?", "How can I learn to swim?",
    "What is the internet?", "Who was Albert Einstein?", "What is democracy?", "What is photosynthesis?",
    "What is a noun?", "What is 7 times 8?", "What is half of 50?", "Is the moon a star?",
    "Do penguins fly?", "Is ten greater than seven?", "Can you list three fruits?",
    "List two kinds of tree.", "Name three colours.", "Spell the word banana.", "Count to five.",
    "What comes after Tuesday?", "What is the tallest mountain?", "Which ocean is the largest?",
    "What is the longest river?", "Why is the sky blue?", "Why do we sleep?", "What causes rain?",
    "What is a volcano?", "What is the freezing point of water?", "Who invented the telephone?",
    "Who was the first man on the moon?", "What is the speed of light?", "What is DNA?",
    "How many strings does a violin have?", "What is the main ingredient of an omelette?",
    "How do I tie a shoe?", "What is the opposite of up?", "What is the opposite of fast?",
    "Name a vegetable.", "Name a bird that cannot fly.", "What is the shape of a ball?",
    "How many sides does a triangle have?", "What is a baby dog called?",
    "What is a group of lions called?", "Write a greeting for a friend.", "Say goodbye politely.",
    "What time of day is noon?", "What do you wear in the rain?", "What is the colour of grass?",
    "What is milk good for?", "What is the largest mammal?", "Where does honey come from?",
    "What is the currency of Japan?", "What language do people speak in Brazil?",
    "Which country has the city of Cairo?", "What is a computer?", "What is a keyboard for?",
    "How do I save money?", "What is a bank?", "What is a map?", "Give an example of a metal.",
    "What is steel?", "What is paper made of?", "How does a magnet work?", "What is a prime number?",
    "What is 100 divided by 4?", "What is 15 plus 27?", "What is 9 times 9?",
    "How many centimetres are in a metre?", "What is a sentence?", "What is a verb?",
    "Finish this: roses are red, violets are", "What is the moral of a fable?",
)
# fmt: on
TEXT_ARITHMETIC = {"training": "What is {} plus {}?", "test": "How much is {} and {}?"}


def text_questions(concepts, part: str, count: int, seed: int = 0) -> list[str]:
    """Questions without a picture, `part` training, validation or test; no question is in two parts."""
    wording = "training" if part == "training" else "test"
    everyday = [q for i, q in enumerate(TEXT_EVERYDAY) if (i % 3 == 2) == (wording == "test")]
    names = {"flags": [], "things": []}
    for c in concepts:
        if c.family != "logos":
            names["flags" if c.family == "flags" else "things"].append(c.name)
    pool = [t.format(n) for n in names["flags"] for t in TEXT_ABOUT_COUNTRIES[wording]]
    more = [t.format(n) for n in names["things"] for t in TEXT_ABOUT_THINGS[wording]]
    sums = [TEXT_ARITHMETIC[wording].format(a, b) for a in range(2, 40) for b in range(2, 40)]
    if wording == "test":  # one half each to validation and test
        half = 0 if part == "validation" else 1
        everyday, pool, more, sums = (x[half::2] for x in (everyday, pool, more, sums))
    rng = random.Random(seed)
    rest = max(0, count - len(everyday))
    pool = rng.sample(pool, min(len(pool), int(rest * 0.45))) + rng.sample(sums, int(rest * 0.05))
    pool += rng.sample(more, min(len(more), rest - len(pool)))
    result = everyday + pool
    rng.shuffle(result)
    return result[:count]
