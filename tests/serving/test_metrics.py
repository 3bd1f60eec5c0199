"""vLLM's /metrics as text: which counters are read, whatever their labels, and what differences of them mean."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kdlib.serving.metrics import Counters, parse_counters

# As vLLM 0.32 writes it, other families left out.
TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 0.0
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 18.0
# HELP vllm:spec_decode_num_drafts_created Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_created gauge
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7952642270078557e+09
# HELP vllm:spec_decode_num_draft_tokens_total Number of draft tokens.
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 54.0
# HELP vllm:spec_decode_num_accepted_tokens_total Number of accepted tokens.
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 4.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_total Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 3.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 1.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 0.0
# HELP vllm:spec_decode_num_accepted_tokens_per_pos_created Accepted tokens per draft position.
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_created gauge
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="m",position="0"} 1.7952642270080771e+09
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 24.0
# HELP vllm:generation_tokens_created Number of generation tokens processed.
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="m"} 1.7952642270088825e+09
"""
PARSED = Counters(
    generation_tokens=24,
    drafts=18,
    draft_tokens=54,
    accepted_tokens=4,
    accepted_per_position=(3, 1, 0),
    created=1795264227.0088825,
)


def lines_without(text: str, part: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if part not in line)


def test_counters_are_read() -> None:
    assert parse_counters(TEXT) == PARSED


def test_names_without_total_and_without_comments_are_read() -> None:
    samples = lines_without(TEXT, "#").replace("_total{", "{")
    assert parse_counters(samples) == PARSED


def test_engines_and_other_labels_are_summed() -> None:
    second = lines_without(TEXT, "#").replace('engine="0",model_name="m"', 'model_name="a \\"b\\"},",pod="x",engine="1"')
    assert parse_counters(lines_without(TEXT, "#") + second) == Counters(
        generation_tokens=48,
        drafts=36,
        draft_tokens=108,
        accepted_tokens=8,
        accepted_per_position=(6, 2, 0),
        created=PARSED.created,
    )


def test_positions_are_ordered_as_numbers() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    many = "".join(f'{name}{{position="{i}"}} {100 - i}\n' for i in (10, 2, 0, 1, 9, 3, 8, 4, 7, 5, 6))
    assert parse_counters(lines_without(TEXT, "per_pos") + many).accepted_per_position == tuple(range(100, 89, -1))


def test_a_server_without_speculation_has_no_acceptance() -> None:
    counters = parse_counters(lines_without(TEXT, "spec_decode"))
    assert counters == Counters(generation_tokens=24, created=PARSED.created)
    between = replace(counters, generation_tokens=30).since(counters)
    assert between.drafts is None and between.generation_tokens == 6
    assert between.acceptance_length is between.acceptance_rate is between.per_position is None


def test_rates_are_those_of_the_difference() -> None:
    after = Counters(
        generation_tokens=124,
        drafts=58,
        draft_tokens=174,
        accepted_tokens=64,
        accepted_per_position=(33, 21, 10),
        created=PARSED.created,
    )
    between = after.since(PARSED)
    assert (between.generation_tokens, between.drafts, between.draft_tokens, between.accepted_tokens) == (100, 40, 120, 60)
    assert between.acceptance_length == pytest.approx(1 + 60 / 40) and between.acceptance_rate == pytest.approx(60 / 120)
    assert between.per_position == pytest.approx([30 / 40, 20 / 40, 10 / 40])
    assert between.acceptance_length == pytest.approx(1 + sum(between.per_position))


def test_no_rounds_give_no_rates() -> None:
    nothing = PARSED.since(PARSED)
    assert nothing.drafts == 0
    assert nothing.acceptance_length is nothing.acceptance_rate is nothing.per_position is None


@pytest.mark.parametrize(
    "after",
    [
        replace(PARSED, generation_tokens=23),
        replace(PARSED, drafts=17),
        replace(PARSED, accepted_per_position=(3, 0, 0)),
        replace(PARSED, generation_tokens=1000, created=PARSED.created + 60),  # started again, and busy since
        Counters(generation_tokens=1000, created=PARSED.created),
    ],
)
def test_counters_that_began_again_are_an_error(after: Counters) -> None:
    with pytest.raises(ValueError, match=r"began again .* restarted"):
        after.since(PARSED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no counters of vLLM's"),
        ("process_cpu_seconds_total 3.0\n", "no counters of vLLM's"),
        ('{"detail": "Not Found"}', "not in Prometheus' text format|no counters"),
        ("vllm:generation_tokens_total many\n", "not in Prometheus' text format"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_counters(text)
