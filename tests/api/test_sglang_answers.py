"""What is said of long answers in SGLang's form, and of the headers that both forms heed."""

from __future__ import annotations

import pytest

from api.generate import router
from tests.api.in_process import Server, refusal, run
from tests.api.test_sglang_form import answer, events


def test_log_probabilities_of_a_stream_are_those_of_the_whole_however_long() -> None:
    sampling = {"temperature": 1.5, "sampling_seed": 3, "max_new_tokens": 150, "ignore_eos": True}
    scores = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    body = {"text": "hello" * 40, "sampling_params": sampling, "rid": "me", **scores}
    last, whole = events(body)[-1], answer(body)
    for each in (last, whole):
        del each["meta_info"]["e2e_latency"]
    assert last == whole
    assert len(whole["meta_info"]["output_top_logprobs"]) == 150
    assert len(whole["meta_info"]["input_top_logprobs"]) == 201


@pytest.mark.parametrize("form", [{"text": "a"}, {"prompt": "a"}])
def test_a_switch_that_is_neither_on_nor_off_is_refused_streamed_or_not(
    form: dict[str, str],
) -> None:
    async def check(server: Server) -> None:
        for stream in (True, False):
            body = {**form, "stream": stream}
            headers = {"x-progress": "yes"}
            response = await server.client.post("/generate", json=body, headers=headers)
            assert refusal(response) == (400, "x-progress")

    run(router, check)
