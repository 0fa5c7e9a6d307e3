"""Normalises short answers for VQAv2 and TextVQA and scores them against those of ten people.

Both drop punctuation and map words alike. They differ before that: TextVQA's processor, which EvalAI's server also
uses, lowers the case, drops commas and question marks and cuts `'s` off its word; VQAv2's own evaluation does not, and
if all ten people gave the same answer it compares everything as it was written, case included.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(n) for n, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = {"a", "an", "the"}
# The evaluation's table, in which somebody'd loses its apostrophe. Its entries with capitals (Im, Ive, Id've) are left
# out: words are looked up in lower case, so they never apply.
CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
    didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
    havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't
    itd:it'd itd've:it'd've it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've
    mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock
    oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've
    shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
    someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
    somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll
    thats:that's thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd
    theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't
    wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've
    whens:when's whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've
    wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've
    wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll
    yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've
    youll:you'll youre:you're youve:you've
    """.split()
)


@lru_cache(maxsize=1 << 16)  # people's answers repeat
def evalai_answer(answer: str) -> str:
    """Returns the answer as TextVQA's evaluation and EvalAI's server normalise it."""
    answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_without_punctuation(_one_line(answer), re.compile(r"\.(?!\d)")))


@lru_cache(maxsize=1 << 16)
def vqa_answer(answer: str) -> str:
    """Returns the answer as VQAv2's evaluation normalises it. That is written for Python 2, where only ASCII digits are
    digits."""
    return _words(_without_punctuation(_one_line(answer), re.compile(r"\.(?![0-9])")))


def textvqa_accuracy(answer: str, people: Sequence[str]) -> float:
    return soft_accuracy(evalai_answer(answer), [evalai_answer(each) for each in people])


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    answer, people = _one_line(answer), [_one_line(each) for each in people]
    if len(set(people)) > 1:
        answer, people = vqa_answer(answer), [vqa_answer(each) for each in people]
    return soft_accuracy(answer, people)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Returns 1 if three people agree, averaged over all ways of leaving one person out."""
    agree = sum(each == answer for each in people)
    return sum(min(1, (agree - (each == answer)) / 3) for each in people) / len(people)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str, period: re.Pattern) -> str:
    """Returns the text without punctuation. A mark goes without trace if it touches a space anywhere in the text, or if
    the text has a comma between digits; else it becomes a space. A period goes unless a digit follows."""
    number = re.search(r"[0-9],[0-9]", text) is not None
    kept = text
    for mark in PUNCTUATION:
        apart = number or mark + " " in text or " " + mark in text
        kept = kept.replace(mark, "" if apart else " ")
    # The scripts pass a flag, re.UNICODE, in place of a count: no more than its 32 periods go.
    return period.sub("", kept, count=32)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
