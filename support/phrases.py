"""What stands in a model's reply: tags, tokens of chat formats, and the phrases of a list.

`split_keyphrases` drops what a list is decorated with:

`1. **foxes** 2. **kit**`, `["foxes", "kit"]`, `Tags: #foxes #kit` and `「foxes」「kit」` are the
phrases foxes and kit; `2. bundesliga`, `c#`, `#1 fan` and `u.s.` are phrases as they stand.
"""

import json
import re

from evaluate import canonical

# Models also write tags in capitals, in other letters and brackets, translated, or without the `>`.
TAG = re.compile(
    r"[<＜◁[](?:(?<!\[)|(?=/?(?-i:THINK)\]))([/／]?)"  # [THINK] in capitals only
    r"(?:((?:seed:)?think(?:ing)?|thought|reasoning|思考|ｔｈｉｎｋ)|answers?|答案|ａｎｓｗｅｒ)"
    r"(?:\s*[>＞▷\]]|\b)",
    re.IGNORECASE,
)
# Tokens of chat formats that some servers and tokenizers leave in the text: those that begin or end
# a turn, and any others, such as <|begin_of_box|>.
TURN_TOKEN = re.compile(
    r"<(?:\|(?:im_start|start_header_id)\||start_of_turn)>(?:\s*(?:assistant|model)\b)?"
    r"|<[|｜](?:im_end|eo[mts]\w{0,3}|end(?:[_▁]?of[_▁]?(?:text|sentence|turn|utterance))?"
    r"|return|call|user|assistant|system|observation)[|｜]>"
    r"|</s>|<(?:(?:seed:)?eos|eod|end_of_turn|end_of_utterance)>",
    re.IGNORECASE,
)
CHAT_TOKEN = re.compile(
    TURN_TOKEN.pattern + r"|<[|｜][^<>]{1,40}[|｜]>|<s>|<(?:(?:seed:)?bos|pad)>", re.IGNORECASE
)

# Most answers hold nothing that could be decoration. To check those of a data set takes a fifth.
WORDS_ONLY = re.compile(r"[^\W_①-⑳❶-❿]+(?:(?:;? |[-'’&])[^\W_①-⑳❶-❿]+)*")
NAME = (
    r"key[ -]?phrases?|key[ -]?words?|hash[ -]?tags?|关键[词字]|关键短语|關鍵[詞字]|标签|標籤"
    r"|키워드|해시태그|キーワード|ハッシュタグ|palabras clave|mots[ -]clés|ключевые слова|хештеги"
)
SHORT = rf"(?:(?:the|final|predicted)\s)*(?:{NAME}|tags?|topics?|answers?|答案)(?: are| is)?"
LABEL = re.compile(
    r"^(?:"
    rf"[^:：;；\n\r]{{0,80}}?(?:{NAME})[^:：;；\n\r]{{0,40}}[:：=]"  # `Here are the hashtags:`
    rf"|\W{{0,9}}{SHORT}\W{{0,3}}?[:：】\n\r]+"  # `Tags:`, or a heading
    r")",
    re.IGNORECASE | re.MULTILINE,
)
PART_START = r"(?:^|(?<=[;；؛,，、،\n])|(?<=[;；؛,，、،\n] ))"
NUMBER = r"[(（]?(\d{1,3})(?:[.)．）](?!\d)|、)"
SIGN = "[•·・∙▪▫◦‣●○■□◆◇►▶➤✓✔①-⑳❶-❿]"
BULLET = re.compile(rf"^(?:{SIGN}|\d\ufe0f?\u20e3|[-*–—+](?=\s))+\s*")
HASH = r"\\?[#＃](?!\d+(?!\w|\S{0,9}[#＃]))"  # not before a number alone: `#1 fan`
QUOTES = dict(zip("\"'`*_[{“‘«「『《〈【", "\"'`*_]}”’»」』》〉】", strict=True))
BETWEEN_QUOTES = re.compile(
    r"(?<=[\"'`”’»」』》〉】])\s*[,，、]\s*(?=[\"'`“‘«「『《〈【])"  # with a comma,
    r"|(?<=[”»」』》〉】])\s*(?=[“«「『《〈【])"  # or with nothing
)
ABBREVIATION = re.compile(r"(?:^|[ #＃])(?:[^\W\d]{1,3}\.){2,}$")  # `u.s.` keeps its period


def split_keyphrases(text):
    """The clean, distinct phrases of an answer's text, in order.

    They are split at semicolons and line breaks, at commas only where there is no semicolon. What
    decorates a list is dropped: code fences, JSON, a label, numbers in sequence, bullets, hash
    signs, quotes, the period of a sentence, and repetitions.
    """
    if WORDS_ONLY.fullmatch(text):
        return distinct(text.split("; "))
    text = re.sub(r"```(?:\w*(?=\s*[\r\n])|json)?", "\n", text)
    text = re.sub(r"(?<!\w)\*\*([^*\n]+)\*\*(?!\w)", r"\1", text).strip()
    if strings := json_strings(text):
        text = "; ".join(strings) + ";"
    text = unquoted(LABEL.sub("", unquoted(text)).strip())
    if text.startswith("[") and "]" not in text:  # a list that is cut off
        text = text[1:]
    text = BETWEEN_QUOTES.sub(";", text)
    if re.match(SIGN, text):  # `•foxes •kit` on one line
        text = re.sub(rf"(?<!\S){SIGN}", ";", text)
    exact = text.endswith((";", "；"))  # as `plain_answer` writes it: keep commas and periods
    text = without_numbers(text)
    separators = r"[;；؛\n\r]" if re.search("[;；؛]", text) else r"[,，、،\n\r]"
    parts = [part for part in map(undecorated, re.split(separators, text)) if part]
    if len(parts) > 1 and all(re.match(r"[-*–—+](?!\d)", part) for part in parts):
        parts = [part[1:] for part in parts]
    sentences = all(part.endswith((".", "。")) for part in parts)
    phrases = []
    for number, part in enumerate(parts, start=1):
        ends_sentence = not exact and (sentences or number == len(parts))
        if ends_sentence and not ABBREVIATION.search(part):
            part = part.rstrip(".。 ")
        for tags in re.split(rf" (?={HASH}\w)", part):
            for phrase in re.split(HASH, tags) if re.match(HASH, tags) else [tags]:
                phrases.append(undecorated(phrase))
    return distinct(filter(None, phrases))


def distinct(phrases):
    """The phrases without those that an earlier one equals in any case."""
    first = {}
    for phrase in phrases:
        first.setdefault(phrase.casefold(), phrase)
    return list(first.values())


def without_numbers(text):
    """`text` with semicolons for the numbers of a list: `2. bundesliga` alone is a phrase."""
    for start in [PART_START, r"(?<!\S)"] if re.match(NUMBER, text) else [PART_START]:
        numbers = [int(number) for number in re.findall(start + NUMBER, text)]
        if len(numbers) > 1 and numbers == [*range(1, len(numbers) + 1)]:
            return re.sub(start + NUMBER, ";", text)
    return text.removeprefix("1、")  # this is a number even alone


def json_strings(text):
    """The strings of the first JSON list in `text`; none where there is no such list."""
    try:
        items, _ = json.JSONDecoder(strict=False).raw_decode(text, text.index("["))
    except (ValueError, RecursionError):
        return []
    return [item for item in items if isinstance(item, str)]


def undecorated(phrase):
    """A phrase without the bullets and quotes around it, its white space single spaces."""
    phrase = canonical(phrase)
    for _ in range(3):  # quotes within quotes
        phrase = unquoted(BULLET.sub("", phrase.strip(" ,，、،")))
    return phrase


def unquoted(text):
    """`text` without quotes around the whole of it; those of `"a" and "b"` are not."""
    closing = QUOTES.get(text[:1])
    if closing and 0 < text.find(closing, 1) == len(text) - 1:
        return text[1:-1].strip()
    return text
