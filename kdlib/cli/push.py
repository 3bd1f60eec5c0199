"""``kdlib push``: a finished run, a cache or traces to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from kdlib.cli.parsing import parse

DESCRIPTION = """kdlib push DIR --repo_id OWNER/NAME sends what a command has written to the Hugging Face Hub, with its card.

Of a run, final/ alone goes, as a model. The output of kdlib cache and of kdlib generate goes as a data set.

It needs a token (hf auth login, or HF_TOKEN), and a licence: that of the models it was made of, read from their cards, or
--license. Nothing is ever pushed without being asked for."""


@dataclass
class PushArguments:
    """What goes where.

    Args:
        directory: output_dir of a finished command, or a model with its card; may be typed without its name.
        repo_id: NAME, or OWNER/NAME of a user or an organisation.
        private: make the repository private when it is made; null takes the owner's default.
        revision: a branch instead of main.
        license: licence to publish under, by the Hub's name for it; null takes the one in the card.
    """

    directory: str
    repo_id: str
    private: bool | None = None
    revision: str | None = None
    license: str | None = None


def run(words: list[str]) -> int:
    named = ["--directory", *words] if words and not words[0].startswith("-") else words
    options = parse("push", DESCRIPTION, [PushArguments], named)
    if options is None:
        return 0
    arguments = options.build(PushArguments)
    url = _pushed(arguments, Path(arguments.directory))
    Console(soft_wrap=True, highlight=False).print(f"pushed  {url}", markup=False)
    return 0


def _pushed(a: PushArguments, directory: Path) -> str:
    from kdlib.cli.hub.data import push_data
    from kdlib.cli.hub.target import Target, check_hub

    if not directory.is_dir():
        raise ValueError(f"no directory {directory}: give the output_dir of a finished command")
    check_hub("kdlib push")
    model = _model(directory)
    target = Target(repo_id=a.repo_id, private=a.private, revision=a.revision)
    if model is None:
        return push_data(directory, replace(target, repo_type="dataset"), license=a.license)
    _license(model, a.license)
    return target.push(model, message=directory.resolve().name)


def _model(directory: Path) -> Path | None:
    """final/ of a run, or a directory that is a model; None for anything else."""
    from kdlib.cli.run_directory import RunDirectory

    run = RunDirectory(directory)
    if (directory / "config.yaml").is_file() and not run.done:
        raise ValueError(f"the run in {directory} is not finished: the command in its command.txt goes on with it")
    if run.done:
        return run.final
    config = ("config.json", "adapter_config.json")
    return directory if any((directory / name).is_file() for name in config) else None


def _license(model: Path, given: str | None) -> None:
    """The card's licence, or the given one, which is written into it; ValueError for a model without both."""
    from huggingface_hub import ModelCard

    from kdlib.files import write_whole

    path = model / "README.md"
    if not path.is_file():
        raise ValueError(f"{model} has no card (README.md): write one that says what the model is made of, then push")
    card = ModelCard.load(path)
    if given is None and not card.data.license:
        raise ValueError(
            f"the card of {model} names no licence, because those of its teacher and base model are not known or differ: "
            "read what their owners allow, and add --license NAME (such as apache-2.0)"
        )
    if given is not None and given != card.data.license:
        card.data.license = given
        write_whole(path, str(card))
