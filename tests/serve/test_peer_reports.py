"""What users of other servers have reported, and the tests that would find it here: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

# Report, the threads that it was read in, and its tests.
REPORTS: list[tuple[str, str, list[str]]] = [
    (
        "the client is gone and the generation goes on, as a stream and not",
        "ggml-org/llama.cpp#24496 ggml-org/llama.cpp#11720 vllm-project/vllm#10806 vllm-project/vllm#54947",
        ["serve/test_disconnects.py::test_a_client_that_leaves_ends_its_request"],
    ),
    (
        "a queued request runs although its client left",
        "ggml-org/llama.cpp#13262 ikawrakow/ik_llama.cpp#1020",
        ["serve/test_disconnects.py::test_a_request_cancelled_in_the_queue_never_runs"],
    ),
    (
        "the cancel of one client ends another's answer",
        "ikawrakow/ik_llama.cpp#1929",
        ["serve/test_disconnects.py::test_a_neighbours_text_is_the_same"],
    ),
    (
        "a broken connection ends the process, or leaves a damaged prompt cache",
        "ml-explore/mlx-lm#677 ml-explore/mlx-lm#405",
        [
            "serve/test_disconnects.py::test_hard_closes_leave_the_server_as_it_was",
            "runtime/test_prefix_reuse.py::test_a_cancelled_prompt_leaves_what_was_written",
        ],
    ),
    (
        "memory grows with the prompt cache",
        "ml-explore/mlx-lm#1390 ml-explore/mlx-examples#1124",
        ["serve/test_command.py::test_clients_of_all_kinds_get_their_texts_and_memory_stays"],
    ),
    (
        "a stop string leaks, or is missed",
        "vllm-project/vllm#3574 vllm-project/vllm#2577 vllm-project/vllm#534 vllm-project/vllm#57052",
        [
            "runtime/text/test_text.py::test_stop_strings",
            "runtime/text/test_replies.py::test_stop_strings_are_of_the_content",
            "serve/chat/test_chat.py::test_a_stop_string_is_of_the_content",
        ],
    ),
    (
        "empty chunks where a stop string is given",
        "vllm-project/vllm#13087",
        [
            "serve/test_completions.py::test_a_stream_has_the_same_text",
            "serve/chat/test_chat.py::test_a_streams_chunks_come_in_order",
        ],
    ),
    (
        "characters of several bytes are cut, in texts and in arguments",
        "mlc-ai/mlc-llm#804 mudler/LocalAI#677 Blaizzy/mlx-vlm#1076 ggml-org/llama.cpp#28926",
        [
            "serve/test_completions.py::test_characters_arrive_whole",
            "serve/chat/test_tool_calls.py::test_deltas_of_a_call",
        ],
    ),
    (
        "a template of the request takes minutes",
        "vllm-project/vllm#52025 vllm-project/vllm#50300 sgl-project/sglang#28135",
        [
            "serve/chat/test_chat.py::test_bad_requests_are_refused_before_the_queue",
            "serve/chat/test_chat.py::test_the_server_answers_while_a_template_runs",
        ],
    ),
    (
        "a template runs code",
        "sgl-project/sglang#23660 BerriAI/litellm#2949 guidance-ai/guidance#1475",
        [
            "runtime/text/test_text.py::test_chat_template_is_confined",
            "inputs/test_template.py::test_the_process_has_nothing_of_ours",
            "serve/chat/test_chat.py::test_text_of_a_request_is_no_template",
        ],
    ),
    (
        "n, top_logprobs or a token id out of range ends the server",
        "sgl-project/sglang#36856 local-inference-lab/vllm#264",
        [
            "serve/test_limits.py::test_a_value_out_of_range_is_refused",
            "serve/chat/test_chat.py::test_bad_requests_are_refused_before_the_queue",
        ],
    ),
    (
        "a bad schema ends the engine, or the answer goes on without it",
        "vllm-project/vllm#17248 vllm-project/vllm#17313 vllm-project/vllm#43920 ggml-org/llama.cpp#19051 "
        "huggingface/text-generation-inference#2280",
        [
            "serve/chat/test_chat.py::test_bad_requests_are_refused_before_the_queue",
            "serve/chat/test_structured.py::test_a_dead_end_is_an_error",
        ],
    ),
    (
        "the queue has no end",
        "vllm-project/vllm#18826 vllm-project/vllm#2901",
        [
            "serve/test_limits.py::test_a_full_queue_says_when_to_ask_again",
            "serve/test_limits.py::test_waiting_tokens_have_a_limit",
        ],
    ),
    (
        "a server that hangs says that it is well",
        "vllm-project/vllm#39863",
        ["serve/test_status.py::test_health_fails_when_the_engine_hangs_or_ends"],
    ),
    (
        "any web page may call the server of one's own machine",
        "ggml-org/llama.cpp#25606 nomic-ai/gpt4all#3681 nomic-ai/gpt4all#3587",
        [
            "serve/test_access.py::test_a_foreign_page_gets_nothing",
            "serve/test_access.py::test_a_foreign_host_is_refused",
        ],
    ),
    (
        "a delta of a tool call has no index",
        "ollama/ollama#7881 ml-explore/mlx-lm#598",
        ["serve/chat/test_tool_calls.py::test_the_clients_stream_helper_assembles_two_calls"],
    ),
    (
        "Kimi's ids of calls are rewritten, and the third turn breaks",
        "vllm-project/vllm#32768 vllm-project/vllm#50295",
        [
            "serve/chat/test_tool_calls.py::test_kimis_ids_go_round_verbatim",
            "serve/chat/test_tool_calls.py::test_kimis_numbers_go_on_over_the_conversation",
        ],
    ),
    (
        "markers come out in texts and arguments",
        "tenstorrent/tt-inference-server#3683",
        [
            "runtime/text/test_replies.py::test_any_split_gives_the_same_parts",
            "runtime/text/test_replies.py::test_no_marker_comes_out_whatever_the_order",
            "serve/chat/test_tool_calls.py::test_no_tools_no_calls",
        ],
    ),
    (
        "clients read reasoning under one of two names",
        "vllm-project/vllm#33616 vllm-project/vllm#50624 Blaizzy/mlx-vlm#1408",
        ["serve/chat/test_chat.py::test_reasoning_has_two_names"],
    ),
    (
        "reasoning and content in one delta",
        "vllm-project/vllm#43933",
        ["serve/chat/test_chat.py::test_reasoning_and_content_share_no_delta"],
    ),
    (
        "the JSON that was asked for ends up in the reasoning",
        "ddalcu/mlx-serve#331 vllm-project/vllm#47027 vllm-project/vllm#44012",
        ["serve/chat/test_structured.py::test_a_schema_behind_reasoning"],
    ),
    (
        "streams have no usage",
        "lmstudio-ai/lmstudio-js#320 jundot/omlx#61",
        [
            "serve/test_completions.py::test_a_stream_has_the_same_text",
            "serve/chat/test_chat.py::test_a_streams_chunks_come_in_order",
        ],
    ),
    (
        "answers of two users are mixed",
        "ubergarm/r1-ktransformers-guide#3",
        ["serve/test_completions.py::test_sixteen_clients_get_each_its_own_text"],
    ),
    (
        "the same prompt has another text once the cache is warm",
        "ggml-org/llama.cpp#7594 ggml-org/llama.cpp#28368 ggml-org/llama.cpp#4902 ggml-org/llama.cpp#7052",
        [
            "runtime/test_prefix_reuse.py::test_logits_after_a_hit",
            "runtime/test_prefix_reuse.py::test_texts_are_as_alone",
        ],
    ),
    (
        "the prefix cache tells others' prompts by its speed and its hashes",
        "vllm-project/vllm#16016 vllm-project/vllm#17045 vllm-project/vllm#12621",
        [
            "serve/test_completions.py::test_a_salt_hides_what_the_cache_holds",
            "runtime/test_block_reuse.py::test_salts_do_not_meet",
            "runtime/test_block_reuse.py::test_keys_differ_between_processes",
        ],
    ),
    (
        "a rank without requests holds all others",
        "vllm-project/vllm#51984 vllm-project/vllm#53578",
        [
            "ranks/test_steps.py::test_logits_and_tokens_are_those_of_one_process",
            "ranks/test_steps.py::test_the_cases_hold_what_they_are_for",
            "serve/test_command.py::test_ranks_serve_what_one_process_does_and_end_together",
        ],
    ),
    (
        "SIGTERM cuts answers",
        "vllm-project/vllm#24885",
        ["serve/test_command.py::test_sigterm_lets_answers_end"],
    ),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report[0])
def test_a_report_has_its_tests(report: tuple[str, str, list[str]]) -> None:
    _, threads, tests = report
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#[0-9]+", thread) for thread in threads.split())
    assert tests
    for test in tests:
        path, name = test.split("::")
        assert f"\ndef {name}(" in (TESTS / path).read_text(encoding="utf-8"), test


def test_a_report_is_listed_once() -> None:
    threads = [thread for _, threads, _ in REPORTS for thread in threads.split()]
    assert len(set(threads)) == len(threads)
