# SPDX-License-Identifier: Apache-2.0
"""The sentences the tiny checkpoint knows: a closed grammar in three languages.

A template has slots in braces; a slot is filled from ``SLOTS[language]``, whose
entries may hold slots themselves. Numbers are written as words. About one sentence
in twelve is *held out*: decided by a hash of its text, so that training and
evaluation agree without a list.

``SPELLINGS`` are names that sound alike. The first spelling is the one to write
unless the prompt's context holds the second.
"""

import random
import re
import zlib

LANGUAGES = ("English", "German", "Chinese")
HELD_OUT_ONE_IN = 12  # sentences
MIN_HELD_OUT_LENGTH = {"English": 4, "German": 4, "Chinese": 7}  # words, words, characters

SPELLINGS = {
    "English": {
        "Catherine": "Kathryn",
        "Stephen": "Steven",
        "Philip": "Phillip",
        "Clark": "Clarke",
        "Reed": "Reid",
        "Brown": "Browne",
    },
    "German": {
        "Katrin": "Kathrin",
        "Walter": "Walther",
        "Sophie": "Sofie",
        "Meier": "Maier",
        "Schmidt": "Schmitt",
        "Hoffmann": "Hofmann",
    },
    "Chinese": {"李明": "李名", "张伟": "张玮", "陈静": "陈敬"},
}

ENGLISH_DIGITS = "zero one two three four five six seven eight nine".split()
ENGLISH_NUMBERS = (
    ENGLISH_DIGITS
    + "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
)
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
GERMAN_DIGITS = "null eins zwei drei vier fünf sechs sieben acht neun".split()
GERMAN_NUMBERS = (
    GERMAN_DIGITS
    + "zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn".split()
)
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()
CHINESE_DIGITS = "零一二三四五六七八九"


def english_number(n: int) -> str:
    if n < 20:
        return ENGLISH_NUMBERS[n]
    ten = ENGLISH_TENS[n // 10 - 2]
    return ten if n % 10 == 0 else f"{ten} {ENGLISH_NUMBERS[n % 10]}"


def german_number(n: int) -> str:
    if n < 20:
        return GERMAN_NUMBERS[n]
    ten = GERMAN_TENS[n // 10 - 2]
    unit = "ein" if n % 10 == 1 else GERMAN_NUMBERS[n % 10]
    return ten if n % 10 == 0 else f"{unit}und{ten}"


def chinese_number(n: int) -> str:
    if n < 10:
        return CHINESE_DIGITS[n]
    tens = "" if n < 20 else CHINESE_DIGITS[n // 10]
    return tens + "十" + (CHINESE_DIGITS[n % 10] if n % 10 else "")


SLOTS = {
    "English": {
        "first": ["Anna", "Peter", "Maria", "David", "Laura", "Catherine", "Stephen", "Philip"],
        "last": ["Miller", "Baker", "Clark", "Reed", "Brown"],
        "person": ["{first}", "{first}", "{first} {last}"],
        "city": ["London", "Paris", "Berlin", "Boston", "Dublin", "Madrid"],
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
        "part": ["morning", "afternoon", "evening"],
        "number": [english_number(n) for n in range(2, 100)],
        "digit": ENGLISH_DIGITS,
        "hour": [english_number(n) for n in range(1, 13)],
        "time": ["{hour} o'clock", "half past {hour}", "quarter to {hour}", "{hour} thirty"],
        "thing": ["apples", "books", "tickets", "bottles of water", "cups of coffee", "letters"],
        "object": ["letter", "ticket", "book", "phone", "table", "house"],
        "weather": ["sunny", "rainy", "cold", "warm", "windy"],
        "place": ["hotel", "station", "museum", "school", "library", "hospital"],
        "colour": ["red", "blue", "green", "white", "black"],
        "food": ["bread", "milk", "cheese", "tea", "coffee", "soup"],
    },
    "German": {
        "first": ["Anna", "Peter", "Maria", "Jonas", "Laura", "Katrin", "Walter", "Sophie"],
        "last": ["Müller", "Fischer", "Meier", "Schmidt", "Hoffmann"],
        "person": ["{first}", "{first}", "{first} {last}"],
        "city": ["Berlin", "Hamburg", "München", "Wien", "Köln", "Leipzig"],
        "day": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split(),
        "part": ["Morgen", "Nachmittag", "Abend"],
        "number": [german_number(n) for n in range(2, 100)],
        "digit": GERMAN_DIGITS,
        "hour": ["ein", *(german_number(n) for n in range(2, 13))],
        "time": ["{hour} Uhr", "{hour} Uhr dreißig", "{hour} Uhr fünfzehn"],
        "thing": ["Äpfel", "Bücher", "Karten", "Flaschen Wasser", "Tassen Kaffee", "Briefe"],
        "object": ["der Brief", "die Karte", "das Buch", "der Tisch", "das Haus"],
        "weather": ["sonnig", "kalt", "warm", "windig", "schön"],
        "place": ["das Hotel", "der Bahnhof", "das Museum", "die Schule", "die Apotheke"],
        "colour": ["rot", "blau", "grün", "weiß", "schwarz"],
        "food": ["Brot", "Milch", "Käse", "Tee", "Kaffee", "Suppe"],
    },
    "Chinese": {
        "person": ["李明", "张伟", "陈静", "王芳", "小红", "老师", "妈妈"],
        "city": ["北京", "上海", "广州", "南京", "西安", "天津"],
        "weekday": list("一二三四五六"),
        "day": ["星期{weekday}", "星期{weekday}", "今天", "明天", "昨天"],
        "part": ["早上", "下午", "晚上"],
        "number": [chinese_number(n) for n in range(3, 100)],
        "digit": list(CHINESE_DIGITS),
        "hour": ["两", *(chinese_number(n) for n in range(3, 13))],
        "time": ["{hour}点", "{hour}点半", "{part}{hour}点"],
        "thing": ["个苹果", "本书", "张票", "瓶水", "杯咖啡", "封信"],
        "object": ["信", "票", "书", "电话", "房子"],
        "weather": ["很好", "很冷", "很热", "不好"],
        "place": ["饭店", "火车站", "学校", "医院", "图书馆"],
        "colour": ["红", "蓝", "绿", "白", "黑"],
        "food": ["面包", "牛奶", "米饭", "茶", "咖啡", "汤"],
    },
}

TEMPLATES = {
    "English": [
        "My name is {person}.",
        "{person} lives in {city}.",
        "The train to {city} leaves at {time}.",
        "The train from {city} arrives at {time}.",
        "I would like {number} {thing}, please.",
        "Please call {person} on {day}.",
        "The weather in {city} is {weather} today.",
        "We will meet {person} at {time}.",
        "My phone number is {digit} {digit} {digit} {digit} {digit}.",
        "The {object} costs {number} dollars.",
        "Where is the {place}?",
        "The {place} opens at {time}.",
        "It is {time}.",
        "There are {number} {thing} on the table.",
        "Can you send the {object} to {person}?",
        "{number} plus {number} is {number}.",
        "The {object} is {colour}.",
        "On {day} {part} I go to the {place} with {person}.",
        "{person} and {person} drink {food}.",
        "Do you like {food} and {food}?",
        "{person} is {number} years old.",
    ],
    "German": [
        "Mein Name ist {person}.",
        "{person} wohnt in {city}.",
        "Der Zug nach {city} fährt um {time}.",
        "Der Zug aus {city} kommt um {time}.",
        "Ich möchte {number} {thing}, bitte.",
        "Bitte rufen Sie {person} am {day} an.",
        "Das Wetter in {city} ist heute {weather}.",
        "Wir treffen {person} um {time}.",
        "Meine Nummer ist {digit} {digit} {digit} {digit} {digit}.",
        "{object} kostet {number} Euro.",
        "Wo ist {place}?",
        "{place} öffnet um {time}.",
        "Es ist {time}.",
        "Auf dem Tisch sind {number} {thing}.",
        "{number} plus {number} ist {number}.",
        "{object} ist {colour}.",
        "Am {day} {part} lernt {person} mit {person}.",
        "{person} und {person} trinken {food}.",
        "Mögen Sie {food} und {food}?",
        "{person} ist {number} Jahre alt.",
    ],
    "Chinese": [
        "我叫{person}。",
        "{person}住在{city}。",
        "去{city}的火车{time}开。",
        "从{city}来的火车{time}到。",
        "我要{number}{thing},谢谢。",
        "请{day}给{person}打电话。",
        "{city}今天天气{weather}。",
        "我们{time}和{person}见面。",
        "我的电话是{digit}{digit}{digit}{digit}{digit}。",
        "{object}{number}块钱。",
        "{place}在哪里?",
        "{place}{time}开门。",
        "现在是{time}。",
        "桌子上有{number}{thing}。",
        "{number}加{number}是{number}。",
        "{object}是{colour}色的。",
        "{day}{part}我和{person}去{place}。",
        "{person}和{person}喝{food}。",
        "你喜欢{food}和{food}吗?",
        "{person}今年{number}岁。",
    ],
}

SHORT = {
    "English": (
        "Yes. No. Hello. Thank you. Good morning. Good evening. Good night. Goodbye. Please. "
        "Sorry. How are you? See you tomorrow. Excuse me."
    ),
    "German": (
        "Ja. Nein. Hallo. Danke. Guten Morgen. Guten Abend. Gute Nacht. Tschüss. Bitte. "
        "Entschuldigung. Wie geht es Ihnen? Bis morgen. Guten Tag."
    ),
    "Chinese": (
        "是。 不是。 你好。 谢谢。 早上好。 晚上好。 再见。 对不起。 你好吗? 明天见。 好的。"
    ),
}
SHORT_SLOTS = ("{number}", "{city}", "{day}", "{person}", "{food}")
FULL_WIDTH = str.maketrans(",?", "\uff0c\uff1f")


def short_sentences(language: str) -> list[str]:
    """Greetings and other fixed sentences of one to four words."""
    return re.findall(r"\S[^.?。]*[.?。]", SHORT[language])


def fill(template: str, language: str, rng: random.Random) -> str:
    """Replace each slot by a random entry, until no slot is left."""
    slots = SLOTS[language]
    while "{" in template:
        template = re.sub(r"\{(\w+)\}", lambda match: rng.choice(slots[match[1]]), template)
    return template


def punctuate(text: str, language: str) -> str:
    """Capital first letter, a full stop if no mark is there, full-width marks in Chinese."""
    stop = "。" if language == "Chinese" else "."
    text = text if text[-1] in ".?。" else text + stop
    return text.translate(FULL_WIDTH) if language == "Chinese" else text[0].upper() + text[1:]


def sentence(language: str, rng: random.Random) -> str:
    """One random sentence; one in seven is short, from a single word up."""
    kind = rng.random()
    if kind < 0.07:
        text = rng.choice(short_sentences(language))
    elif kind < 0.14:
        text = fill(rng.choice(SHORT_SLOTS), language, rng)
    else:
        text = fill(rng.choice(TEMPLATES[language]), language, rng)
    return punctuate(text, language)


def is_held_out(text: str, language: str) -> bool:
    """Whether a sentence is kept for evaluation; short sentences never are."""
    length = len(text) if language == "Chinese" else len(text.split())
    key = zlib.crc32(text.encode())
    return length >= MIN_HELD_OUT_LENGTH[language] and key % HELD_OUT_ONE_IN == 0


def has_spellings(text: str, language: str) -> bool:
    """Whether a name of two spellings is in it."""
    return any(name in text for name in SPELLINGS[language])


def sentences(
    language: str, *, count: int, held_out: bool, rng: random.Random, named_share: float = 0.0
) -> list[str]:
    """``count`` random sentences, all held out or none of them; training ones may repeat.

    At least ``named_share`` of them hold a name of two spellings.
    """
    texts: list[str] = []
    while len(texts) < count:
        text = sentence(language, rng)
        is_wanted = len(texts) >= named_share * count or has_spellings(text, language)
        if is_held_out(text, language) != held_out or not is_wanted:
            continue
        if not (held_out and text in texts):
            texts.append(text)
    return texts


def join(parts: list[str]) -> str:
    """Sentences as one transcript: a space between them, none between two Chinese ones."""
    text = parts[0]
    for part in parts[1:]:
        both_chinese = text[-1] in "。？" and ord(part[0]) > 0x2E80
        text += part if both_chinese else " " + part
    return text
