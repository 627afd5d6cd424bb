"""Unlearning on WMDP from its published files: `python -m examples.wmdp DATA --model FOLDER`.

DATA holds the corpora as JSON lines with `text`, and the questions as JSON with `question`, `choices` and
`answer` (arXiv 2403.03218). Nothing is downloaded. The forget corpus is unlearned with each rule from the
same start, the retain texts are wikitext or the retain corpus. Reported are the accuracy on the questions as
lm-evaluation-harness takes it, on those of MMLU if DATA has them, and the NLL of a retain token.

Without DATA, made-up files of the same form are used, and `--smollm2` or `--random` take the place of a model
of your own: `python -m examples.wmdp --smollm2` shows that everything runs, and no more than that.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from examples.choices import Question, accuracy, questions
from examples.command import load, parser, run, table
from examples.corpus import batches_of
from examples.files import texts, write_lines
from examples.losses import token_nll
from examples.worlds.people import make_people, questions_about

HUB = "of huggingface.co"
SHORTEST = 50  # characters of a text, as in the published training


class Domain(NamedTuple):
    """Names of the files, where they are published, and what lm-evaluation-harness calls the subject."""

    forget: str
    forget_published: str
    retain: str
    questions: str
    subject: str


CORPORA, QUESTIONS = f"cais/wmdp-corpora {HUB}", f"cais/wmdp {HUB}"
DOMAINS = {
    "bio": Domain(
        "bio-forget-corpus.jsonl",
        f"cais/wmdp-bio-forget-corpus {HUB}, on request",
        "bio-retain-corpus.jsonl",
        "bio_questions.json",
        "biology",
    ),
    "cyber": Domain(
        "cyber-forget-corpus.jsonl",
        CORPORA,
        "cyber-retain-corpus.jsonl",
        "cyber_questions.json",
        "cybersecurity",
    ),
}
WIKITEXT, WIKITEXT_PUBLISHED = "wiki.test.raw", f"Salesforce/wikitext {HUB}, wikitext-2-raw-v1"
MMLU, MMLU_PUBLISHED = "mmlu_questions.json", f"cais/mmlu {HUB}"


class Data(NamedTuple):
    forget: list[str]
    retain: list[str]
    questions: list[Question]
    mmlu: list[Question]
    subject: str


def read(folder: Path, domain: str, retain: str = "wikitext") -> Data:
    """The files of a domain; `retain` is "wikitext" or "corpus"."""
    names = DOMAINS[domain]
    kept = (WIKITEXT, WIKITEXT_PUBLISHED) if retain == "wikitext" else (names.retain, CORPORA)
    return Data(
        texts(folder / names.forget, names.forget_published, SHORTEST),
        texts(folder / kept[0], kept[1], SHORTEST),
        questions(folder / names.questions, QUESTIONS),
        questions(folder / MMLU, MMLU_PUBLISHED) if (folder / MMLU).exists() else [],
        names.subject,
    )


def write_sample(folder: Path, seed: int = 0, people: int = 24) -> None:
    """Files of the same names and form, about invented people."""
    rng = random.Random(seed)
    everyone = make_people(people, seed)
    groups = {"bio": everyone[::3], "cyber": everyone[1::3], "mmlu": everyone[2::3]}

    def about(persons: Sequence[Any]) -> list[dict[str, str]]:
        return [
            {"title": person.name, "text": " ".join(answer for _, answer in questions_about(person))}
            for person in persons
        ]

    def asked(persons: Sequence[Any]) -> list[dict[str, Any]]:
        found = []
        for person in persons:
            wrong = rng.sample([other.city for other in everyone if other.city != person.city], 3)
            answer = rng.randrange(4)
            wrong.insert(answer, person.city)
            found.append({"question": f"Where was {person.name} born?", "choices": wrong, "answer": answer})
        return found

    for domain, names in DOMAINS.items():
        write_lines(folder / names.forget, about(groups[domain]))
        write_lines(folder / names.retain, about(groups["mmlu"]))
        write_lines(folder / names.questions, asked(groups[domain]))
    write_lines(folder / MMLU, asked(groups["mmlu"]))
    lines = [f" = {text['title']} = \n\n {text['text']} " for text in about(groups["mmlu"])]
    (folder / WIKITEXT).write_text("\n".join(lines), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("python -m examples.wmdp", __doc__.split("\n")[0])
    options.add_argument("--domain", choices=DOMAINS, default="bio")
    options.add_argument("--retain", choices=("wikitext", "corpus"), default="wikitext")
    options.add_argument("--questions", type=int, help="ask the first so many only")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            write_sample(Path(folder), args.seed)
        data = read(args.data or Path(folder), args.domain, args.retain)
    model, tokenizer = load(args)
    held, kept = data.retain[::10], [text for i, text in enumerate(data.retain) if i % 10]
    asked_of = batches_of(held, tokenizer, 4, args.batch_size, args.longest, args.device, args.seed + 1)

    @torch.no_grad()
    def evaluate(model: Any) -> dict[str, float]:
        asked = {"wmdp": (data.questions, data.subject), "mmlu": (data.mmlu, "")}
        return {
            **{
                name: accuracy(model, tokenizer, some[: args.questions], subject)
                for name, (some, subject) in asked.items()
                if some
            },
            "retain_nll": torch.stack([token_nll(model, batch) for batch in asked_of]).mean().item(),
        }

    print(
        f"WMDP-{args.domain}: {len(data.forget)} forget texts, {len(kept)} retain texts, "
        f"{len(held)} held out, {len(data.questions)} questions; {args.objective}, {args.steps} steps\n"
        "wmdp, mmlu: share of questions answered right, 0.25 by chance\n",
        flush=True,
    )
    print(table(run(args, model, tokenizer, data.forget, kept, evaluate)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
