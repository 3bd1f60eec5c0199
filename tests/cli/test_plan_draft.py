"""``kdlib plan draft``: shapes as they are asked for, what follows from their costs, and what is printed and written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from kdlib.cli.plan import run
from kdlib.cli.planning.draft import ALPHAS, consequences
from kdlib.cli.planning.shapes import built, shapes
from tests.tiny import tiny_llama

QUICK = ["--context", "8", "--repeats", "2", "--batch_sizes", "1,3", "--num_speculative_tokens", "1,4", "--device", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "target"
    tiny_llama(64, layers=8).save_pretrained(directory)
    return directory


def planned(tmp_path: Path, *words: str) -> dict[str, Any]:
    assert run(["draft", *words, *QUICK, "--output_path", str(tmp_path / "plan.json")]) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def test_every_candidate_is_timed_at_every_batch_size_and_gamma(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = f"[{{num_hidden_layers: 2, hidden_size: 16}}, {{prune: [0, 5]}}, {{path: {target}}}]"
    plan = planned(tmp_path, "--target", str(target), "--candidates", wanted)
    assert [entry["name"] for entry in plan["candidates"]] == ["num_hidden_layers 2, hidden_size 16", "layers 0, 5", "target"]
    counts = [sum(p.numel() for p in tiny_llama(64, layers=layers).parameters()) for layers in (2, 8)]
    assert [entry["parameters"] for entry in plan["candidates"]][1:] == counts and plan["parameters"] == counts[1]
    for entry in plan["candidates"]:
        assert [size["batch_size"] for size in entry["batch_sizes"]] == [1, 3]
        for size in entry["batch_sizes"]:
            assert [row["num_speculative_tokens"] for row in size["rows"]] == [1, 4]
            assert size["c"] == pytest.approx(size["draft_step_seconds"] / size["target_step_seconds"])
            for row in size["rows"]:
                assert row["break_even_acceptance_length"] == pytest.approx(
                    row["num_speculative_tokens"] * size["c"] + row["v"]
                )
    shown = capsys.readouterr().out
    assert len(re.findall(r"(\d\.\d\d[* ]\s*){4}$", shown, flags=re.MULTILINE)) == 3 * 2 * 2 and "vocabulary" not in shown


def test_a_target_known_by_its_configuration_alone(tmp_path: Path) -> None:
    tiny_llama(64, layers=8).config.save_pretrained(tmp_path / "config")
    source = str(tmp_path / "config")
    plan = planned(tmp_path, "--target", source, "--target_random", "true", "--candidates", f"[{{path: {source}}}]")
    assert (
        plan["candidates"][0]["parameters"]
        == plan["parameters"]
        == sum(p.numel() for p in tiny_llama(64, layers=8).parameters())
    )
    with pytest.raises(ValueError, match="cannot load a model"):
        run(["draft", "--target", source, *QUICK])


def test_the_default_is_a_ladder_of_the_targets_layers(target: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path, "--target", str(target))
    assert [entry["candidate"] for entry in plan["candidates"]] == [{"num_hidden_layers": count} for count in (1, 2, 4)]
    with pytest.raises(ValueError, match="no draft to time: add --candidates"):
        shapes(tiny_llama(64, layers=1).config, None)


def test_another_vocabulary_is_said(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(tmp_path, "--target", str(target), "--candidates", "[{vocab_size: 48}]")
    assert "vocab_size 48 has a vocabulary of 48 entries, the target's 64" in capsys.readouterr().out


def test_layers_keep_their_kind() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    config = Qwen3Config(num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=8)

    def kinds_of(asked: dict[str, Any]) -> list[str]:
        source = shapes(config, [asked])[0].source
        assert isinstance(source, Qwen3Config) and source.num_hidden_layers == len(source.layer_types)
        return source.layer_types

    assert kinds_of({"prune": [1, 3]}) == kinds_of({"prune": {"layers": [1, 3]}}) == ["sliding_attention"] * 2
    assert kinds_of({"num_hidden_layers": 3}) == kinds[:3]
    assert len(kinds_of({"num_hidden_layers": 6})) == 6
    assert config.layer_types == kinds


def test_names_that_a_configuration_has_for_others_work() -> None:
    source = shapes(GPT2Config(n_layer=4), [{"num_hidden_layers": 2}])[0].source
    assert isinstance(source, GPT2Config) and source.n_layer == 2


def test_random_weights_have_the_dtype_asked_for() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.dtype = torch.bfloat16
    changed = shapes(config, [{"hidden_size": 16}])[0].source
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        assert built(changed, random=True, dtype=dtype, device=CPU).dtype == expected


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ("[{num_hidden_layer: 1}]", "unknown option num_hidden_layer of LlamaConfig: did you mean num_hidden_layers?"),
        ("[{num_hidden_layers: two}]", "no LlamaConfig has .*num_hidden_layers.*expected int"),
        ("[{num_attention_heads: 3}]", "multiple of the number of attention heads"),
        ("[{num_key_value_heads: 3}]", "4 attention heads do not share 3 of keys and values"),
        ("[{prune: [0, 8]}]", r"from 0 to 7: not \[0, 8\]"),
        ("[{prune: [5, 0]}]", "rising"),
        ("[{prune: [0], hidden_size: 8}]", "nothing beside it"),
        ("[{}]", "an empty candidate"),
        ("[{path: /no/such/place}]", "the directory does not exist"),
    ],
)
def test_what_is_no_shape_is_refused_in_one_line(target: Path, candidates: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        run(["draft", "--target", str(target), "--candidates", candidates, *QUICK])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["--batch_sizes", "0"], ["--num_speculative_tokens", "0,2"], ["--repeats", "0"]])
def test_numbers_below_one_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        run(["draft", "--target", "unused", *words])


def test_consequences_of_costs() -> None:
    """Numbers by hand: at alpha 0.8 one drafted token gives 1.8 tokens, three give 1 + .8 + .64 + .512 = 2.952."""
    found = consequences(c=0.2, v={1: 1.0, 3: 1.2})
    one, three = found["rows"]
    assert one["speedup"]["0.8"] == pytest.approx(1.8 / 1.2) and three["speedup"]["0.8"] == pytest.approx(2.952 / 1.8)
    assert one["break_even_alpha"] == pytest.approx(0.2) and one["break_even_acceptance_length"] == pytest.approx(1.2)
    assert found["best_num_speculative_tokens"]["0.8"] == 3 and found["can_pay"]
    assert set(found["best_num_speculative_tokens"]) == {str(alpha) for alpha in ALPHAS}


def test_a_draft_as_slow_as_its_target_cannot_pay() -> None:
    found = consequences(c=1.0, v={1: 1.1, 3: 1.2})
    assert not found["can_pay"] and [row["break_even_alpha"] for row in found["rows"]] == [None, None]
    assert set(found["best_num_speculative_tokens"].values()) == {None}
    assert not consequences(c=1.01, v={1: 0.9})["can_pay"], "c >= 1, whatever noise says of v"
    assert consequences(c=0.5, v={1: 1.6, 3: 1.6})["can_pay"], "at gamma 3 alone"


def test_plan_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2 and "kdlib plan WHAT" in capsys.readouterr().out
    assert run(["--help"]) == 0 and "draft" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean draft"):
        run(["drafts"])
    assert run(["draft", "--help"]) == 0 and "--candidates" in capsys.readouterr().out


def test_loaded_weights_are_those_of_the_path(target: Path) -> None:
    loaded = built(str(target), random=False, dtype="auto", device=CPU)
    expected = AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), expected.parameters(), strict=True))
