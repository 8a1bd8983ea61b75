"""The Porter stemmer (Porter 1980, with its author's two later changes, *bli* and *logi*): "dogs" and "dog" become one answer.

A word is a row of consonants and vowels; y is a vowel after a consonant. The measure m of a stem counts how often a vowel is
followed by a consonant. Five steps each take off or change the longest suffix in their list, if the stem before it passes the
list's condition; a longest suffix that fails ends its step.
"""

from __future__ import annotations

from functools import lru_cache

_VOWELS = frozenset("aeiou")

# Suffix -> replacement, where m > 0.
_STEP_2_PAIRS = """
    ational=ate tional=tion enci=ence anci=ance izer=ize bli=ble alli=al entli=ent eli=e ousli=ous ization=ize ation=ate ator=ate
    alism=al iveness=ive fulness=ful ousness=ous aliti=al iviti=ive biliti=ble logi=log
"""
_STEP_3_PAIRS = "icate=ic ative= alize=al iciti=ic ical=ic ful= ness="
_STEP_2, _STEP_3 = (dict(pair.split("=") for pair in pairs.split()) for pairs in (_STEP_2_PAIRS, _STEP_3_PAIRS))

# Suffixes that go where m > 1; "ion" only after s or t.
_STEP_4_SUFFIXES = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = frozenset(_STEP_4_SUFFIXES.split())


def _shape(word: str) -> str:
    """ "c" or "v" for each letter."""
    shape = ""
    for position, letter in enumerate(word):
        vowel = letter in _VOWELS or (letter == "y" and position > 0 and shape[-1] == "c")
        shape += "v" if vowel else "c"
    return shape


def _measure(stem: str) -> int:
    return _shape(stem).count("vc")


def _ends_double(stem: str) -> bool:
    return len(stem) > 1 and stem[-1] == stem[-2] and _shape(stem)[-1] == "c"


def _ends_short(stem: str) -> bool:
    """Consonant, vowel, consonant, the last not w, x or y: a stem that had an e ("hop" of "hoping")."""
    return _shape(stem)[-3:] == "cvc" and stem[-1] not in "wxy"


def _longest(word: str, suffixes: dict[str, str] | frozenset[str]) -> str:
    return max((suffix for suffix in suffixes if word.endswith(suffix)), key=len, default="")


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _participle(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        stem = word.removesuffix(suffix)
        if stem == word:
            continue
        if "v" not in _shape(stem):
            return word
        if stem.endswith(("at", "bl", "iz")):
            return stem + "e"
        if _ends_double(stem) and stem[-1] not in "lsz":
            return stem[:-1]
        return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem
    return word


def _replace(word: str, suffixes: dict[str, str]) -> str:
    suffix = _longest(word, suffixes)
    stem = word.removesuffix(suffix)
    return stem + suffixes[suffix] if suffix and _measure(stem) > 0 else word


def _derived(word: str) -> str:
    suffix = _longest(word, _STEP_4)
    stem = word.removesuffix(suffix)
    if not suffix or _measure(stem) <= 1 or (suffix == "ion" and not stem.endswith(("s", "t"))):
        return word
    return stem


def _final(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        measure = _measure(stem)
        if measure > 1 or (measure == 1 and not _ends_short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


@lru_cache(maxsize=100_000)
def stem(word: str) -> str:
    """A word's stem, in lower case. Words of one or two letters are their own."""
    word = word.lower()
    if len(word) <= 2:
        return word
    word = _participle(_plural(word))
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    return _final(_derived(_replace(_replace(word, _STEP_2), _STEP_3)))
