"""The code blocks of README, documents and the packages' READMEs.

What is done with a block is said by a comment right above it, which readers do not see:

    <!-- needs data -->           not run: it needs what is named here. Its names and arguments are checked.
    <!-- slow -->                 run by `pytest -m slow`
    <!-- setup: ... -->           run, after the Python code in the comment; also after `slow,`
    <!-- code of acme/data.py --> a part of a file of the example distribution
    <!-- save as data.yaml -->   a file that the reader makes. All blocks of such a page are run as a reader would, one
                                 after another in one folder, commands too, by `pytest -m slow`
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

CHECKOUT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "anomalib_*/README.md", "configs/*.md")
    for path in CHECKOUT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
FENCE = re.compile(
    r"(?:^ *<!-- (?P<comment>(?:(?!-->).)*?) ?-->\n)?"
    r"^(?P<indent> *)```(?P<language>[\w{}-]*)\n(?P<code>.*?)^(?P=indent)```$"
    r"(?:\n\n(?P=indent)```text\n(?P<output>.*?)^(?P=indent)```$)?",
    re.MULTILINE | re.DOTALL,
)
CONSOLE = "$ "


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str  # path below the checkout
    line: int
    language: str
    code: str
    comment: str  # what stands above it; empty without one
    output: str  # of a `text` block right below it; empty without one

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def needs(self) -> bool:
        return self.comment.startswith("needs ")

    @property
    def slow(self) -> bool:
        return self.comment.startswith("slow")

    @property
    def setup(self) -> str:
        return dedent(self.comment.partition("setup:")[2])

    @property
    def file(self) -> str:
        return self.comment.removeprefix("code of ") if self.comment.startswith("code of ") else ""

    @property
    def saved_as(self) -> str:
        return self.comment.removeprefix("save as ") if self.comment.startswith("save as ") else ""

    def commands(self) -> Iterator[list[str]]:
        """Its shell commands as words, without the variables before them."""
        for line in self.code.replace("\\\n", " ").splitlines():
            if self.language == "bash":
                command = line
            elif line.startswith(CONSOLE):
                command = line.removeprefix(CONSOLE)
            else:  # what a command printed
                continue
            words = shlex.split(command, comments=True)
            while words and (words[0] == "time" or re.fullmatch(r"[A-Z_]+=\S*", words[0])):
                del words[0]
            if words and words[0] not in {"for", "done"}:
                yield words


def blocks(*languages: str) -> list[Block]:
    """All blocks of some languages, in the order of the documents."""
    return [block for path in DOCUMENTS for block in _blocks_of(path) if block.language in languages]


def walks() -> dict[str, list[Block]]:
    """Blocks of the pages on which the reader makes files, by the page."""
    every = blocks("yaml", "bash", "python")
    pages = sorted({block.document for block in every if block.saved_as})
    return {page: [block for block in every if block.document == page] for page in pages}


def _blocks_of(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(
            document=path.relative_to(CHECKOUT).as_posix(),
            line=text.count("\n", 0, found.start("code")),
            language=found["language"],
            code=dedent(found["code"]) if found["indent"] else found["code"],
            comment=found["comment"] or "",
            output=dedent(found["output"] or ""),
        )
