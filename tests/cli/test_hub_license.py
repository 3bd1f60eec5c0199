"""Licences are read from cards, quoted, and never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from kdlib.cli.hub.license import License, check_license, license_lines, license_of, settled, teacher_names
from tests.cli.fake_hub import TOKEN, fake_hub

APACHE = License(name="apache-2.0", quoted="license: apache-2.0", source="a card")
MIT = License(name="mit", quoted="license: mit", source="a card")


def test_a_card_beside_the_model_is_quoted_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama4\nlicense_link: https://x\n---\nText\n")
    found = license_of(str(tmp_path))
    assert found == License(
        name="other", quoted="license: other; license_name: llama4; license_link: https://x", source="the card beside it"
    )


@pytest.mark.parametrize("card", ["no front matter", "---\ntags: [x]\n---\n", "---\nlicense: [unclosed\n---\n", None])
def test_a_card_that_says_nothing_is_no_licence(card: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(str(tmp_path)) is None


def test_the_hub_is_asked_when_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as hub:
        hub.cards["owner/model"] = {"license": "gemma"}
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert license_of("owner/model") is None  # HF_HUB_OFFLINE
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        found = license_of("owner/model")
        assert found is not None and found.name == "gemma" and "owner/model on the Hub" in found.source
        assert license_of("owner/unknown") is None and license_of("http://127.0.0.1:8000/v1") is None


@pytest.mark.parametrize(
    ("teacher", "names"),
    [
        (None, []),
        ("a/b", ["a/b"]),
        ("SelfTeacher", []),
        ({"SelfTeacher": {"kind": "ema", "decay": 0.9}}, []),
        (["http://x/v1", "http://y/v1"], ["http://x/v1", "http://y/v1"]),
        ({"math": "a/b", "code": "c/d"}, ["a/b", "c/d"]),
        ({"EnsembleTeacher": {"teachers": ["a/b", "c/d"], "weights": [0.5, 0.5]}}, ["a/b", "c/d"]),
        ({"ConsistencyEnsemble": {"teachers": ["a/b", "c/d"], "consistency": "rbf"}}, ["a/b", "c/d"]),
    ],
)
def test_every_teacher_counts(teacher: object, names: list[str]) -> None:
    assert teacher_names(teacher) == names


def test_one_licence_of_all_holds_and_anything_else_takes_a_person() -> None:
    assert settled(None, {"a": APACHE, "b": APACHE}) == "apache-2.0"
    assert settled(None, {"a": APACHE, "b": MIT}) is settled(None, {"a": APACHE, "b": None}) is None
    assert check_license("mit", {"a": None}) == "mit"
    with pytest.raises(ValueError, match="no licence is found for b"):
        check_license(None, {"a": APACHE, "b": None})
    with pytest.raises(ValueError, match="different licences"):
        check_license(None, {"a": APACHE, "b": MIT})
    with pytest.raises(ValueError, match="there is no model whose licence would hold"):
        check_license(None, {})
    assert license_lines({"a": APACHE, "b": None}) == [
        "- `a`: “license: apache-2.0” (a card)",
        "- `b`: no licence was found in its card",
    ]
