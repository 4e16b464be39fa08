"""Let a teacher model write the reasoning of posts whose keyphrases are known.

    python gen_cot.py train.jsonl --out train_cot.jsonl --model gpt-4o --dry-run
    python gen_cot.py train.jsonl --out train_cot.jsonl --model gpt-4o
    python gen_cot.py train.jsonl --out cot.jsonl --model M --base-url http://localhost:8000/v1

Any server that speaks OpenAI's chat-completions protocol will do. A run can be stopped, killed and
started again: a post that has its reasoning is never asked for again. Posts without an acceptable
one go, with the reason and the last reply, to a file beside --out, train_cot.failed.jsonl;
--retry-failed asks for them again.
"""

import asyncio
import contextlib
import json
import os
import re
import statistics
from array import array
from collections import Counter
from functools import partial
from pathlib import Path

import data
from evaluate import CJK, UserError, non_negative_int, normalize, plural, run
from support.client import Client, Failed, add_server_options, chat_request, endpoint
from support.console import (
    WITHOUT_RATE,
    ArgumentParser,
    info,
    number,
    positive_int,
    progress,
    writing,
)
from support.images import MAX_PIXELS, Unreadable, image_url
from support.jsonl import JsonlWriter, locked, read_settings, write_settings
from support.log import say_output, say_posts, say_server, say_stopped
from support.records import add_map_option

OPENAI = "https://api.openai.com/v1"
PROMPT = """\
You help to make training data for a model that predicts the keyphrases (hashtags) of a social \
media post from its text and its image. Below are a post and the keyphrases that its author \
chose; its image, if it has one, is above.

Write the reasoning that leads from what can be seen in the image and read in the text to exactly \
these keyphrases. Write it as the model would that knows only the post: name what is seen and \
what is read, say what follows when both are put together, and arrive at the keyphrases at the \
end. Do not say or hint that the keyphrases were known, and do not argue backwards from them. \
Invent nothing that is neither in the post nor common knowledge. Use 30 to 120 words, plain \
sentences, no lists.

Answer in this form and write nothing else; repeat the keyphrases as they are, separated by \
semicolons:
<think>the reasoning</think><answer>the keyphrases</answer>

Post: {text}

Keyphrases: {keyphrases}
"""

# Reasoning with one of these in it mentions keyphrases that it should not know. `#` stands for any
# word for keyphrases.
GIVE_AWAYS = """
given # / provided # / supplied # / target # / reference # / gold # / expected # / correct #
chosen # / # are given / # were given / # are provided / # were provided
keyphrases given / keyphrases provided / keywords given / keywords provided
author's keyphrase / author chose these / given answer / provided answer
ground truth / as instructed
给定的关键词 / 所给的关键词 / 给出的关键词 / 提供的关键词 / 给定的标签 / 提供的标签 / 标准答案
"""
KEYPHRASE = r"(?:keyphrase|key phrase|keyword|hash ?tag|tag)s?"
PHRASES = map(re.escape, re.split(r" / |\n", GIVE_AWAYS.strip()))
GIVE_AWAY = re.compile("|".join(PHRASES).replace(r"\#", KEYPHRASE))

# ------------------------------------------------------------------------------ accepting a reply

WITHIN = "((?:(?!" + "|".join(data.TAGS) + ").)*)"
PAIR = re.compile(f"<think>{WITHIN}</think>{WITHIN}<answer>{WITHIN}</answer>", re.DOTALL)


def wanted(keyphrases):
    """Keyphrases as they are compared with a reply's: a set, stemmed, read by the same parser."""
    answer = f"<answer>{'; '.join(keyphrases)}</answer>"
    return {normalize(phrase) for phrase in data.parse_answer(answer)[0]}


def count_words(text):
    """The number of words between white space; a Chinese or Japanese character is one word."""
    return len(CJK.sub(r" \1 ", text).split())


def last_pair(text):
    """(reasoning, answer) of the last well-formed pair: a thinking teacher has its own tags before.

    Raises Failed.
    """
    tags = tuple(re.findall("|".join(data.TAGS), text))
    if missing := [tag for tag in data.TAGS if tag not in tags]:
        raise Failed(f"tag missing: {missing[0]}", text)
    pairs = [(think.strip(), answer) for think, _, answer in PAIR.findall(text)]
    if tags != data.TAGS:
        pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        raise Failed(f"tag misplaced: {''.join(tags)}", text)
    return pairs[-1]


def accepted(reply, keyphrases, min_words, max_words):
    """The reasoning in a reply. Raises Failed with the reason why it is not accepted."""
    if reply.cut:
        raise Failed("cut off: the reply ran out of tokens", reply.text)
    reasoning, answer = last_pair(reply.text)
    answer, _ = data.parse_answer(f"<answer>{answer}</answer>")
    words = count_words(reasoning)
    plain = " ".join(re.sub("[-‐–]", " ", reasoning).replace("’", "'").casefold().split())
    reason = None
    if not reasoning or data.TAG.search(reasoning) or data.CHAT_TOKEN.search(reasoning):
        reason = "tag misplaced: no reasoning, or a tag in it"
    elif wanted(answer) != wanted(keyphrases):
        reason = f"other keyphrases: {data.plain_answer(answer)}"
    elif words < min_words:
        reason = f"too short: {plural(words, 'word')}"
    elif words > max_words:
        reason = f"too long: {plural(words, 'word')}"
    elif found := GIVE_AWAY.search(plain):
        reason = f"gives away: {found[0]}"
    if reason:
        raise Failed(reason, reply.text)
    return reasoning


# ---------------------------------------------------------------------------- the files of a run


class Results:
    """What a run has: the posts with reasoning in --out, the failed ones in a file beside it."""

    def __init__(self, posts, out):
        self.posts, self.out = posts, Path(out)
        failed = self.out.parent / f"{self.out.stem}.failed.jsonl"
        for path in (self.out, failed):
            if path.exists() and not path.is_file() or path.resolve() == posts.path.resolve():
                reason = "is the input itself, or no file on a disk"
                raise UserError(f"{path}: {reason}; choose another --out")
        self.good = JsonlWriter(self.out, len(posts))
        self.failed = JsonlWriter(failed, len(posts))
        self.words = array("L")  # lengths of the reasonings

    def load(self, teacher, mix):
        """Read what earlier runs left. Raises UserError where this run can't go on with it.

        teacher: what the reasonings depend on, a dict; `mix` allows several in one file.
        """
        self.teachers = [teacher]
        files = [file.path for file in (self.good, self.failed) if file.path.exists()]
        if not any(path.stat().st_size for path in files):
            return
        before = read_settings(self.out, list)
        if teacher not in before and not mix:
            raise UserError(
                f"{self.out}: was made with another teacher, prompt or --request; choose another "
                "--out, or allow both in one with --mix"
            )
        self.teachers = before + [teacher] * (teacher not in before)
        index_of = {hash(self.posts[index]["id"]): index for index in range(len(self.posts))}
        fields = "id", "text", "keyphrases"
        for line, offset, record in self.good.read():
            index = index_of.get(hash(str(record.get("id"))))
            post = None if index is None else self.posts[index]
            same = post and all(record.get(field) == post[field] for field in fields)
            if not same or not data.has_cot(record):
                raise UserError(
                    f"{self.out} line {line} (id {record.get('id')}): not a post of "
                    f"{self.posts.path}, unchanged and with its reasoning; choose another --out, "
                    "or remove this line"
                )
            if index not in self.good:
                self.good.offsets[index] = offset
                self.words.append(count_words(record["cot"]))
        for _, offset, record in self.failed.read():
            index = index_of.get(hash(str(record.get("id"))))
            if index is not None and index not in self.good:
                self.failed.offsets[index] = offset

    def add(self, index, record, failed):
        """Write a post with its reasoning, or with the Failed that it met. Raises UserError."""
        with writing(self.out):
            if failed is None:
                self.good.append(record, index=index)
                self.failed.discard(index)
                self.words.append(count_words(record["cot"]))
            else:
                record = record | {"reason": str(failed), "reply": failed.reply}
                self.failed.append(record, index=index)

    def sort(self):
        """Put both files in the input's order. Raises UserError."""
        with writing(self.out):
            self.good.sort()
            self.failed.sort()
            if not self.failed.path.stat().st_size:
                self.failed.path.unlink()

    def moved(self, record):
        """The record for a file in the folder of --out: its image's path is relative to that."""
        image, folder = record.get("image"), os.path.realpath(self.posts.folder)
        if not image or os.path.isabs(image) or folder == os.path.realpath(self.out.parent):
            return record
        return record | {"image": data.relative_path(os.path.join(folder, image), self.out.parent)}


# ----------------------------------------------------------------------------------------- the run


async def reason(client, posts, prompt, args, index):
    """Ask for one post's reasoning: (index, record with `cot`, None) or (index, record, Failed)."""
    record, failed = posts[index], None
    if not wanted(record["keyphrases"]):
        return index, record, Failed("no keyphrases: nothing is left of them after normalisation")
    try:
        request = await asyncio.to_thread(request_for, posts, record, prompt, args)
        for _ in range(args.max_retries + 1):
            reply = await client.ask(request)
            try:
                cot = accepted(reply, record["keyphrases"], args.min_words, args.max_words)
                return index, record | {"cot": cot}, None
            except Failed as rejected:
                failed = rejected
    except Unreadable as error:
        failed = Failed(f"unreadable image: {error}")
    except Failed as unanswered:
        failed = Failed(str(unanswered), unanswered.reply or (failed and failed.reply))
    return index, record, failed


def request_for(posts, record, prompt, args):
    """The request for one post's reasoning. Raises Unreadable."""
    keyphrases = data.plain_answer(record["keyphrases"])
    text = data.fill_prompt(prompt, text=record["text"].strip(), keyphrases=keyphrases)
    path = posts.image_path(record)
    image = image_url(path, args.max_pixels) if path else None
    return chat_request(args, text, image, args.temperature)


def write_reasoning(args, first_wait=2):
    """The whole run; returns 0 if every post asked for has its reasoning, else 1."""
    posts = data.Posts(args.data, for_training=True, names=args.map)
    fields = ("{text}", "{keyphrases}")
    prompt = data.load_prompt_file(args.prompt_file, *fields) if args.prompt_file else PROMPT
    teacher = {"teacher": args.model, "prompt": prompt}
    teacher |= {"request": args.request} if args.request else {}
    results, client = Results(posts, args.out), None
    with contextlib.nullcontext() if args.dry_run else locked(args.out):
        results.load(teacher, args.mix)
        asked = range(min(len(posts), args.limit or len(posts)))
        todo = [index for index in asked if index not in results.good]
        done = len(asked) - len(todo)
        if not args.retry_failed:
            todo = [index for index in todo if index not in results.failed]
        failures = skipped = len(asked) - done - len(todo)
        if args.dry_run:
            before = f"{plural(done, 'post')} done, {skipped} failed before"
            return dry_run(args, posts, prompt, todo, before)
        if todo:
            client = Client(args.base_url, args, min(args.workers, len(asked)), first_wait)
            client.answered = done > 0
            say_posts(posts)
            say_server(args.model, client)
            say_output(args.out, done, skipped)
            with writing(args.out):
                write_settings(args.out, results.teachers)
            answers = client.each(partial(reason, client, posts, prompt, args), todo)
            bar = progress(None, len(asked), initial=done + skipped, bar_format=WITHOUT_RATE)
            with say_stopped(results.good), bar, contextlib.closing(answers):
                for index, record, failed in answers:
                    results.add(index, results.moved(record) | {"teacher": args.model}, failed)
                    failures += failed is not None
                    tokens = bar.format_sizeof(client.prompt_tokens + client.reply_tokens)
                    speed = f"{client.rate():.1f} requests/s, {tokens} tokens"
                    bar.set_postfix_str(f"{failures} failed, {speed}", refresh=False)
                    bar.update()
        results.sort()
    return summary(args, results, asked, skipped, client)


def dry_run(args, posts, prompt, todo, before):
    """Print the first request that would be sent, without its image, and count those to come."""
    for index in todo:
        with contextlib.suppress(Unreadable):  # a post that fails, without a request
            request = request_for(posts, posts[index], prompt, args)
            content = request["messages"][0]["content"]
            if isinstance(content, list):
                image = content[0]["image_url"]
                image["url"] = f"data:image/jpeg;base64,… ({len(image['url']):,} characters)"
            print(f"POST {endpoint(args.base_url).partition('?')[0]}")  # a key may follow `?`
            print(json.dumps(request, indent=2, ensure_ascii=False))
            break
    requests = plural(len(todo), "request")
    print(f"{requests} to come ({before}); more where a reply is asked for again")


def summary(args, results, asked, skipped, client):
    """Print what was done; returns the exit code."""
    done, lengths = sum(index in results.good for index in asked), results.words
    words = ""
    if lengths:
        words = f"; {min(lengths)} to {max(lengths)} words, median {statistics.median(lengths):g}"
    info(f"{args.out}: {done} of {plural(len(asked), 'post')} with reasoning{words}")
    if client:
        info(
            f"{plural(client.requests, 'request')}, {client.rate():.1f} a second; "
            f"{plural(client.prompt_tokens, 'token')} sent, {client.reply_tokens:,} received"
        )
    if done == len(asked):
        return 0
    reasons = (json.loads(line).get("reason", "unknown") for _, line in results.failed.lines())
    kinds = Counter(reason.partition(":")[0] for reason in reasons)
    reasons = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    info(f"{results.failed.path}: {plural(kinds.total(), 'post')} failed: {reasons}")
    if skipped:
        info(f"{skipped} of them in an earlier run; --retry-failed asks for them again")
    return 1


def parse_args(arguments=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("data", metavar="FILE", help="posts with keyphrases (JSONL)")
    add_map_option(add)
    add("--out", metavar="FILE", required=True, help="file for the posts with reasoning (JSONL)")
    add("--model", required=True, help="the teacher's name on the server")
    add("--base-url", help="the server's address; without it OPENAI_BASE_URL, else OpenAI's own")
    add_server_options(parser)
    add("--workers", type=positive_int, default=16, help="requests at the same time")
    add("--limit", type=positive_int, help="use only the first N posts of FILE", metavar="N")
    add("--prompt-file", help="another instruction, with {text} and {keyphrases} in it")
    add("--max-pixels", type=positive_int, default=MAX_PIXELS, help="scale larger images down")
    temperature = number("a number from 0 to 2", lambda x: 0 <= x <= 2)
    add("--temperature", type=temperature, help="the teacher's; without it the server's default")
    tokens_help = "cut a reply off after this many tokens; 0 sends no limit"
    add("--max-new-tokens", type=non_negative_int, default=1024, help=tokens_help)
    add("--min-words", type=non_negative_int, default=10, help="reject shorter reasoning")
    add("--max-words", type=positive_int, default=250, help="reject longer reasoning")
    add("--retry-failed", action="store_true", help="ask again for posts that failed before")
    add("--mix", action="store_true", help="go on with a file of another teacher or prompt")
    add("--dry-run", action="store_true", help="print one request, count them, send nothing")
    args = parser.parse_args(arguments)
    if args.min_words > args.max_words:
        parser.error("--min-words is more than --max-words")
    args.base_url = args.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    return args


def main():
    return write_reasoning(parse_args())


if __name__ == "__main__":
    run(main)
