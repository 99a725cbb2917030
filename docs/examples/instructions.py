"""A small set of instructions to fine-tune `tiny` on, and a look at whether it follows them (docs/finetuning.md).

    python docs/examples/instructions.py write FOLDER    # FOLDER/train.jsonl and FOLDER/held_out.jsonl
    python docs/examples/instructions.py check ANSWERS   # what `hybrid generate --batch FOLDER/held_out.jsonl` wrote

A prompt names a task and a word; each task wants its answer in a form of its own. No word that is held out is in the
training set. An answer has the right form if the task's pattern matches all of it, and is right if it is the answer.
Needs nothing but Python.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# What each task makes of a word, and the form that any answer to it has.
TASKS: dict[str, tuple[Callable[[str], str], str]] = {
    "upper": (str.upper, r"[A-Z]+"),
    "spell": ("-".join, r"[a-z](-[a-z])+"),
    "quote": (lambda word: f'"{word}"', r'"[a-z]+"'),
    "count": (lambda word: f"{len(word)} letters", r"\d+ letters"),
    "call": (lambda word: f"{word}()", r"[a-z]+\(\)"),
}
EXAMPLES, HELD_OUT = 4000, 200


def prompt(task: str, word: str) -> str:
    """What the model is given."""
    return f"{task}: {word}\n"


def write(folder: Path) -> None:
    """Write examples to train on and prompts to ask afterwards; the same ones every time."""
    chance = random.Random(0)
    words: set[str] = set()
    while len(words) < EXAMPLES + HELD_OUT:
        words.add("".join(chance.choices(LETTERS, k=chance.randint(3, 6))))
    asked = [(list(TASKS)[number % len(TASKS)], word) for number, word in enumerate(sorted(words))]
    chance.shuffle(asked)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.jsonl").open("w") as file:
        for task, word in asked[HELD_OUT:]:
            file.write(json.dumps({"prompt": prompt(task, word), "response": TASKS[task][0](word)}) + "\n")
    with (folder / "held_out.jsonl").open("w") as file:
        for task, word in asked[:HELD_OUT]:
            file.write(json.dumps({"prompt": prompt(task, word), "max_tokens": 32}) + "\n")


def check(answers: Path) -> None:
    """Print the share of answers that have the form that was asked for, and of those that are right, by task."""
    counts = {task: [0, 0, 0] for task in TASKS}
    for line in answers.read_text().splitlines():
        answer = json.loads(line)
        task, _, word = answer["prompt"].strip().partition(": ")
        make, form = TASKS[task]
        ended = answer["finish_reason"] == "stop"
        counts[task][0] += 1
        counts[task][1] += ended and re.fullmatch(form, answer["text"]) is not None
        counts[task][2] += ended and answer["text"] == make(word)
    counts["all"] = [sum(each) for each in zip(*counts.values(), strict=True)]
    for task, (asked, formed, right) in counts.items():
        if asked:
            print(f"{task}: {asked} asked, {formed / asked:.1%} in the right form, {right / asked:.1%} right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["write", "check"])
    parser.add_argument("path", type=Path)
    arguments = parser.parse_args()
    sys.exit({"write": write, "check": check}[arguments.what](arguments.path))
